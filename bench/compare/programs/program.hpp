// What the programs of bench/compare share: `PROGRAM ITERATIONS` does a fixed amount of work, times it by
// CLOCK_MONOTONIC and prints "name iterations seconds checksum". The checksum depends on every result, so the
// compiler cannot drop work and a machine that computes something else is found out.
#pragma once

#include <time.h>

#include <bit>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>

namespace compare {

inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

[[noreturn]] inline void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

// FNV-1a over 64-bit words.
class Checksum {
 public:
  void add(uint64_t word) { value_ = (value_ ^ word) * 0x100000001b3; }
  void add(std::span<const double> values) {
    for (const double value : values) add(std::bit_cast<uint64_t>(value));
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

// xorshift64*: the same numbers everywhere.
class Random {
 public:
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d;
  }
  uint64_t below(uint64_t bound) { return (next() >> 32) * bound >> 32; }  // bound < 2^32
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15;
};

// `body(iterations)` returns the checksum; what is prepared before the call is not timed.
template <typename Body>
int measure(const char* name, int argc, char** argv, Body body) {
  const uint64_t iterations = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  if (iterations == 0) {
    std::fprintf(stderr, "usage: %s ITERATIONS\n", argv[0]);
    return 2;
  }
  const double start = now();
  const uint64_t checksum = body(iterations);
  const double seconds = now() - start;
  std::printf("%s %" PRIu64 " %.9f %016" PRIx64 "\n", name, iterations, seconds, checksum);
  return 0;
}

}  // namespace compare
