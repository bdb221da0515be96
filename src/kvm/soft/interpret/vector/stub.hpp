// Compiles one guest instruction into a native stub: load the registers it reads, run it with its memory
// operand pointing at the bounce buffer, store the registers it writes.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "kvm/soft/interpret/op.hpp"
#include "kvm/soft/interpret/vector/arena.hpp"
#include "kvm/soft/interpret/vector/form.hpp"

namespace lodge::kvm::soft::simd {

// The guest instruction rewritten for 64-bit mode. The memory operand is [RSI], the general register of
// ModRM.reg is RAX, that of ModRM.rm RCX; vector, mask, MMX and x87 registers keep their numbers. Prefixes
// that do not matter are gone, so equal operations have equal bytes.
struct Native {
  std::vector<uint8_t> bytes;
  uint8_t gpr_reg = gpr_zero, gpr_rm = gpr_zero;  // the guest's registers (numbers in gpr)
  ZydisDecodedInstruction insn;                   // of `bytes`
  std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands;
};

// Nothing when the instruction is not understood. What comes back has been decoded again and compared: it is
// the same operation, on the same registers, and its only memory operand is [RSI].
std::optional<Native> rewrite(const DecodeContext& context);

enum class StubKind : uint8_t { vector, x87 };

// All about a stub but its code.
struct Plan {
  Native native;
  Form form;
  StubKind kind = StubKind::vector;
  Complex run = nullptr;
};
// Decides how to run an instruction as a stub and fills what of `op` does not depend on the stub; nothing
// when it is not understood. decode.cpp.
std::optional<Plan> plan_stub(const DecodeContext& context, Op& op);

// Position-independent code of type Stub; empty when it cannot be made.
std::vector<uint8_t> emit(const Native& native, StubKind kind, bool uses_mxcsr);

// Finds or makes forms. Guests cannot exhaust memory with it: when the arena is full, the caller gets
// nothing. Thread-safe. Forms live as long as the cache.
class StubCache {
 public:
  // `form` is complete but for the stub.
  const Form* get(const Native& native, StubKind kind, const Form& form);

 private:
  std::mutex mutex_;
  Arena arena_;
  std::unordered_map<std::string, std::unique_ptr<Form>> forms_;
};

// One for the process: a stub is a pure function of the instruction's bytes, whoever runs it.
StubCache& stub_cache();

}  // namespace lodge::kvm::soft::simd
