// Fast Fourier transform of 4096 complex doubles and back in SSE2 (radix 2, one complex number a register).
// The roots of unity come from half-angle formulas, because a C library's sine may differ in the last bit
// between processors.
#include <emmintrin.h>

#include <array>
#include <cmath>
#include <utility>

#include "program.hpp"

namespace {

constexpr size_t bits = 12, size = 1 << bits;
struct alignas(16) Complex {
  double re, im;
};
using Signal = std::array<Complex, size>;

Complex times(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

Signal signal_;
std::array<Complex, size / 2> roots;  // e^(-2 pi i k / size)

void make_roots() {
  std::array<Complex, bits> half;  // e^(-2 pi i / 2^(n + 1)): -1, -i, ...
  half[0] = {-1, 0};
  half[1] = {0, -1};
  for (size_t n = 2; n < bits; n++)
    half[n] = {std::sqrt((1 + half[n - 1].re) / 2), -std::sqrt((1 - half[n - 1].re) / 2)};
  for (size_t k = 0; k < roots.size(); k++) {
    roots[k] = {1, 0};
    for (size_t n = 0; n < bits; n++)
      if (k >> (bits - 1 - n) & 1) roots[k] = times(roots[k], half[n]);
  }
}

// a * b of packed complex numbers: (a.re b.re - a.im b.im, a.re b.im + a.im b.re).
__m128d times(__m128d a, __m128d b) {
  const __m128d sign = _mm_set_pd(0.0, -0.0);
  const __m128d re = _mm_unpacklo_pd(a, a), im = _mm_unpackhi_pd(a, a), swapped = _mm_shuffle_pd(b, b, 1);
  return _mm_add_pd(_mm_mul_pd(re, b), _mm_xor_pd(_mm_mul_pd(im, swapped), sign));
}

void transform(Signal& x) {
  for (size_t i = 0, j = 0; i < size; i++) {  // into the order of reversed bits
    if (i < j) std::swap(x[i], x[j]);
    for (size_t bit = size >> 1; bit && ((j ^= bit) & bit) == 0; bit >>= 1) {
    }
  }
  for (size_t half = 1; half < size; half *= 2) {
    const size_t stride = size / (2 * half);
    for (size_t first = 0; first < size; first += 2 * half) {
      for (size_t k = 0; k < half; k++) {
        Complex &low = x[first + k], &high = x[first + k + half];
        const __m128d a = _mm_load_pd(&low.re),
                      b = times(_mm_load_pd(&roots[k * stride].re), _mm_load_pd(&high.re));
        _mm_store_pd(&low.re, _mm_add_pd(a, b));
        _mm_store_pd(&high.re, _mm_sub_pd(a, b));
      }
    }
  }
}

// The inverse by way of the transform: conjugate, transform, conjugate and scale.
void conjugate(Signal& x, double scale) {
  const __m128d factor = _mm_set_pd(-scale, scale);
  for (Complex& value : x) _mm_store_pd(&value.re, _mm_mul_pd(_mm_load_pd(&value.re), factor));
}

}  // namespace

int main(int argc, char** argv) {
  make_roots();
  compare::Random random;
  for (Complex& value : signal_) value = {random.unit() - 0.5, random.unit() - 0.5};
  const Signal original = signal_;
  return compare::measure("fft", argc, argv, [&](uint64_t iterations) {
    compare::Checksum sum;
    while (iterations--) {
      transform(signal_);
      sum.add(std::bit_cast<uint64_t>(signal_[size / 3].re));
      conjugate(signal_, 1);
      transform(signal_);
      conjugate(signal_, 1.0 / size);
    }
    for (size_t i = 0; i < size; i++) {
      sum.add(std::bit_cast<uint64_t>(signal_[i].im));
      if (std::abs(signal_[i].re - original[i].re) > 1e-9) std::abort();
    }
    return sum.value();
  });
}
