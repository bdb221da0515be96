// Product of double matrices in AVX2 with fused multiply-add (every processor with AVX2 has it).
#include <immintrin.h>

#include "matrix.hpp"

namespace {

using compare::Matrix, compare::matrix_size;

// Sixteen columns of a row of c stay in four registers while k runs.
[[gnu::target("avx2,fma")]] void product(const Matrix& a, const Matrix& b, Matrix& c) {
  constexpr size_t lanes = 4, columns = 4 * lanes;
  for (size_t row = 0; row < matrix_size; row++) {
    for (size_t column = 0; column < matrix_size; column += columns) {
      __m256d s0 = _mm256_setzero_pd(), s1 = s0, s2 = s0, s3 = s0;
      for (size_t k = 0; k < matrix_size; k++) {
        const __m256d factor = _mm256_broadcast_sd(&a[row * matrix_size + k]);
        const double* from = &b[k * matrix_size + column];
        s0 = _mm256_fmadd_pd(factor, _mm256_load_pd(from), s0);
        s1 = _mm256_fmadd_pd(factor, _mm256_load_pd(from + lanes), s1);
        s2 = _mm256_fmadd_pd(factor, _mm256_load_pd(from + 2 * lanes), s2);
        s3 = _mm256_fmadd_pd(factor, _mm256_load_pd(from + 3 * lanes), s3);
      }
      double* to = &c[row * matrix_size + column];
      _mm256_store_pd(to, s0);
      _mm256_store_pd(to + lanes, s1);
      _mm256_store_pd(to + 2 * lanes, s2);
      _mm256_store_pd(to + 3 * lanes, s3);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::fprintf(stderr, "this processor has no AVX2 or no FMA\n");
    return 3;
  }
  return compare::measure_matrix("matrix-avx2", argc, argv, product);
}
