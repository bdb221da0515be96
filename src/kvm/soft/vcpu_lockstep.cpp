// The lockstep engine: a block is run by the interpreter, undone, run as host code, and all that it left is
// compared. Blocks that talk to the world outside are run by the interpreter alone.
#include <fmt/format.h>

#include <cstdio>
#include <string_view>

#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/mmu/host_access.hpp"
#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

bool repeatable(const Block& block) noexcept {
  for (const Op& op : block.ops)
    if ((op.flags & Op::outside) != 0) return false;
  return true;
}

constexpr const char* names[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                 "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

}  // namespace

// What a run has left.
struct SoftVcpu::Outcomes {
  CpuState state;
  Cpu::PendingException pending;
};

std::string SoftVcpu::difference(const Outcomes& wanted, const WriteJournal& journal) const {
  std::string text;
  const auto differ = [&](std::string_view what, uint64_t interpreted, uint64_t translated) {
    if (interpreted != translated)
      text += fmt::format("\n  {}: interpreted {:#x}, translated {:#x}", what, interpreted, translated);
  };
  for (unsigned i = 0; i < 16; ++i) differ(names[i], wanted.state.gpr[i], cpu_.gpr[i]);
  differ("rip", wanted.state.rip, cpu_.rip);
  differ("exception", wanted.pending.valid, cpu_.pending.valid);
  if (wanted.pending.valid && cpu_.pending.valid) {
    differ("vector", static_cast<uint64_t>(wanted.pending.vector),
           static_cast<uint64_t>(cpu_.pending.vector));
    differ("error code", wanted.pending.error, cpu_.pending.error);
    differ("CR2 or DR6", wanted.pending.payload, cpu_.pending.payload);
  } else {
    // Flags that the program cannot see any more are not kept up for an exception's frame.
    differ("flags (LAHF, SETO)", wanted.state.arith, cpu_.arith);
  }
  if (wanted.state.vector.zmm != cpu_.vector.zmm)
    for (unsigned i = 0; i < 32; ++i)
      if (wanted.state.vector.zmm[i] != cpu_.vector.zmm[i]) text += fmt::format("\n  zmm{} differs", i);
  // Names are made when there is something to name: this runs for every block.
  for (unsigned i = 0; i < 8; ++i)
    if (wanted.state.vector.k[i] != cpu_.vector.k[i])
      differ(fmt::format("k{}", i), wanted.state.vector.k[i], cpu_.vector.k[i]);
  for (unsigned i = 0; i < 160; ++i)
    if (wanted.state.vector.fx[i] != cpu_.vector.fx[i] && (i < 6 || i >= 24) && (i < 28 || i >= 32) &&
        (i < 32 || i % 16 < 10))
      differ(fmt::format("fxsave byte {}", i), wanted.state.vector.fx[i], cpu_.vector.fx[i]);
  for (const WriteJournal::Entry& entry : journal.entries) {
    uint8_t now[64];
    host_read(entry.host, now, entry.size);
    if (std::memcmp(now, entry.after.data(), entry.size) != 0)
      text +=
          fmt::format("\n  memory at host {:#x}, {} bytes: interpreted {:02x}, translated {:02x}", entry.host,
                      entry.size, fmt::join(entry.after.data(), entry.after.data() + entry.size, " "),
                      fmt::join(now, now + entry.size, " "));
  }
  return text;
}

// True when the block was run, in either way; false when it differed.
bool SoftVcpu::run_both(Block& block, bool again) noexcept {
  const Op* const first = block.ops.data();
  const auto interpret = [&] {
    cpu_.gpr[gpr_rip] = cpu_.rip;
    cpu_.block = &block;
    first->handler(cpu_, first);
    cpu_.block = nullptr;
  };
  const uint64_t start = cpu_.rip;
  if (!repeatable(block) || !translator_->ready(block)) {
    ++block.runs;
    interpret();
    return true;
  }
  const auto before = std::make_unique<CpuState>(cpu_);
  const uint32_t key = cpu_.decode_key;
  WriteJournal journal;
  cpu_.journal = &journal;
  TlbSet* const tlb =
      std::exchange(cpu_.tlb, &cpu_.tlb_sets[3]);  // every access by the slow path, which logs
  interpret();
  const bool logged = cpu_.tlb == &cpu_.tlb_sets[3];  // to the end: no instruction chose a set
  if (logged) cpu_.tlb = tlb;
  cpu_.journal = nullptr;
  // Device accesses, code that writes to itself, a change of mode: the interpreter's word stands.
  if (!logged || journal.lost || cpu_.stops != 0 || wants_attention() || cpu_.decode_key != key) return true;
  const auto wanted = std::make_unique<Outcomes>(Outcomes{cpu_, cpu_.pending});
  for (WriteJournal::Entry& entry : journal.entries) host_read(entry.host, entry.after.data(), entry.size);
  const auto undo = [&] {
    for (auto entry = journal.entries.rbegin(); entry != journal.entries.rend(); ++entry)
      host_write(entry->host, entry->before.data(), entry->size);
    static_cast<CpuState&>(cpu_) = *before;
    cpu_.pending.valid = false;
  };
  undo();
  // A request ends host code early, on purpose.
  if (!translator_->run_once(block) || cpu_.stops != 0 || wants_attention()) {
    cpu_.stops = 0;
    for (const WriteJournal::Entry& entry : journal.entries)
      host_write(entry.host, entry.after.data(), entry.size);
    static_cast<CpuState&>(cpu_) = wanted->state;
    cpu_.pending = wanted->pending;
    return true;
  }
  const std::string text = difference(*wanted, journal);
  if (text.empty()) return true;
  // Another vCPU or the VMM may have written what the block reads, between the two runs. The translator's
  // mistakes come again.
  if (!again) {
    undo();
    return run_both(block, true);
  }
  std::string code;
  for (const Op& op : block.ops) {
    uint8_t bytes[15] = {};
    if (op.length == 0 || op.offset + op.length > page_size - (block.host & page_mask)) continue;
    host_read(block.host + op.offset, bytes, op.length);
    code += fmt::format("\n  {:#x}: {:02x}", start + op.offset, fmt::join(bytes, bytes + op.length, " "));
  }
  std::string registers;
  for (unsigned i = 0; i < 16; ++i)
    registers += fmt::format("{}{} {:#x}", i % 4 == 0 ? "\n  " : ", ", names[i], before->gpr[i]);
  fmt::print(stderr,
             "lockstep: vCPU {} at {:#x}, mode {:#x}: the tiers differ{}\nblock:{}\nregisters before:{}\n  "
             "flags {:#x}\n",
             id_, start, block.key, text, code, registers, before->arith);
  return false;
}

}  // namespace lodge::kvm::soft
