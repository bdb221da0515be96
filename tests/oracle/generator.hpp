// Invents instructions and states. Encodings are random bytes steered into every opcode map and accepted by
// Zydis; registers that form addresses are then set so that memory operands lie in the window, or beside it
// for a fault, by construction.
#pragma once

#include <Zydis/Zydis.h>

#include <cstdint>
#include <random>
#include <span>
#include <unordered_map>

#include "case.hpp"
#include "kvm/soft/cpu/features.hpp"

namespace lodge::oracle {

enum class Domain : uint8_t { all, integer, vector, x87 };

struct Instruction {
  ZydisDecodedInstruction insn;
  std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands;
};

class Generator {
 public:
  Generator(uint64_t seed, Domain domain, bool bits32);

  // The next case and its decoded form.
  void next(Case& c, Instruction& instruction);
  // Memory for a batch of cases.
  void fill_memory(std::array<uint8_t, window_size>& memory);
  size_t mnemonics() const { return counts_.size(); }

  // --- for blocks: the parts of next() ---
  // Tries one encoding; one that is kept is to be counted.
  bool invent(Case& c, Instruction& instruction);
  void count(const Instruction& instruction);
  // Whether the bytes are an instruction that may run in the child.
  bool decode(std::span<const uint8_t> bytes, Instruction& instruction) const;
  void invent_state(State& state);
  uint64_t random() { return engine_(); }
  uint64_t below(uint64_t n) { return engine_() % n; }
  bool chance(unsigned percent) { return engine_() % 100 < percent; }
  uint64_t interesting();

 private:
  void invent_bytes(Case& c);
  bool acceptable(const Instruction& instruction) const;
  bool known_to_processor(const Instruction& instruction) const;
  void random_registers(State& state);
  void random_vectors(State& state);
  bool place_operand(Case& c, const Instruction& instruction);
  void place_implicit(Case& c, const Instruction& instruction);
  bool aim(Case& c, const Instruction& instruction, const ZydisDecodedOperand& operand);
  uint64_t target(unsigned size, unsigned alignment);

  std::mt19937_64 engine_;
  Domain domain_;
  bool bits32_;
  ZydisDecoder decoder_;
  kvm::soft::Features features_;
  std::unordered_map<uint32_t, uint32_t> counts_;  // by mnemonic
  uint64_t total_ = 0;
};

}  // namespace lodge::oracle
