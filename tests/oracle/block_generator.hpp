// Invents blocks of 1 to 64 instructions and states to run them with. Instructions come from a pool of
// encodings that Generator has found; their register and memory operands are then chosen anew: some registers
// hold addresses in the window (near the ends of its pages more often than not), some small indices, the rest
// data. R10, R11 and RSP, which translated code has no host registers for, are chosen more often than others.
// Between them: stack runs, calls, jumps, counted loops and stores into the block itself.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "generator.hpp"

namespace lodge::oracle {

constexpr uint64_t arithmetic_flags = 0x8d5;  // CF, PF, AF, ZF, SF, OF

struct Block {
  struct Part {
    uint16_t offset = 0, length = 0;
    Instruction decoded;
    uint64_t live = 0;  // arithmetic flags that count, should it fault
  };
  Case program;             // without a state, but for RIP
  std::vector<Part> parts;  // in order
  bool changes_itself = false, integer_only = false;
};

class BlockGenerator {
 public:
  BlockGenerator(uint64_t seed, bool bits32);

  void next(Block& block);
  // Another state for the block that next() has made.
  void state(const Block& block, State& state);
  void fill_memory(std::array<uint8_t, window_size>& memory) { g_.fill_memory(memory); }
  size_t mnemonics() const { return mnemonics_; }

 private:
  static constexpr unsigned sp = 4;
  struct Encoding {
    std::array<uint8_t, 16> bytes{};
    Instruction decoded;
  };
  // What a register holds, as far as the generator knows.
  enum class Role : uint8_t { data, pointer, index, far_index };

  void fill_pool();
  bool wanted(const Instruction& instruction) const;
  void choose_roles();
  unsigned favourite();
  std::optional<unsigned> any(Role role);
  uint64_t address();

  void emit(Block& block);
  void emit_from_pool(Block& block);
  void emit_stack(Block& block);
  void emit_absolute(Block& block);
  void emit_control(Block& block);
  void emit_flow(Block& block);
  void add_counted(Block& block, unsigned kind, std::optional<unsigned> distance);
  unsigned changeable_flags(const Block& block);
  void emit_pointer(Block& block);
  void emit_patch(Block& block);
  bool retarget(const Encoding& from, Encoding& to, unsigned at);
  bool aim_operand(const Encoding& from, Encoding& to, unsigned at);
  bool fits_roles(const Instruction& instruction);
  void note_written(const Instruction& instruction);
  void define_flags(Block& block, const Instruction& instruction);
  // Appends one instruction; false when it is none.
  bool add(Block& block, std::initializer_list<unsigned> bytes);
  bool add(Block& block, const uint8_t* bytes, unsigned length);
  void find_live_flags(Block& block) const;

  Generator g_;
  const bool bits32_;
  std::vector<Encoding> common_, rest_;
  size_t mnemonics_ = 0;
  std::array<Role, 16> initial_{}, role_{};
  unsigned last_base_ = 0;
  unsigned counters_ = 0;
  struct Forward {  // a jump whose target is not there yet
    unsigned displacement, parts_left;
  };
  std::vector<Forward> forward_;
};

// Addresses, bytes and text of all instructions.
std::string describe(const Block& block);

}  // namespace lodge::oracle
