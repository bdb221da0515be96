// The way out when the stub cache is full: a guest program that invents encodings without end must not take
// vector instructions from the rest of its system. Slow (microseconds), and correct.
#include <exception>

#include "kvm/soft/interpret/vector/run.hpp"
#include "kvm/soft/interpret/vector/stub.hpp"

namespace lodge::kvm::soft::simd {
namespace {

ZydisDecoder decoder_for(const Cpu& cpu) {
  ZydisDecoder decoder;
  switch (cpu.mode()) {
    case Mode::bits64: ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64); break;
    case Mode::bits32: ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32); break;
    case Mode::bits16: ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16); break;
  }
  return decoder;
}

// The arena of one stub, for this thread alone: it is overwritten at each use.
Arena& scratch() {
  thread_local Arena arena;
  arena.clear();
  return arena;
}

Step run_once(Cpu& cpu, const Op& op) {
  std::array<uint8_t, ZYDIS_MAX_INSTRUCTION_LENGTH> bytes{};
  uint64_t at = cpu.this_rip(op);
  if (cpu.mode() != Mode::bits64) at = static_cast<uint32_t>(cpu.segment[seg_cs].base + at);
  if (!cpu.read_bytes(at, bytes.data(), op.length)) return Step::fault;
  ZydisDecodedInstruction insn;
  ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
  const ZydisDecoder decoder = decoder_for(cpu);
  if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, bytes.data(), op.length, &insn, operands)))
    return undefined_opcode(cpu, op);
  Op local = op;
  std::optional<Plan> plan = plan_stub({cpu, at, bytes.data(), insn, operands}, local);
  if (!plan) return undefined_opcode(cpu, op);
  const void* const code = scratch().add(emit(plan->native, plan->kind, plan->form.uses_mxcsr));
  if (code == nullptr) return undefined_opcode(cpu, op);
  plan->form.stub = reinterpret_cast<Stub>(reinterpret_cast<uintptr_t>(code));
  local.aux = &plan->form;
  return plan->run(cpu, local);
}

}  // namespace

Step run_uncached(Cpu& cpu, const Op& op) noexcept {
  try {
    return run_once(cpu, op);
  } catch (const std::exception&) {
    return undefined_opcode(cpu, op);
  }
}

}  // namespace lodge::kvm::soft::simd
