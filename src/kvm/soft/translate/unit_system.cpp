// System instructions that are a few host instructions, and those that move all flags.
#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/translate/unit.hpp"

namespace lodge::kvm::soft {

void UnitEmitter::emit_system(const Instruction& i, unsigned n) noexcept {
  switch (i.kind) {
    case Kind::swap_gs: emit_swap_gs(); break;
    case Kind::read_segment: emit_read_segment(i); break;
    case Kind::pause: e_.u8(0xf3), e_.u8(0x90); break;
    default:
      // The host's flags are lost to all others.
      if (live_[n] != no_flags) store_flags();
      flow_.native_flags = false;
      if (i.kind == Kind::clear_if) change_system_flag(flag::if_, false);
      if (i.kind == Kind::set_df) change_system_flag(flag::df, i.insn.mnemonic == ZYDIS_MNEMONIC_STD);
      if (i.kind == Kind::set_if) emit_set_if(n);
      if (i.kind == Kind::read_tsc) emit_read_tsc(i);
      if (i.kind == Kind::serialize) emit_serialize(n);
  }
}

void UnitEmitter::change_system_flag(uint64_t bit, bool on) noexcept {
  e_.state(0x81, on ? 1 : 4, o_.system_flags);  // or, and qword [system_flags]
  e_.u32(on ? bit : ~bit);
}

void UnitEmitter::emit_swap_gs() noexcept {
  const int64_t gs = o_.segment_base + int64_t{sizeof(Segment)} * seg_gs;
  e_.load(scratch0, gs);
  e_.load(scratch1, o_.kernel_gs_base);
  e_.store(gs, scratch1);
  e_.store(o_.kernel_gs_base, scratch0);
}

void UnitEmitter::emit_read_segment(const Instruction& i) noexcept {
  const unsigned guest = i.op->dst / 8;
  const unsigned reg = lives_in_memory(guest) ? scratch0 : guest;
  e_.state(0x0fb7, reg, o_.selector + int64_t{sizeof(Segment)} * i.op->src, false);
  if (guest == rsp) flow_.rsp = 0;
  if (lives_in_memory(guest)) e_.store(o_.of_gpr(guest), reg);
}

void UnitEmitter::emit_set_if(unsigned n) noexcept {
  Site& site = interpret_if(e_.jump_if_set(o_.event_waits), n);
  change_system_flag(flag::if_, true);
  close(site);
}

void UnitEmitter::emit_read_tsc(const Instruction& i) noexcept {
  // RDTSCP waits for what comes before, and so does this.
  if (i.insn.mnemonic == ZYDIS_MNEMONIC_RDTSCP) e_.u8(0x0f), e_.u8(0xae), e_.u8(0xe8);  // lfence
  e_.u8(0x0f), e_.u8(0x31);                                                             // rdtsc
  e_.u8(0x48), e_.u8(0xc1), e_.u8(0xe2), e_.u8(32);                                     // shl rdx, 32
  e_.u8(0x48), e_.u8(0x09), e_.u8(0xd0);                                                // or rax, rdx
  e_.state(0x03, 0, o_.tsc_offset);  // add rax, [tsc_offset]
  e_.move(2, 0);
  e_.u8(0x48), e_.u8(0xc1), e_.u8(0xea), e_.u8(32);  // shr rdx, 32
  e_.move(0, 0, false);
  if (i.insn.mnemonic == ZYDIS_MNEMONIC_RDTSCP) e_.load32(1, o_.tsc_aux);
}

// Its block ends here. Code that another processor has written is heard of by a request.
void UnitEmitter::emit_serialize(unsigned n) noexcept {
  e_.u8(0x0f), e_.u8(0xae), e_.u8(0xf0);  // mfence
  uint8_t* const requested = e_.jump_if_set(o_.request);
  Site& site = new_site(n, n);
  add_stub(requested, Stubs::request, &site, site.before);
}

// --- all flags

void UnitEmitter::emit_push_flags(const Instruction& i, unsigned n) noexcept {
  const Place place = reach(i, n);
  need_native_flags(i, n);
  if (live_[n + 1] != no_flags) store_flags();
  e_.u8(0x9c);                                               // pushfq: below the state is a stack
  e_.u8(0x41), e_.u8(0x5b);                                  // pop r11
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3), e_.u32(all_flags);  // and r11d
  e_.state(0x0b, scratch1, o_.system_flags);                 // or r11, [system_flags]
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3);                     // and r11d
  e_.u32(~(flag::vm | flag::rf));
  flow_.native_flags = false;
  e_.store_at_scratch(place.disp, scratch1, word_);
  flow_.rsp -= word_;
  if (place.site != nullptr) close(*place.site);
}

// Flags that steer what is outside the block are the interpreter's when they change; so is IF but at CPL 0. A
// block ends behind a change of IF, as the interpreter's does.
void UnitEmitter::emit_pop_flags(const Instruction& i, unsigned n) noexcept {
  const int64_t behind = start_ + i.op->offset + i.op->length;
  const bool moves_if = (block_.key & key::kernel) != 0;
  if (moves_if && !in_page(behind)) return emit_complex(n);
  const uint64_t steering = flag::tf | flag::iopl | flag::rf | flag::ac | (moves_if ? 0 : flag::if_);
  const uint64_t moved = flag::df | flag::nt | flag::id | (moves_if ? flag::if_ : 0);
  Site& site = look_up_alone(stack_access(flow_.rsp, false), n);
  const auto interpret = [&](uint8_t* jump) { add_stub(jump, Stubs::complex_op, &site, site.before); };
  // A miss, too: on the way of accesses nobody looks whether another mode goes on.
  stubs_.back().call = Stubs::complex_op;
  if (moves_if) interpret(e_.jump_if_set(o_.event_waits));
  e_.load_at_scratch(scratch1, 0, word_);
  e_.move(scratch0, scratch1);
  e_.state(0x33, scratch0, o_.system_flags);                // xor r10, [system_flags]
  e_.u8(0x41), e_.u8(0xf7), e_.u8(0xc2), e_.u32(steering);  // test r10d
  interpret(e_.jump_if(5));
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe2), e_.u32(moved);  // and r10d
  e_.state(0x31, scratch0, o_.system_flags);             // xor [system_flags], r10
  e_.store(o_.target, scratch0);
  // As LAHF and SETO would have them.
  e_.move(scratch0, scratch1);
  e_.u8(0x41), e_.u8(0xc1), e_.u8(0xea), e_.u8(11);     // shr r10d, 11
  e_.u8(0x41), e_.u8(0x83), e_.u8(0xe2), e_.u8(1);      // and r10d, 1
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3), e_.u32(0xd5);  // and r11d
  e_.u8(0x41), e_.u8(0xc1), e_.u8(0xe3), e_.u8(8);      // shl r11d, 8
  e_.lea(scratch0, scratch0, scratch1, 0, 0x200, false);
  e_.u8(0x66), e_.state(0x89, scratch0, o_.arith, false);  // mov [arith], r10w
  flow_.stored_flags = true;
  flow_.rsp += word_;
  if (moves_if) {
    commit_rsp();
    e_.state(0xf7, 0, o_.target, false);  // test dword [target]
    e_.u32(flag::if_);
    uint8_t* const same = e_.jump_if(4);
    if (counts_) count(o_.instructions, int64_t{n} + 1 - int64_t{counted_});
    DirectExit& exit = new_exit(behind);
    e_.align_displacement(1);
    exit.displacement = e_.jump();
    Emitter::patch(same, e_.at());
  }
  close(site);
}

}  // namespace lodge::kvm::soft
