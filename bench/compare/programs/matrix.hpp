// A matrix product in registers' worth of vectors: c = a * b by rows of c, accumulated over k. `Vector` gives
// the instruction set: load, store, broadcast, and `multiply_add(a, b, c)`.
#pragma once

#include <array>

#include "program.hpp"

namespace compare {

constexpr size_t matrix_size = 128;
using Matrix = std::array<double, matrix_size * matrix_size>;

inline void fill(Matrix& matrix, Random& random) {
  for (double& value : matrix) value = random.unit() - 0.5;
}

// The next input from the last result, kept in range, so that iterations depend on each other.
inline void feed_back(Matrix& to, const Matrix& from) {
  for (size_t i = 0; i < to.size(); i += 97) to[i] = from[i] * 0x1p-6;
}

template <typename Product>
int measure_matrix(const char* name, int argc, char** argv, Product product) {
  alignas(64) static Matrix a, b, c;
  Random random;
  fill(a, random);
  fill(b, random);
  return measure(name, argc, argv, [&](uint64_t iterations) {
    while (iterations--) {
      product(a, b, c);
      feed_back(a, c);
    }
    Checksum sum;
    sum.add(c);
    return sum.value();
  });
}

}  // namespace compare
