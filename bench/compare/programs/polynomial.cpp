// Polynomials in long double by Horner's rule with a square root and a division for each point: x87 with
// loads of 80-bit numbers.
#include <array>
#include <cmath>

#include "program.hpp"

namespace {

constexpr size_t degree = 24;
std::array<long double, degree + 1> coefficients;

[[gnu::noinline]] long double value(long double x) {
  long double sum = 0;
  for (const long double coefficient : coefficients) sum = sum * x + coefficient;
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  compare::Random random;
  for (long double& coefficient : coefficients) coefficient = static_cast<long double>(random.unit()) - 0.5L;
  return compare::measure("polynomial", argc, argv, [](uint64_t iterations) {
    constexpr int points = 4096;
    compare::Checksum sum;
    while (iterations--) {
      long double total = 0;
      for (int point = 0; point < points; point++) {
        const long double x = (total + point) / (points + point), y = value(x);
        total = std::sqrt(total * total / 2 + y * y);
      }
      const double rounded = static_cast<double>(total);
      sum.add(std::bit_cast<uint64_t>(rounded));
    }
    return sum.value();
  });
}
