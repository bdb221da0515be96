#include "kvm/soft/interpret/gate.hpp"

#include "kvm/soft/cpu/cpuid_bits.hpp"

namespace lodge::kvm::soft {
namespace {

bool all(uint32_t word, uint32_t bits) noexcept {
  return (word & bits) == bits;
}

// AVX-512 sets: the name's own bit, F, and VL for the 128- and 256-bit forms.
bool avx512(const Features& f, bool own, const ZydisDecodedInstruction& insn) noexcept {
  const bool foundation = all(f.leaf7_ebx, cpuid7_ebx::avx512f);
  // Scalar forms and opmask instructions carry no vector length.
  bool narrow = insn.avx.vector_length == 128 || insn.avx.vector_length == 256;
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_AVX512BW_128N:
    case ZYDIS_ISA_SET_AVX512DQ_128N:
    case ZYDIS_ISA_SET_AVX512F_128N:
    case ZYDIS_ISA_SET_AVX512_FP16_128N:
    case ZYDIS_ISA_SET_AVX512DQ_SCALAR:
    case ZYDIS_ISA_SET_AVX512F_SCALAR:
    case ZYDIS_ISA_SET_AVX512_FP16_SCALAR:
    case ZYDIS_ISA_SET_AVX512BW_KOP:
    case ZYDIS_ISA_SET_AVX512DQ_KOP:
    case ZYDIS_ISA_SET_AVX512F_KOP: narrow = false; break;
    default: break;
  }
  return foundation && own && (!narrow || all(f.leaf7_ebx, cpuid7_ebx::avx512vl));
}

bool in_avx512(const Features& f, const ZydisDecodedInstruction& insn) noexcept {
  const auto ebx = [&](uint32_t bit) { return avx512(f, all(f.leaf7_ebx, bit), insn); };
  const auto ecx = [&](uint32_t bit) { return avx512(f, all(f.leaf7_ecx, bit), insn); };
  const auto edx = [&](uint32_t bit) { return avx512(f, all(f.leaf7_edx, bit), insn); };
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_AVX512F_128:
    case ZYDIS_ISA_SET_AVX512F_128N:
    case ZYDIS_ISA_SET_AVX512F_256:
    case ZYDIS_ISA_SET_AVX512F_512:
    case ZYDIS_ISA_SET_AVX512F_KOP:
    case ZYDIS_ISA_SET_AVX512F_SCALAR: return ebx(cpuid7_ebx::avx512f);
    case ZYDIS_ISA_SET_AVX512BW_128:
    case ZYDIS_ISA_SET_AVX512BW_128N:
    case ZYDIS_ISA_SET_AVX512BW_256:
    case ZYDIS_ISA_SET_AVX512BW_512:
    case ZYDIS_ISA_SET_AVX512BW_KOP: return ebx(cpuid7_ebx::avx512bw);
    case ZYDIS_ISA_SET_AVX512CD_128:
    case ZYDIS_ISA_SET_AVX512CD_256:
    case ZYDIS_ISA_SET_AVX512CD_512: return ebx(cpuid7_ebx::avx512cd);
    case ZYDIS_ISA_SET_AVX512DQ_128:
    case ZYDIS_ISA_SET_AVX512DQ_128N:
    case ZYDIS_ISA_SET_AVX512DQ_256:
    case ZYDIS_ISA_SET_AVX512DQ_512:
    case ZYDIS_ISA_SET_AVX512DQ_KOP:
    case ZYDIS_ISA_SET_AVX512DQ_SCALAR: return ebx(cpuid7_ebx::avx512dq);
    case ZYDIS_ISA_SET_AVX512_IFMA_128:
    case ZYDIS_ISA_SET_AVX512_IFMA_256:
    case ZYDIS_ISA_SET_AVX512_IFMA_512: return ebx(cpuid7_ebx::avx512ifma);
    case ZYDIS_ISA_SET_AVX512_VBMI_128:
    case ZYDIS_ISA_SET_AVX512_VBMI_256:
    case ZYDIS_ISA_SET_AVX512_VBMI_512: return ecx(cpuid7_ecx::avx512vbmi);
    case ZYDIS_ISA_SET_AVX512_VBMI2_128:
    case ZYDIS_ISA_SET_AVX512_VBMI2_256:
    case ZYDIS_ISA_SET_AVX512_VBMI2_512: return ecx(cpuid7_ecx::avx512vbmi2);
    case ZYDIS_ISA_SET_AVX512_BITALG_128:
    case ZYDIS_ISA_SET_AVX512_BITALG_256:
    case ZYDIS_ISA_SET_AVX512_BITALG_512: return ecx(cpuid7_ecx::avx512bitalg);
    case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_128:
    case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_256:
    case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_512: return ecx(cpuid7_ecx::avx512vpopcntdq);
    case ZYDIS_ISA_SET_AVX512_VNNI_128:
    case ZYDIS_ISA_SET_AVX512_VNNI_256:
    case ZYDIS_ISA_SET_AVX512_VNNI_512: return ecx(cpuid7_ecx::avx512vnni);
    case ZYDIS_ISA_SET_AVX512_GFNI_128:
    case ZYDIS_ISA_SET_AVX512_GFNI_256:
    case ZYDIS_ISA_SET_AVX512_GFNI_512: return ecx(cpuid7_ecx::gfni);
    case ZYDIS_ISA_SET_AVX512_VAES_128:
    case ZYDIS_ISA_SET_AVX512_VAES_256:
    case ZYDIS_ISA_SET_AVX512_VAES_512: return ecx(cpuid7_ecx::vaes);
    case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_128:
    case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_256:
    case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_512: return ecx(cpuid7_ecx::vpclmulqdq);
    case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_128:
    case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_256:
    case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_512: return edx(cpuid7_edx::avx512vp2intersect);
    case ZYDIS_ISA_SET_AVX512_FP16_128:
    case ZYDIS_ISA_SET_AVX512_FP16_128N:
    case ZYDIS_ISA_SET_AVX512_FP16_256:
    case ZYDIS_ISA_SET_AVX512_FP16_512:
    case ZYDIS_ISA_SET_AVX512_FP16_SCALAR: return edx(cpuid7_edx::avx512fp16);
    case ZYDIS_ISA_SET_AVX512_BF16_128:
    case ZYDIS_ISA_SET_AVX512_BF16_256:
    case ZYDIS_ISA_SET_AVX512_BF16_512: return avx512(f, all(f.leaf7_1_eax, cpuid7_1_eax::avx512bf16), insn);
    default: return false;
  }
}

// SSE to AVX2.
bool in_vector(const Features& f, const ZydisDecodedInstruction& insn) noexcept {
  const bool avx = all(f.leaf1_ecx, cpuid1_ecx::avx);
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_PENTIUMMMX: return all(f.leaf1_edx, cpuid1_edx::mmx);
    case ZYDIS_ISA_SET_SSE:
    case ZYDIS_ISA_SET_SSEMXCSR: return all(f.leaf1_edx, cpuid1_edx::sse);
    case ZYDIS_ISA_SET_SSE2:
    case ZYDIS_ISA_SET_SSE2MMX: return all(f.leaf1_edx, cpuid1_edx::sse2);
    case ZYDIS_ISA_SET_SSE3:
    case ZYDIS_ISA_SET_SSE3X87: return all(f.leaf1_ecx, cpuid1_ecx::sse3);
    case ZYDIS_ISA_SET_SSSE3:
    case ZYDIS_ISA_SET_SSSE3MMX: return all(f.leaf1_ecx, cpuid1_ecx::ssse3);
    case ZYDIS_ISA_SET_SSE4: return all(f.leaf1_ecx, cpuid1_ecx::sse41);
    case ZYDIS_ISA_SET_SSE42: return all(f.leaf1_ecx, cpuid1_ecx::sse42);
    case ZYDIS_ISA_SET_SSE4A: return all(f.ext1_ecx, cpuid_ext_ecx::sse4a);
    case ZYDIS_ISA_SET_AES: return all(f.leaf1_ecx, cpuid1_ecx::aes);
    case ZYDIS_ISA_SET_PCLMULQDQ: return all(f.leaf1_ecx, cpuid1_ecx::pclmul);
    case ZYDIS_ISA_SET_SHA: return all(f.leaf7_ebx, cpuid7_ebx::sha);
    case ZYDIS_ISA_SET_GFNI: return all(f.leaf7_ecx, cpuid7_ecx::gfni);
    case ZYDIS_ISA_SET_AVX: return avx;
    case ZYDIS_ISA_SET_AVXAES:
      // VEX.256 forms are labelled VAES.
      return avx && all(f.leaf1_ecx, cpuid1_ecx::aes);
    case ZYDIS_ISA_SET_AVX2:
    case ZYDIS_ISA_SET_AVX2GATHER: return avx && all(f.leaf7_ebx, cpuid7_ebx::avx2);
    case ZYDIS_ISA_SET_FMA: return avx && all(f.leaf1_ecx, cpuid1_ecx::fma);
    case ZYDIS_ISA_SET_F16C: return avx && all(f.leaf1_ecx, cpuid1_ecx::f16c);
    case ZYDIS_ISA_SET_AVX_GFNI: return avx && all(f.leaf7_ecx, cpuid7_ecx::gfni);
    case ZYDIS_ISA_SET_AVX_VNNI: return avx && all(f.leaf7_1_eax, cpuid7_1_eax::avx_vnni);
    case ZYDIS_ISA_SET_VAES: return avx && all(f.leaf7_ecx, cpuid7_ecx::vaes);
    case ZYDIS_ISA_SET_VPCLMULQDQ: return avx && all(f.leaf7_ecx, cpuid7_ecx::vpclmulqdq);
    case ZYDIS_ISA_SET_FMA4: return avx && all(f.ext1_ecx, cpuid_ext_ecx::fma4);
    case ZYDIS_ISA_SET_XOP: return avx && all(f.ext1_ecx, cpuid_ext_ecx::xop);
    case ZYDIS_ISA_SET_AMD3DNOW: return all(f.ext1_edx, cpuid_ext_edx::ext_3dnow);
    default: return in_avx512(f, insn);
  }
}

// Instructions of sets that are hidden as a whole, but whose encodings are hint NOPs or have a use of their
// own without the feature.
bool without_feature(const ZydisDecodedInstruction& insn) noexcept {
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_ENDBR32:
    case ZYDIS_MNEMONIC_ENDBR64:
    case ZYDIS_MNEMONIC_RDSSPD:
    case ZYDIS_MNEMONIC_RDSSPQ:
    case ZYDIS_MNEMONIC_BNDCL:
    case ZYDIS_MNEMONIC_BNDCN:
    case ZYDIS_MNEMONIC_BNDCU:
    case ZYDIS_MNEMONIC_BNDLDX:
    case ZYDIS_MNEMONIC_BNDMK:
    case ZYDIS_MNEMONIC_BNDMOV:
    case ZYDIS_MNEMONIC_BNDSTX:
    case ZYDIS_MNEMONIC_VMCALL:
    case ZYDIS_MNEMONIC_VMMCALL: return true;
    default: return false;
  }
}

bool in_system(const Features& f, const ZydisDecodedInstruction& insn) noexcept {
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_AMD:
      // SYSCALL and SYSRET.
      return all(f.ext1_edx, cpuid_ext_edx::syscall);
    case ZYDIS_ISA_SET_CLDEMOTE:
    case ZYDIS_ISA_SET_PREFETCHWT1: return true;  // NOPs on every processor
    case ZYDIS_ISA_SET_CLFLUSHOPT: return all(f.leaf7_ebx, cpuid7_ebx::clflushopt);
    case ZYDIS_ISA_SET_CLFSH: return all(f.leaf1_edx, cpuid1_edx::clflush);
    case ZYDIS_ISA_SET_CLWB: return all(f.leaf7_ebx, cpuid7_ebx::clwb);
    case ZYDIS_ISA_SET_CLZERO: return all(f.ext8_ebx, cpuid_ext8_ebx::clzero);
    case ZYDIS_ISA_SET_INVPCID: return all(f.leaf7_ebx, cpuid7_ebx::invpcid);
    case ZYDIS_ISA_SET_MONITOR: return all(f.leaf1_ecx, cpuid1_ecx::monitor);
    case ZYDIS_ISA_SET_MONITORX: return all(f.ext1_ecx, cpuid_ext_ecx::monitorx);
    case ZYDIS_ISA_SET_PKU: return all(f.leaf7_ecx, cpuid7_ecx::pku);
    case ZYDIS_ISA_SET_RDPID: return all(f.leaf7_ecx, cpuid7_ecx::rdpid);
    case ZYDIS_ISA_SET_RDRAND: return all(f.leaf1_ecx, cpuid1_ecx::rdrand);
    case ZYDIS_ISA_SET_RDSEED: return all(f.leaf7_ebx, cpuid7_ebx::rdseed);
    case ZYDIS_ISA_SET_RDTSCP: return all(f.ext1_edx, cpuid_ext_edx::rdtscp);
    case ZYDIS_ISA_SET_RDWRFSGS: return all(f.leaf7_ebx, cpuid7_ebx::fsgsbase);
    case ZYDIS_ISA_SET_SERIALIZE: return all(f.leaf7_edx, cpuid7_edx::serialize);
    case ZYDIS_ISA_SET_SMAP: return all(f.leaf7_ebx, cpuid7_ebx::smap);
    case ZYDIS_ISA_SET_FXSAVE:
    case ZYDIS_ISA_SET_FXSAVE64: return all(f.leaf1_edx, cpuid1_edx::fxsr);
    case ZYDIS_ISA_SET_XSAVE: return all(f.leaf1_ecx, cpuid1_ecx::xsave);
    case ZYDIS_ISA_SET_XSAVEOPT: return all(f.leaf_d_1_eax, cpuid_d_1_eax::xsaveopt);
    case ZYDIS_ISA_SET_XSAVEC: return all(f.leaf_d_1_eax, cpuid_d_1_eax::xsavec);
    case ZYDIS_ISA_SET_XSAVES: return all(f.leaf_d_1_eax, cpuid_d_1_eax::xsaves);
    default: return without_feature(insn);
  }
}

}  // namespace

bool allowed_by_cpuid(const Features& f, const ZydisDecodedInstruction& insn) noexcept {
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_I86:
    case ZYDIS_ISA_SET_I186:
    case ZYDIS_ISA_SET_I286PROTECTED:
    case ZYDIS_ISA_SET_I286REAL:
    case ZYDIS_ISA_SET_I386:
    case ZYDIS_ISA_SET_I486:
    case ZYDIS_ISA_SET_I486REAL:
    case ZYDIS_ISA_SET_PENTIUMREAL:
    case ZYDIS_ISA_SET_PPRO:
    case ZYDIS_ISA_SET_FAT_NOP:
    case ZYDIS_ISA_SET_PAUSE:
    case ZYDIS_ISA_SET_PREFETCH_NOP:
    case ZYDIS_ISA_SET_SSE_PREFETCH:
    case ZYDIS_ISA_SET_RDPMC:
    case ZYDIS_ISA_SET_LONGMODE: return true;
    case ZYDIS_ISA_SET_X87: return all(f.leaf1_edx, cpuid1_edx::fpu);
    case ZYDIS_ISA_SET_CMOV: return all(f.leaf1_edx, cpuid1_edx::cmov);
    case ZYDIS_ISA_SET_FCMOV: return all(f.leaf1_edx, cpuid1_edx::cmov | cpuid1_edx::fpu);
    case ZYDIS_ISA_SET_CMPXCHG16B: return all(f.leaf1_ecx, cpuid1_ecx::cx16);
    case ZYDIS_ISA_SET_LAHF:
      // In 64-bit mode only; older modes always have it.
      return insn.machine_mode != ZYDIS_MACHINE_MODE_LONG_64 || all(f.ext1_ecx, cpuid_ext_ecx::lahf);
    case ZYDIS_ISA_SET_ADOX_ADCX: return all(f.leaf7_ebx, cpuid7_ebx::adx);
    case ZYDIS_ISA_SET_BMI1: return all(f.leaf7_ebx, cpuid7_ebx::bmi1);
    case ZYDIS_ISA_SET_BMI2: return all(f.leaf7_ebx, cpuid7_ebx::bmi2);
    case ZYDIS_ISA_SET_TBM: return all(f.ext1_ecx, cpuid_ext_ecx::tbm);
    case ZYDIS_ISA_SET_LZCNT: return all(f.ext1_ecx, cpuid_ext_ecx::lzcnt);
    case ZYDIS_ISA_SET_MOVBE: return all(f.leaf1_ecx, cpuid1_ecx::movbe);
    case ZYDIS_ISA_SET_POPCNT: return all(f.leaf1_ecx, cpuid1_ecx::popcnt);
    case ZYDIS_ISA_SET_MOVDIR:
      return all(f.leaf7_ecx,
                 insn.mnemonic == ZYDIS_MNEMONIC_MOVDIRI ? cpuid7_ecx::movdiri : cpuid7_ecx::movdir64b);
    default: return in_system(f, insn) || in_vector(f, insn);
  }
}

}  // namespace lodge::kvm::soft
