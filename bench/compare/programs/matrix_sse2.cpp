// Product of double matrices in SSE2.
#include <emmintrin.h>

#include "matrix.hpp"

namespace {

using compare::Matrix, compare::matrix_size;

// Eight columns of a row of c stay in four registers while k runs.
void product(const Matrix& a, const Matrix& b, Matrix& c) {
  constexpr size_t lanes = 2, columns = 4 * lanes;
  for (size_t row = 0; row < matrix_size; row++) {
    for (size_t column = 0; column < matrix_size; column += columns) {
      __m128d s0 = _mm_setzero_pd(), s1 = s0, s2 = s0, s3 = s0;
      for (size_t k = 0; k < matrix_size; k++) {
        const __m128d factor = _mm_set1_pd(a[row * matrix_size + k]);
        const double* from = &b[k * matrix_size + column];
        s0 = _mm_add_pd(s0, _mm_mul_pd(factor, _mm_load_pd(from)));
        s1 = _mm_add_pd(s1, _mm_mul_pd(factor, _mm_load_pd(from + lanes)));
        s2 = _mm_add_pd(s2, _mm_mul_pd(factor, _mm_load_pd(from + 2 * lanes)));
        s3 = _mm_add_pd(s3, _mm_mul_pd(factor, _mm_load_pd(from + 3 * lanes)));
      }
      double* to = &c[row * matrix_size + column];
      _mm_store_pd(to, s0);
      _mm_store_pd(to + lanes, s1);
      _mm_store_pd(to + 2 * lanes, s2);
      _mm_store_pd(to + 3 * lanes, s3);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return compare::measure_matrix("matrix-sse2", argc, argv, product);
}
