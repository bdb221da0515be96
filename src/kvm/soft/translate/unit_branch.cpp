// Near branches: links to other blocks, and look-ups of indirect targets.
#include "kvm/soft/translate/unit.hpp"

namespace lodge::kvm::soft {

void UnitEmitter::push_return_address(const Instruction& i, int64_t disp) noexcept {
  e_.load(scratch1, o_.page);
  e_.lea(scratch1, scratch1, 16, 0, start_ + i.op->offset + i.op->length, wide_);
  e_.store_at_scratch(disp, scratch1, word_);
  flow_.rsp -= word_;
}

void UnitEmitter::emit_call(const Instruction& i, unsigned n) noexcept {
  const Place place = reach(i, n);
  push_return_address(i, place.disp);
  if (n + 1 == code_.size()) return exit_to(start_ + static_cast<int64_t>(i.op->imm));
  if (place.site != nullptr) close(*place.site);
}

// Leaves a call to the interpreter when its target, in scratch1, is not canonical: such a call pushes
// nothing. The flags are stored or dead.
void UnitEmitter::refuse_odd_target(unsigned n) noexcept {
  if (wide_) interpret_if(jump_if_odd(), n);
}

// Jumps when the address in scratch1, which is lost, is not canonical.
uint8_t* UnitEmitter::jump_if_odd() noexcept {
  e_.u8(0x49), e_.u8(0xc1), e_.u8(0xfb), e_.u8(47);  // sar r11, 47
  e_.u8(0x41), e_.u8(0x83), e_.u8(0xc3), e_.u8(1);   // add r11d, 1
  e_.u8(0x41), e_.u8(0x83), e_.u8(0xfb), e_.u8(1);   // cmp r11d, 1
  return e_.jump_if(7);                              // ja
}

void UnitEmitter::emit_call_indirect(const Instruction& i, unsigned n) noexcept {
  if (!i.has_memory()) {
    const int64_t disp = reach(i, n).disp;
    store_flags();
    load_guest(scratch1, i.op->dst / 8);
    refuse_odd_target(n);
    push_return_address(i, disp);
    load_guest(scratch0, i.op->dst / 8);
    if (!wide_) e_.move(scratch0, scratch0, false);
  } else {
    look_up_alone(operand(i, static_cast<unsigned>(word_), flow_.rsp), n);
    e_.load_at_scratch(scratch1, 0, word_);
    e_.store(o_.target, scratch1);
    refuse_odd_target(n);
    look_up_alone(stack_access(flow_.rsp - word_, true), n);
    push_return_address(i, 0);
    e_.load(scratch0, o_.target);
  }
  exit_indirect(n, -word_);
}

void UnitEmitter::emit_ret(const Instruction& i, unsigned n) noexcept {
  e_.load_at_scratch(scratch0, reach(i, n).disp, word_);
  const int32_t change = word_ + static_cast<int32_t>(i.op->imm & 0xffff);
  flow_.rsp += change;
  exit_indirect(n, change);
}

void UnitEmitter::emit_jump_indirect(const Instruction& i, unsigned n) noexcept {
  if (!i.has_memory()) {
    load_guest(scratch0, i.op->dst / 8);
    if (!wide_) e_.move(scratch0, scratch0, false);
  } else {
    look_up_alone(operand(i, static_cast<unsigned>(word_), flow_.rsp), n);
    e_.load_at_scratch(scratch0, 0, word_);
  }
  exit_indirect(n, 0);
}

void UnitEmitter::emit_jump(const Instruction& i, unsigned n) noexcept {
  if (n + 1 == code_.size()) exit_to(start_ + static_cast<int64_t>(i.op->imm));
}

void UnitEmitter::emit_branch(const Instruction& i, unsigned n) noexcept {
  if (!flow_.native_flags) {
    e_.load_flags(o_.arith, scratch1);
    flow_.native_flags = true;
  }
  commit_rsp();
  const int64_t taken = start_ + static_cast<int64_t>(i.op->imm);
  const int64_t behind = start_ + i.op->offset + i.op->length;
  const unsigned condition = i.insn.opcode & 15;
  if (n + 1 == code_.size()) {
    leave_if(condition, taken);
    exit_to(behind);
  } else if (follows(n)) {
    leave_if(condition, taken);
  } else {
    leave_if(condition ^ 1, behind);
  }
}

void UnitEmitter::leave_if(unsigned condition, int64_t offset) noexcept {
  if (in_page(offset)) {
    DirectExit& exit = new_exit(offset);
    e_.align_displacement(2);
    exit.displacement = e_.jump_if(condition);
    return;
  }
  uint8_t* const skip = e_.jump_if(condition ^ 1);
  exit_to(offset);
  ended_ = false;
  Emitter::patch(skip, e_.at());
}

// Without a change of flags.
void UnitEmitter::emit_loop(const Instruction& i) noexcept {
  if (i.reads != no_flags && !flow_.native_flags) {
    e_.load_flags(o_.arith, scratch1);
    flow_.native_flags = true;
  }
  commit_rsp();
  const int64_t taken = start_ + static_cast<int64_t>(i.op->imm);
  const int64_t behind = start_ + i.op->offset + i.op->length;
  const bool wide = i.op->address_size == 8;
  if (i.insn.opcode == 0xe3) {  // JRCXZ
    uint8_t* const zero = e_.jump_if_rcx_is_zero(wide);
    exit_to(behind);
    Emitter::patch_short(zero, e_.at());
    exit_to(taken);
    return;
  }
  e_.lea(rcx, rcx, 16, 0, -1, wide);
  uint8_t* const done = e_.jump_if_rcx_is_zero(wide);
  uint8_t* other = nullptr;
  if (i.insn.opcode != 0xe2) other = e_.jump_if(i.insn.opcode == 0xe0 ? 4 : 5);  // LOOPNE: jz, LOOPE: jnz
  exit_to(taken);
  Emitter::patch_short(done, e_.at());
  if (other != nullptr) Emitter::patch(other, e_.at());
  exit_to(behind);
}

// `offset` is one from the start of the block's page.
bool UnitEmitter::in_page(int64_t offset) const noexcept {
  return offset >= 0 && offset < static_cast<int64_t>(page_size);
}

// One to another page gets a slot. Sets failed_ when there is none.
DirectExit& UnitEmitter::new_exit(int64_t offset) noexcept {
  DirectExit& exit = t_.exits.emplace_back();
  exit.owner = &t_;
  exit.offset = static_cast<int32_t>(offset);
  exit.boundary = boundary();
  add_stub(nullptr, Stubs::exit, &exit, exit.boundary);
  if (in_page(offset)) return exit;
  failed_ = failed_ || offset != exit.offset;
  take_slot(exit);
  return exit;
}

void UnitEmitter::take_slot(DirectExit& exit) noexcept {
  exit.slot = translator_.cache_.new_slot(exit);
  exit.has_slot = exit.slot != TranslatorArea::slot_count;
  failed_ = failed_ || !exit.has_slot;
}

// A block that reaches into a second page is entered through a slot: each vCPU has looked there whether it
// has the page mapped that the code was made of.
void UnitEmitter::emit_entry() noexcept {
  if (block_.host_page[1] == 0) return;
  DirectExit& entry = new_exit(start_);
  entry.is_entry = true;
  take_slot(entry);
  e_.jump_through_state(o_.slot + 8 * int64_t{entry.slot});
}

// Where the way out of the translation begins while it is not linked.
void UnitEmitter::place_exit(DirectExit& exit, const uint8_t* stub) noexcept {
  exit.stub = stub;
  if (exit.displacement != nullptr)
    Emitter::patch(exit.displacement, stub);
  else
    translator_.cache_.place_slot(exit);
}

void UnitEmitter::exit_to(int64_t offset) noexcept {
  ended_ = true;
  commit_rsp();
  DirectExit& exit = new_exit(offset);
  if (failed_) return;
  if (!exit.has_slot) {
    e_.align_displacement(1);
    exit.displacement = e_.jump();
    return;
  }
  e_.load(scratch1, o_.page);
  e_.lea(scratch1, scratch1, 16, 0, offset & ~static_cast<int64_t>(page_mask), wide_);
  e_.store(o_.page, scratch1);
  e_.jump_through_state(o_.slot + 8 * int64_t{exit.slot});
}

// To the linear address in scratch0.
void UnitEmitter::exit_indirect(unsigned n, int32_t rsp_change) noexcept {
  ended_ = true;
  commit_rsp();
  store_flags();
  Site& site = new_site(n, n);
  site.rsp_before = 0;
  site.rsp_after = rsp_change;
  site.before = {.native_flags = false, .level = flow_.level};
  const unsigned view = MappedCode::view_of(block_.key);
  const int64_t table = o_.jump + int64_t{sizeof(JumpTable)} * (view * TranslatorArea::levels + flow_.level);
  uint8_t* const requested = e_.jump_if_set(o_.request);
  // imul r11d, r10d, multiplier; and r11d, mask; cmp [table + r11], r10
  e_.u8(0x45), e_.u8(0x69), e_.u8(0xda), e_.u32(JumpTable::multiplier);
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3), e_.u32(JumpTable::mask);
  e_.indexed(0x39, scratch0, scratch1, 0, table + int64_t{offsetof(JumpTable::Entry, linear)});
  uint8_t* const miss = e_.jump_if(5);
  e_.u8(0x49), e_.u8(0x81), e_.u8(0xe2), e_.u32(~page_mask);  // and r10, -4096
  e_.store(o_.page, scratch0);
  // jmp [table + r11]
  e_.indexed(0xff, 4, scratch1, 0, table + int64_t{offsetof(JumpTable::Entry, code)});
  flow_.native_flags = false;
  for (uint8_t* const out : {requested, miss}) add_stub(out, Stubs::indirect, &site, site.before);
}

}  // namespace lodge::kvm::soft
