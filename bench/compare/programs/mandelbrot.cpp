// The Mandelbrot set in long double, which is x87: chains of additions and multiplications, and a compare for
// each step.
#include "program.hpp"

namespace {

uint64_t escape(long double x, long double y) {
  constexpr uint64_t limit = 200;
  long double re = 0, im = 0;
  for (uint64_t step = 0; step < limit; step++) {
    const long double re2 = re * re, im2 = im * im;
    if (re2 + im2 > 4) return step;
    im = 2 * re * im + y;
    re = re2 - im2 + x;
  }
  return limit;
}

}  // namespace

int main(int argc, char** argv) {
  return compare::measure("mandelbrot", argc, argv, [](uint64_t iterations) {
    constexpr int width = 96, height = 64;
    compare::Checksum sum;
    for (uint64_t i = 0; i < iterations; i++) {
      const long double shift = static_cast<long double>(i) / 1024;
      for (int row = 0; row < height; row++)
        for (int column = 0; column < width; column++)
          sum.add(escape(-2.2L + shift + 3.0L * column / width, -1.2L + 2.4L * row / height));
    }
    return sum.value();
  });
}
