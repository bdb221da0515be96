// One instruction, or a block of them, to be executed twice, and what came of it.
//
// Both sides see the same addresses: two pages of code with one of loop counters behind them, and a window of
// three pages, of which the first two are writable and the third is read-only; nothing is mapped around them.
// All lies below 2 GiB, so that every form of address reaches it.
#pragma once

#include <array>
#include <cstdint>

namespace lodge::oracle {

inline constexpr uint64_t page = 4096;
inline constexpr uint64_t window_base = 0x5000'0000, window_writable = 2 * page, window_size = 3 * page;
inline constexpr uint64_t code_base = 0x5100'0000, code_rip = code_base + 0x800;
inline constexpr uint64_t code_size = 2 * page, counter_base = code_base + code_size;
inline constexpr unsigned code_room = 1024;  // bytes of one case
inline constexpr uint32_t loop_count = 0x3;  // what every counter holds at first
// Linux's user segments.
inline constexpr uint16_t selector_code64 = 0x33, selector_code32 = 0x23, selector_data = 0x2b;
inline constexpr unsigned xsave_size = 2752;  // the x87, SSE, AVX and AVX-512 components of known hosts

struct State {
  std::array<uint64_t, 16> gpr{};  // by encoding number
  uint64_t rip = 0, rflags = 0;
  alignas(64) std::array<uint8_t, xsave_size> xsave{};  // standard format of the host
};

struct Outcome {
  State state;
  int32_t exception = -1;  // vector, or -1
  uint64_t error = 0, cr2 = 0;
  std::array<uint8_t, window_size> memory{};
};

struct Case {
  std::array<uint8_t, code_room> code{};
  uint16_t length = 0;
  bool bits32 = false;  // in compatibility mode: the upper halves of registers, and R8-R15, count for nothing
  bool whole = false;   // run to an INT3 instead of single-stepping: repeated strings, blocks
  State state;
};

}  // namespace lodge::oracle
