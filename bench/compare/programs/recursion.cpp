// Takeuchi's function: little but calls and returns.
#include "program.hpp"

namespace {

// Not inlined into its caller, so that the arguments are not constants.
[[gnu::noinline]] int tak(int x, int y, int z) {
  return y < x ? tak(tak(x - 1, y, z), tak(y - 1, z, x), tak(z - 1, x, y)) : z;
}

}  // namespace

int main(int argc, char** argv) {
  return compare::measure("recursion", argc, argv, [](uint64_t iterations) {
    compare::Checksum sum;
    for (uint64_t i = 0; i < iterations; i++) sum.add(static_cast<uint64_t>(tak(18, 12, 6 + (i & 1))));
    return sum.value();
  });
}
