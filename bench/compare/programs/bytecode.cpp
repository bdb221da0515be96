// An interpreter of a register machine's bytecode that counts primes by trial division: an indirect jump for
// each instruction, as in the loops of scripting languages.
#include <array>

#include "program.hpp"

namespace {

enum class Op : uint8_t { load, copy, add, multiply, remainder, jump, jump_less, jump_zero, mix, halt };
struct Instruction {
  Op op;
  uint8_t target, a, b;
  int32_t immediate;
};

// Registers: 0 candidate, 1 divisor, 2 scratch, 3 limit, 4 primes, 5 the constant 1, 6 the constant 2, 7 the
// mix.
constexpr std::array program = {
    Instruction{Op::load, 0, 0, 0, 2},        // 0
    Instruction{Op::load, 4, 0, 0, 0},        // 1
    Instruction{Op::load, 5, 0, 0, 1},        // 2
    Instruction{Op::load, 6, 0, 0, 2},        // 3
    Instruction{Op::copy, 1, 6, 0, 0},        // 4: divisor = 2
    Instruction{Op::multiply, 2, 1, 1, 0},    // 5: while divisor * divisor <= candidate
    Instruction{Op::jump_less, 0, 0, 2, 10},  // 6
    Instruction{Op::remainder, 2, 0, 1, 0},   // 7
    Instruction{Op::jump_zero, 0, 2, 0, 12},  // 8: composite
    Instruction{Op::jump, 0, 0, 0, 15},       // 9
    Instruction{Op::add, 4, 4, 5, 0},         // 10: a prime
    Instruction{Op::mix, 7, 7, 0, 0},         // 11
    Instruction{Op::add, 0, 0, 5, 0},         // 12: the next candidate
    Instruction{Op::jump_less, 0, 0, 3, 4},   // 13
    Instruction{Op::halt, 0, 0, 0, 0},        // 14
    Instruction{Op::add, 1, 1, 5, 0},         // 15: the next divisor
    Instruction{Op::jump, 0, 0, 0, 5},        // 16
};

using Registers = std::array<int64_t, 8>;

// Not inlined, so that the program stays data to the compiler.
[[gnu::noinline]] void interpret(const Instruction* code, Registers& r) {
  for (const Instruction* at = code;; at++) {
    const Instruction& now = *at;
    switch (now.op) {
      case Op::load: r[now.target] = now.immediate; break;
      case Op::copy: r[now.target] = r[now.a]; break;
      case Op::add: r[now.target] = r[now.a] + r[now.b]; break;
      case Op::multiply: r[now.target] = r[now.a] * r[now.b]; break;
      case Op::remainder:
        r[now.target] = static_cast<uint32_t>(r[now.a]) % static_cast<uint32_t>(r[now.b]);
        break;
      case Op::jump: at = code + now.immediate - 1; break;
      case Op::jump_less:
        if (r[now.a] < r[now.b]) at = code + now.immediate - 1;
        break;
      case Op::jump_zero:
        if (r[now.a] == 0) at = code + now.immediate - 1;
        break;
      case Op::mix: r[now.target] = ((r[now.a] << 1) ^ r[now.b]) & 0xffffffffff; break;
      case Op::halt: return;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return compare::measure("bytecode", argc, argv, [](uint64_t iterations) {
    compare::Checksum sum;
    for (uint64_t i = 0; i < iterations; i++) {
      Registers registers{};
      registers[3] = 10000 + static_cast<int64_t>(i);  // the limit
      interpret(program.data(), registers);
      sum.add(static_cast<uint64_t>(registers[4]));
      sum.add(static_cast<uint64_t>(registers[7]));
    }
    return sum.value();
  });
}
