// MOVS, STOS, LODS, SCAS, CMPS, INS and OUTS, with REP as runs within a page where nothing can fault in
// between.
#include <algorithm>

#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/interpret/integer.hpp"
#include "kvm/soft/interpret/threaded.hpp"

namespace lodge::kvm::soft::integer {
namespace {

bool repeated(const Op& op) noexcept {
  return (op.flags & (Op::rep | Op::repne)) != 0;
}

// RSI, RDI and RCX at the width of the address size.
uint64_t pointer(Cpu& cpu, const Op& op, GprName reg) noexcept {
  return cpu.get_reg(reg * 8, op.address_size);
}
void advance(Cpu& cpu, const Op& op, GprName reg, uint64_t bytes) noexcept {
  const bool down = (cpu.system_flags & flag::df) != 0;
  cpu.set_reg(reg * 8, op.address_size, pointer(cpu, op, reg) + (down ? -bytes : bytes));
}
void count_down(Cpu& cpu, const Op& op, uint64_t items) noexcept {
  if (repeated(op)) cpu.set_reg(rcx * 8, op.address_size, pointer(cpu, op, rcx) - items);
}

// How many items may be done in one go before the run loop wants a look: all of a page, but one at a time
// when instructions are observed one by one.
uint64_t budget(Cpu& cpu, const Op& op) noexcept {
  if (!repeated(op)) return 1;
  const uint64_t left = pointer(cpu, op, rcx);
  return cpu.slow || cpu.alone ? std::min<uint64_t>(left, 1) : left;
}

// After some items: done, or again at this instruction so that interrupts get in between.
Step after_items(Cpu& cpu, const Op& op) noexcept {
  if (!repeated(op) || pointer(cpu, op, rcx) == 0) return Step::next;
  cpu.rip = cpu.this_rip(op);
  return Step::branch;
}

// The number of whole items from `linear` upwards (downwards with DF: 1) within its page.
uint64_t items_in_page(Cpu& cpu, uint64_t linear, unsigned size) noexcept {
  if ((cpu.system_flags & flag::df) != 0) return 1;
  return (page_size - (linear & page_mask)) / size;
}

bool source_linear(Cpu& cpu, const Op& op, uint64_t& out) noexcept {
  return cpu.linear(static_cast<SegmentName>(op.segment), pointer(cpu, op, rsi), op.size, false, out);
}
bool destination_linear(Cpu& cpu, const Op& op, bool write, uint64_t& out) noexcept {
  return cpu.linear(seg_es, pointer(cpu, op, rdi), op.size, write, out);
}

// Whether a run upwards of `bytes` stays within what was checked for its first item: flat segments only.
bool may_run(Cpu& cpu, const Op& op) noexcept {
  if ((cpu.system_flags & flag::df) != 0 || !cpu.flat) return false;
  if (cpu.mode() == Mode::bits64) return op.segment < seg_fs && op.address_size == 8;
  return op.address_size == 4 && (op.segment == seg_ds || op.segment == seg_es || op.segment == seg_ss);
}

// memmove semantics of a byte-wise upward copy: an overlap that runs ahead repeats its pattern.
void copy_up(uint64_t to, uint64_t from, uint64_t bytes, unsigned size) noexcept {
  if (to - from >= bytes) {
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
    return;
  }
  for (uint64_t i = 0; i < bytes; i += size)
    by_size(size, [&]<class T>(T) { host_store<T>(to + i, host_load<T>(from + i)); });
}

Step movs(Cpu& cpu, const Op& op) noexcept {
  for (uint64_t left = budget(cpu, op); left > 0;) {
    uint64_t from = 0;
    uint64_t to = 0;
    if (!source_linear(cpu, op, from) || !destination_linear(cpu, op, true, to)) return Step::fault;
    const TlbEntry& source = cpu.tlb->at(from);
    const TlbEntry& target = cpu.tlb->at(to);
    if (may_run(cpu, op) && TlbSet::hit(source.read, from, op.size) &&
        TlbSet::hit(target.write, to, op.size)) {
      const uint64_t items =
          std::min({left, items_in_page(cpu, from, op.size), items_in_page(cpu, to, op.size)});
      copy_up(target.host_of(to), source.host_of(from), items * op.size, op.size);
      advance(cpu, op, rsi, items * op.size);
      advance(cpu, op, rdi, items * op.size);
      count_down(cpu, op, items);
      left -= items;
    } else {
      if (!cpu.load_slow(from, op.size) || !cpu.store_slow(to, op.size, cpu.scratch)) return Step::fault;
      advance(cpu, op, rsi, op.size);
      advance(cpu, op, rdi, op.size);
      count_down(cpu, op, 1);
      --left;
    }
    if (cpu.request.load(std::memory_order_relaxed) != 0) break;
  }
  return after_items(cpu, op);
}

Step stos(Cpu& cpu, const Op& op) noexcept {
  for (uint64_t left = budget(cpu, op); left > 0;) {
    uint64_t to = 0;
    if (!destination_linear(cpu, op, true, to)) return Step::fault;
    const TlbEntry& target = cpu.tlb->at(to);
    uint64_t items = 1;
    if (may_run(cpu, op) && TlbSet::hit(target.write, to, op.size)) {
      items = std::min(left, items_in_page(cpu, to, op.size));
      uint64_t host = target.host_of(to);
      uint64_t count = items;
      switch (op.size) {
        case 1: asm volatile("rep stosb" : "+D"(host), "+c"(count) : "a"(cpu.gpr[rax]) : "memory"); break;
        case 2: asm volatile("rep stosw" : "+D"(host), "+c"(count) : "a"(cpu.gpr[rax]) : "memory"); break;
        case 4: asm volatile("rep stosl" : "+D"(host), "+c"(count) : "a"(cpu.gpr[rax]) : "memory"); break;
        default: asm volatile("rep stosq" : "+D"(host), "+c"(count) : "a"(cpu.gpr[rax]) : "memory"); break;
      }
    } else if (!cpu.store_slow(to, op.size, cpu.gpr[rax])) {
      return Step::fault;
    }
    advance(cpu, op, rdi, items * op.size);
    count_down(cpu, op, items);
    left -= items;
    if (cpu.request.load(std::memory_order_relaxed) != 0) break;
  }
  return after_items(cpu, op);
}

Step lods(Cpu& cpu, const Op& op) noexcept {
  for (uint64_t left = budget(cpu, op); left > 0; --left) {
    uint64_t from = 0;
    if (!source_linear(cpu, op, from) || !cpu.load_slow(from, op.size)) return Step::fault;
    cpu.set_reg(0, op.size, cpu.scratch);
    advance(cpu, op, rsi, op.size);
    count_down(cpu, op, 1);
    if (cpu.request.load(std::memory_order_relaxed) != 0) break;
  }
  return after_items(cpu, op);
}

// SCAS compares the accumulator, CMPS the source, with [RDI]; REPE and REPNE stop on ZF.
template <bool Scan>
Step compare(Cpu& cpu, const Op& op) noexcept {
  for (uint64_t left = budget(cpu, op); left > 0;) {
    uint64_t a = 0;
    if (Scan) {
      a = cpu.get_reg(0, op.size);
    } else {
      uint64_t from = 0;
      if (!source_linear(cpu, op, from) || !cpu.load_slow(from, op.size)) return Step::fault;
      a = cpu.scratch;
    }
    uint64_t to = 0;
    if (!destination_linear(cpu, op, false, to) || !cpu.load_slow(to, op.size)) return Step::fault;
    const uint64_t b = cpu.scratch;
    uint16_t flags = cpu.arith;
    by_size(op.size, [&]<class T>(T) { alu<Alu::cmp, T>(static_cast<T>(a), static_cast<T>(b), flags); });
    cpu.arith = flags;
    if (!Scan) advance(cpu, op, rsi, op.size);
    advance(cpu, op, rdi, op.size);
    count_down(cpu, op, 1);
    --left;
    if (repeated(op) && cpu.zf() == ((op.flags & Op::repne) != 0)) return Step::next;
    if (cpu.request.load(std::memory_order_relaxed) != 0) break;
  }
  return after_items(cpu, op);
}

constexpr unsigned io_buffer = 1024;  // Platform::io takes no more at once

Step outs(Cpu& cpu, const Op& op) noexcept {
  const auto port = cpu.reg<uint16_t>(rdx * 8);
  if (!check_io_permission(cpu, port, op.size)) return Step::fault;
  const uint64_t left = repeated(op) ? pointer(cpu, op, rcx) : 1;
  if (left == 0) return Step::next;
  uint64_t from = 0;
  if (!source_linear(cpu, op, from)) return Step::fault;
  uint64_t items = 1;
  if (may_run(cpu, op) && !cpu.slow)
    items = std::max<uint64_t>(
        1, std::min({left, items_in_page(cpu, from, op.size), uint64_t{io_buffer} / op.size}));
  uint8_t data[io_buffer];
  if (!cpu.read_bytes(from, data, static_cast<unsigned>(items * op.size))) return Step::fault;
  if (!cpu.platform().io(port, data, op.size, static_cast<uint32_t>(items), true)) return Step::fault;
  advance(cpu, op, rsi, items * op.size);
  count_down(cpu, op, items);
  return after_items(cpu, op);
}

Step ins(Cpu& cpu, const Op& op) noexcept {
  const auto port = cpu.reg<uint16_t>(rdx * 8);
  if (!check_io_permission(cpu, port, op.size)) return Step::fault;
  const uint64_t left = repeated(op) ? pointer(cpu, op, rcx) : 1;
  if (left == 0) return Step::next;
  uint64_t to = 0;
  if (!destination_linear(cpu, op, true, to)) return Step::fault;
  uint64_t items = 1;
  if (may_run(cpu, op) && !cpu.slow)
    items = std::max<uint64_t>(
        1, std::min({left, items_in_page(cpu, to, op.size), uint64_t{io_buffer} / op.size}));
  // Known to be writable before the port is read: the read has side effects.
  if (!cpu.probe_write(to, static_cast<unsigned>(items * op.size))) return Step::fault;
  uint8_t data[io_buffer] = {};
  if (!cpu.platform().io(port, data, op.size, static_cast<uint32_t>(items), false)) return Step::fault;
  if (!cpu.write_bytes(to, data, static_cast<unsigned>(items * op.size))) return Step::fault;
  advance(cpu, op, rdi, items * op.size);
  count_down(cpu, op, items);
  return after_items(cpu, op);
}

}  // namespace

Complex string_op(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_MOVSB:
    case ZYDIS_MNEMONIC_MOVSW:
    case ZYDIS_MNEMONIC_MOVSD:
    case ZYDIS_MNEMONIC_MOVSQ: return movs;
    case ZYDIS_MNEMONIC_STOSB:
    case ZYDIS_MNEMONIC_STOSW:
    case ZYDIS_MNEMONIC_STOSD:
    case ZYDIS_MNEMONIC_STOSQ: return stos;
    case ZYDIS_MNEMONIC_LODSB:
    case ZYDIS_MNEMONIC_LODSW:
    case ZYDIS_MNEMONIC_LODSD:
    case ZYDIS_MNEMONIC_LODSQ: return lods;
    case ZYDIS_MNEMONIC_SCASB:
    case ZYDIS_MNEMONIC_SCASW:
    case ZYDIS_MNEMONIC_SCASD:
    case ZYDIS_MNEMONIC_SCASQ: return compare<true>;
    case ZYDIS_MNEMONIC_CMPSB:
    case ZYDIS_MNEMONIC_CMPSW:
    case ZYDIS_MNEMONIC_CMPSD:
    case ZYDIS_MNEMONIC_CMPSQ: return compare<false>;
    case ZYDIS_MNEMONIC_INSB:
    case ZYDIS_MNEMONIC_INSW:
    case ZYDIS_MNEMONIC_INSD: return ins;
    case ZYDIS_MNEMONIC_OUTSB:
    case ZYDIS_MNEMONIC_OUTSW:
    case ZYDIS_MNEMONIC_OUTSD: return outs;
    default: return nullptr;
  }
}

}  // namespace lodge::kvm::soft::integer
