#include "kvm/soft/interpret/vector/host.hpp"

#include <cpuid.h>
#include <immintrin.h>

#include <initializer_list>

namespace lodge::kvm::soft::simd {
namespace {

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Leaf r;
  if (leaf > static_cast<uint32_t>(__get_cpuid_max(leaf & 0x8000'0000, nullptr))) return {};
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

uint64_t host_xcr0() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool bit(uint32_t word, unsigned n) {
  return (word >> n & 1) != 0;
}

}  // namespace

Host::Host() {
  const Leaf one = cpuid(1), seven = cpuid(7), seven1 = cpuid(7, 1), ext = cpuid(0x8000'0001);
  bmi2 = (seven.ebx >> 8 & 1) != 0;
  const uint64_t xcr0 = bit(one.ecx, 27) ? host_xcr0() : 3;
  avx = bit(one.ecx, 28) && (xcr0 & component::avx_bits) == component::avx_bits;
  const bool f512 = bit(seven.ebx, 16) && (xcr0 & component::avx512_bits) == component::avx512_bits;
  // Every processor with a user for them has the four together; those without (Knights) run as AVX2 hosts.
  avx512 = avx && f512 && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);

  alignas(64) std::array<uint8_t, 512> image{};
  asm volatile("fxsave64 %0" : "=m"(image));
  const Leaf zero = cpuid(0);
  constexpr uint32_t authentic_amd = 0x6874'7541, hygon_genuine = 0x6f67'7948;  // EBX of leaf 0
  sha_unaligned = hides_x87_pointers = zero.ebx == authentic_amd || zero.ebx == hygon_genuine;
  uint32_t mask = 0;
  __builtin_memcpy(&mask, &image[28], 4);
  if (mask != 0) mxcsr_mask = mask;

  const auto allow = [&](bool on, std::initializer_list<ZydisISASet> sets) {
    if (!on) return;
    for (const ZydisISASet set : sets) runs.set(set);
  };
  allow(true, {ZYDIS_ISA_SET_X87, ZYDIS_ISA_SET_PPRO, ZYDIS_ISA_SET_FCMOV, ZYDIS_ISA_SET_PENTIUMMMX,
               ZYDIS_ISA_SET_SSE, ZYDIS_ISA_SET_SSE2, ZYDIS_ISA_SET_SSE2MMX, ZYDIS_ISA_SET_SSEMXCSR,
               ZYDIS_ISA_SET_FXSAVE, ZYDIS_ISA_SET_FXSAVE64});
  allow(bit(one.ecx, 0), {ZYDIS_ISA_SET_SSE3, ZYDIS_ISA_SET_SSE3X87});
  allow(bit(one.ecx, 9), {ZYDIS_ISA_SET_SSSE3, ZYDIS_ISA_SET_SSSE3MMX});
  allow(bit(one.ecx, 19), {ZYDIS_ISA_SET_SSE4});
  allow(bit(one.ecx, 20), {ZYDIS_ISA_SET_SSE42});
  allow(bit(ext.ecx, 6), {ZYDIS_ISA_SET_SSE4A});
  allow(bit(one.ecx, 25), {ZYDIS_ISA_SET_AES});
  allow(bit(one.ecx, 1), {ZYDIS_ISA_SET_PCLMULQDQ});
  allow(bit(seven.ebx, 29), {ZYDIS_ISA_SET_SHA});
  allow(bit(seven.ecx, 8), {ZYDIS_ISA_SET_GFNI});
  // The XSAVE family is done by hand: it needs nothing of the host.
  allow(true, {ZYDIS_ISA_SET_XSAVE, ZYDIS_ISA_SET_XSAVEOPT, ZYDIS_ISA_SET_XSAVEC, ZYDIS_ISA_SET_XSAVES});

  allow(avx, {ZYDIS_ISA_SET_AVX});
  allow(avx && bit(seven.ebx, 5), {ZYDIS_ISA_SET_AVX2, ZYDIS_ISA_SET_AVX2GATHER});
  allow(avx && bit(one.ecx, 12), {ZYDIS_ISA_SET_FMA});
  allow(avx && bit(ext.ecx, 16), {ZYDIS_ISA_SET_FMA4});
  allow(avx && bit(one.ecx, 29), {ZYDIS_ISA_SET_F16C});
  allow(avx && bit(one.ecx, 25), {ZYDIS_ISA_SET_AVXAES});
  allow(avx && bit(seven.ecx, 8), {ZYDIS_ISA_SET_AVX_GFNI});
  allow(avx && bit(seven.ecx, 9), {ZYDIS_ISA_SET_VAES});
  allow(avx && bit(seven.ecx, 10), {ZYDIS_ISA_SET_VPCLMULQDQ});
  allow(avx && bit(seven1.eax, 4), {ZYDIS_ISA_SET_AVX_VNNI});

  allow(avx512, {ZYDIS_ISA_SET_AVX512F_128, ZYDIS_ISA_SET_AVX512F_128N, ZYDIS_ISA_SET_AVX512F_256,
                 ZYDIS_ISA_SET_AVX512F_512, ZYDIS_ISA_SET_AVX512F_KOP, ZYDIS_ISA_SET_AVX512F_SCALAR});
  allow(avx512, {ZYDIS_ISA_SET_AVX512BW_128, ZYDIS_ISA_SET_AVX512BW_128N, ZYDIS_ISA_SET_AVX512BW_256,
                 ZYDIS_ISA_SET_AVX512BW_512, ZYDIS_ISA_SET_AVX512BW_KOP});
  allow(avx512, {ZYDIS_ISA_SET_AVX512DQ_128, ZYDIS_ISA_SET_AVX512DQ_128N, ZYDIS_ISA_SET_AVX512DQ_256,
                 ZYDIS_ISA_SET_AVX512DQ_512, ZYDIS_ISA_SET_AVX512DQ_KOP, ZYDIS_ISA_SET_AVX512DQ_SCALAR});
  allow(avx512 && bit(seven.ebx, 28),
        {ZYDIS_ISA_SET_AVX512CD_128, ZYDIS_ISA_SET_AVX512CD_256, ZYDIS_ISA_SET_AVX512CD_512});
  allow(avx512 && bit(seven.ebx, 21),
        {ZYDIS_ISA_SET_AVX512_IFMA_128, ZYDIS_ISA_SET_AVX512_IFMA_256, ZYDIS_ISA_SET_AVX512_IFMA_512});
  allow(avx512 && bit(seven.ecx, 1),
        {ZYDIS_ISA_SET_AVX512_VBMI_128, ZYDIS_ISA_SET_AVX512_VBMI_256, ZYDIS_ISA_SET_AVX512_VBMI_512});
  allow(avx512 && bit(seven.ecx, 6),
        {ZYDIS_ISA_SET_AVX512_VBMI2_128, ZYDIS_ISA_SET_AVX512_VBMI2_256, ZYDIS_ISA_SET_AVX512_VBMI2_512});
  allow(avx512 && bit(seven.ecx, 8),
        {ZYDIS_ISA_SET_AVX512_GFNI_128, ZYDIS_ISA_SET_AVX512_GFNI_256, ZYDIS_ISA_SET_AVX512_GFNI_512});
  allow(avx512 && bit(seven.ecx, 9),
        {ZYDIS_ISA_SET_AVX512_VAES_128, ZYDIS_ISA_SET_AVX512_VAES_256, ZYDIS_ISA_SET_AVX512_VAES_512});
  allow(avx512 && bit(seven.ecx, 10),
        {ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_128, ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_256,
         ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_512});
  allow(avx512 && bit(seven.ecx, 11),
        {ZYDIS_ISA_SET_AVX512_VNNI_128, ZYDIS_ISA_SET_AVX512_VNNI_256, ZYDIS_ISA_SET_AVX512_VNNI_512});
  allow(avx512 && bit(seven.ecx, 12),
        {ZYDIS_ISA_SET_AVX512_BITALG_128, ZYDIS_ISA_SET_AVX512_BITALG_256, ZYDIS_ISA_SET_AVX512_BITALG_512});
  allow(avx512 && bit(seven.ecx, 14), {ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_128, ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_256,
                                       ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_512});
  allow(avx512 && bit(seven1.eax, 5),
        {ZYDIS_ISA_SET_AVX512_BF16_128, ZYDIS_ISA_SET_AVX512_BF16_256, ZYDIS_ISA_SET_AVX512_BF16_512});
  allow(avx512 && bit(seven.edx, 8),
        {ZYDIS_ISA_SET_AVX512_VP2INTERSECT_128, ZYDIS_ISA_SET_AVX512_VP2INTERSECT_256,
         ZYDIS_ISA_SET_AVX512_VP2INTERSECT_512});

  components = xcr0 & (avx512 ? 0x2e7 : avx ? 0x207 : 3);
  offset[component::sse] = 160;
  size[component::x87] = 160;
  size[component::sse] = 256;
  for (unsigned i = 2; i < component::count; ++i) {
    if ((components >> i & 1) == 0) continue;
    const Leaf leaf = cpuid(0xd, i);
    size[i] = leaf.eax;
    offset[i] = leaf.ebx;
    aligned[i] = bit(leaf.ecx, 1);
  }
}

const Host& host() noexcept {
  static const Host instance;
  return instance;
}

}  // namespace lodge::kvm::soft::simd
