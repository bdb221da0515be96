// The CPUID of soft. Absent on purpose, because the interpreter has no such thing: VMX and SVM, performance
// counters, machine-check banks, MONITOR (KVM hides it as well), TSX, MPX, CET, AMX, protection keys, SGX,
// processor trace, 5-level paging, 3DNow!, SSE4A, XOP, FMA4, TBM.
#include "kvm/soft/cpu/cpuid.hpp"

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>

#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/cpu/run_delay.hpp"

namespace lodge::kvm::soft {
namespace {

using Result = Features::Result;

Result native(uint32_t leaf, uint32_t subleaf = 0) {
  Result out;
  __cpuid_count(leaf, subleaf, out.eax, out.ebx, out.ecx, out.edx);
  return out;
}

constexpr uint64_t offered_components = 0xe7;  // x87, SSE, AVX and the three of AVX-512

uint64_t host_components() {
  const Result leaf1 = native(1);
  if ((leaf1.ecx & cpuid1_ecx::xsave) == 0 || (leaf1.ecx & cpuid1_ecx::osxsave) == 0) return 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  uint64_t components = (uint64_t{high} << 32 | low) & offered_components;
  if ((components & 0xe0) != 0xe0) components &= 7;
  return components;
}

// Features that the interpreter runs natively, or implements and needs nothing of the host for.
namespace offer {
constexpr uint32_t leaf1_ecx_native =
    cpuid1_ecx::sse3 | cpuid1_ecx::pclmul | cpuid1_ecx::ssse3 | cpuid1_ecx::fma | cpuid1_ecx::cx16 |
    cpuid1_ecx::sse41 | cpuid1_ecx::sse42 | cpuid1_ecx::movbe | cpuid1_ecx::popcnt | cpuid1_ecx::aes |
    cpuid1_ecx::xsave | cpuid1_ecx::avx | cpuid1_ecx::f16c | cpuid1_ecx::rdrand;
constexpr uint32_t leaf1_ecx_always =
    cpuid1_ecx::pcid | cpuid1_ecx::x2apic | cpuid1_ecx::tsc_deadline | cpuid1_ecx::hypervisor;
constexpr uint32_t leaf1_edx_native = cpuid1_edx::cmov | cpuid1_edx::mmx | cpuid1_edx::fxsr |
                                      cpuid1_edx::sse | cpuid1_edx::sse2 | cpuid1_edx::clflush |
                                      cpuid1_edx::fpu;
constexpr uint32_t leaf1_edx_always = cpuid1_edx::vme | cpuid1_edx::de | cpuid1_edx::pse | cpuid1_edx::tsc |
                                      cpuid1_edx::msr | cpuid1_edx::pae | cpuid1_edx::mce | cpuid1_edx::cx8 |
                                      cpuid1_edx::apic | cpuid1_edx::sep | cpuid1_edx::mtrr |
                                      cpuid1_edx::pge | cpuid1_edx::mca | cpuid1_edx::pat | cpuid1_edx::pse36;
constexpr uint32_t leaf7_ebx_native =
    cpuid7_ebx::bmi1 | cpuid7_ebx::avx2 | cpuid7_ebx::bmi2 | cpuid7_ebx::avx512f | cpuid7_ebx::avx512dq |
    cpuid7_ebx::rdseed | cpuid7_ebx::adx | cpuid7_ebx::avx512ifma | cpuid7_ebx::avx512cd | cpuid7_ebx::sha |
    cpuid7_ebx::avx512bw | cpuid7_ebx::avx512vl | cpuid7_ebx::fdp_excptn | cpuid7_ebx::zero_fcs |
    cpuid7_ebx::clflushopt | cpuid7_ebx::clwb;
constexpr uint32_t leaf7_ebx_always = cpuid7_ebx::fsgsbase | cpuid7_ebx::tsc_adjust | cpuid7_ebx::smep |
                                      cpuid7_ebx::erms | cpuid7_ebx::invpcid | cpuid7_ebx::smap;
constexpr uint32_t leaf7_ecx_native = cpuid7_ecx::avx512vbmi | cpuid7_ecx::avx512vbmi2 | cpuid7_ecx::gfni |
                                      cpuid7_ecx::vaes | cpuid7_ecx::vpclmulqdq | cpuid7_ecx::avx512vnni |
                                      cpuid7_ecx::avx512bitalg | cpuid7_ecx::avx512vpopcntdq;
constexpr uint32_t leaf7_ecx_always = cpuid7_ecx::umip | cpuid7_ecx::rdpid;
constexpr uint32_t leaf7_edx_native = cpuid7_edx::avx512vp2intersect | cpuid7_edx::avx512fp16;
constexpr uint32_t leaf7_edx_always = cpuid7_edx::fsrm | cpuid7_edx::serialize;
constexpr uint32_t leaf7_1_eax_native = cpuid7_1_eax::avx_vnni | cpuid7_1_eax::avx512bf16;
constexpr uint32_t ext1_ecx_native = cpuid_ext_ecx::lahf | cpuid_ext_ecx::lzcnt | cpuid_ext_ecx::misalignsse;
constexpr uint32_t ext1_ecx_always = cpuid_ext_ecx::prefetchw;
constexpr uint32_t ext1_edx_native = cpuid_ext_edx::mmxext;
constexpr uint32_t ext1_edx_always = cpuid_ext_edx::syscall | cpuid_ext_edx::nx | cpuid_ext_edx::page1gb |
                                     cpuid_ext_edx::rdtscp | cpuid_ext_edx::lm;
// Bits of 0x80000001 EDX that AMD copies from leaf 1.
constexpr uint32_t ext1_edx_mirror = 0x0183'f3ff;
}  // namespace offer

class Builder {
 public:
  void add(uint32_t leaf, Result r) { push(leaf, 0, 0, r); }
  void add(uint32_t leaf, uint32_t index, Result r) { push(leaf, index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, r); }
  std::vector<kvm_cpuid_entry2> take() { return std::move(entries_); }

 private:
  void push(uint32_t leaf, uint32_t index, uint32_t flags, Result r) {
    kvm_cpuid_entry2 entry{};
    entry.function = leaf;
    entry.index = index;
    entry.flags = flags;
    entry.eax = r.eax;
    entry.ebx = r.ebx;
    entry.ecx = r.ecx;
    entry.edx = r.edx;
    entries_.push_back(entry);
  }
  std::vector<kvm_cpuid_entry2> entries_;
};

// Without the operating system's support for a register file its instructions cannot run natively.
void hide_unusable(uint64_t components, Result& leaf1, Result& leaf7, Result& leaf7_1) {
  if ((components & 4) == 0) {
    leaf1.ecx &= ~(cpuid1_ecx::avx | cpuid1_ecx::fma | cpuid1_ecx::f16c);
    leaf7.ebx &= ~cpuid7_ebx::avx2;
    leaf7.ecx &= ~(cpuid7_ecx::vaes | cpuid7_ecx::vpclmulqdq);
    leaf7_1.eax &= ~cpuid7_1_eax::avx_vnni;
  }
  if ((components & 0xe0) == 0) {
    leaf7.ebx &= ~(cpuid7_ebx::avx512f | cpuid7_ebx::avx512dq | cpuid7_ebx::avx512ifma |
                   cpuid7_ebx::avx512cd | cpuid7_ebx::avx512bw | cpuid7_ebx::avx512vl);
    leaf7.ecx &= ~(cpuid7_ecx::avx512vbmi | cpuid7_ecx::avx512vbmi2 | cpuid7_ecx::avx512vnni |
                   cpuid7_ecx::avx512bitalg | cpuid7_ecx::avx512vpopcntdq);
    leaf7.edx &= ~(cpuid7_edx::avx512vp2intersect | cpuid7_edx::avx512fp16);
    leaf7_1.eax &= ~cpuid7_1_eax::avx512bf16;
  }
  if (components == 0) leaf1.ecx &= ~cpuid1_ecx::xsave;
}

void add_features(Builder& builder, uint64_t components, bool amd) {
  const Result host1 = native(1), host7 = native(7), host7_1 = host7.eax >= 1 ? native(7, 1) : Result{};
  Result leaf1, leaf7, leaf7_1;
  leaf1.eax = host1.eax & 0x0fff'3fff;
  leaf1.ebx = (host1.ebx & 0xff00) | 1u << 16;
  leaf1.ecx = (host1.ecx & offer::leaf1_ecx_native) | offer::leaf1_ecx_always;
  leaf1.edx = (host1.edx & offer::leaf1_edx_native) | offer::leaf1_edx_always;
  leaf7.eax = 1;
  leaf7.ebx = (host7.ebx & offer::leaf7_ebx_native) | offer::leaf7_ebx_always;
  leaf7.ecx = (host7.ecx & offer::leaf7_ecx_native) | offer::leaf7_ecx_always;
  leaf7.edx = (host7.edx & offer::leaf7_edx_native) | offer::leaf7_edx_always;
  // Without it guests of Intel's vendor assume every flaw, and pay for page-table isolation.
  if (!amd) leaf7.edx |= cpuid7_edx::arch_capabilities;
  leaf7_1.eax = host7_1.eax & offer::leaf7_1_eax_native;
  hide_unusable(components, leaf1, leaf7, leaf7_1);
  builder.add(1, leaf1);
  builder.add(7, 0, leaf7);
  builder.add(7, 1, leaf7_1);
}

void add_caches(Builder& builder, bool amd) {
  if (amd) return;  // 0x8000001d
  builder.add(2, native(2));
  for (uint32_t index = 0; index < 8; ++index) {
    Result cache = native(4, index);
    cache.eax &= 0x3fff;  // sharing: every cache private, until the VMM knows the topology
    builder.add(4, index, cache);
    if ((cache.eax & 0x1f) == 0) break;
  }
}

void add_xsave(Builder& builder, uint64_t components) {
  if (components == 0) {
    builder.add(0xd, 0, {});
    return;
  }
  uint32_t size = 512 + 64;
  for (uint32_t i = 2; i < 32; ++i) {
    if ((components >> i & 1) != 0) {
      const Result part = native(0xd, i);
      size = std::max(size, part.ebx + part.eax);
    }
  }
  builder.add(0xd, 0, {static_cast<uint32_t>(components), size, size, 0});
  constexpr uint32_t forms =
      cpuid_d_1_eax::xsaveopt | cpuid_d_1_eax::xsavec | cpuid_d_1_eax::xgetbv1 | cpuid_d_1_eax::xsaves;
  builder.add(0xd, 1, {native(0xd, 1).eax & forms, 0, 0, 0});
  for (uint32_t i = 2; i < 32; ++i) {
    if ((components >> i & 1) == 0) continue;
    const Result part = native(0xd, i);
    builder.add(0xd, i, {part.eax, part.ebx, part.ecx & 2, 0});
  }
}

// The paravirtual leaves of KVM (Documentation/virt/kvm/x86/cpuid.rst).
void add_hypervisor(Builder& builder) {
  builder.add(0x4000'0000, {0x4000'0001u, 0x4b4d'564b, 0x564b'4d56, 0x4d});
  uint32_t features = kvm_feature::clocksource | kvm_feature::nop_io_delay | kvm_feature::clocksource2 |
                      kvm_feature::clocksource_stable | kvm_feature::pv_eoi | kvm_feature::pv_unhalt |
                      kvm_feature::pv_send_ipi;
  // The page of the steal time is where `preempted` is told, and the host must tell us the time.
  if (RunDelay::available())
    features |= kvm_feature::steal_time | kvm_feature::pv_tlb_flush | kvm_feature::pv_sched_yield;
  builder.add(0x4000'0001, {features, 0, 0, 0});
}

void add_extended(Builder& builder, bool amd) {
  const Result host0 = native(0x8000'0000), host1 = native(0x8000'0001), leaf1 = native(1);
  const uint32_t last = amd ? 0x8000'0021u : 0x8000'0008u;
  builder.add(0x8000'0000, {last, host0.ebx, host0.ecx, host0.edx});
  Result ext1;
  ext1.eax = host1.eax;
  ext1.ebx = host1.ebx;
  ext1.ecx = (host1.ecx & offer::ext1_ecx_native) | offer::ext1_ecx_always;
  ext1.edx = (host1.edx & offer::ext1_edx_native) | offer::ext1_edx_always;
  if (amd) {
    ext1.edx |= ((leaf1.edx & offer::leaf1_edx_native) | offer::leaf1_edx_always) & offer::ext1_edx_mirror;
  }
  builder.add(0x8000'0001, ext1);
  for (uint32_t leaf = 0x8000'0002; leaf <= 0x8000'0004; ++leaf) builder.add(leaf, native(leaf));
  if (amd) builder.add(0x8000'0005, native(0x8000'0005));
  builder.add(0x8000'0006, native(0x8000'0006));
  builder.add(0x8000'0007, {0, 0, 0, 1u << 8});  // invariant TSC
  const Result host8 = host0.eax >= 0x8000'0008 ? native(0x8000'0008) : Result{0x3028, 0, 0, 0};
  const uint32_t physical = std::clamp(host8.eax & 0xff, 36u, 48u);
  // SSB_NO: the interpreter's stores and loads to guest memory do not stand next to each other.
  const uint32_t ext8 =
      amd ? cpuid_ext8_ebx::wbnoinvd | cpuid_ext8_ebx::ssb_no | (host8.ebx & cpuid_ext8_ebx::clzero) : 0;
  builder.add(0x8000'0008, {physical | 48u << 8, ext8, 0, 0});
  if (!amd) return;
  if (host0.eax >= 0x8000'001d && (host1.ecx & cpuid_ext_ecx::topoext) != 0) {
    for (uint32_t index = 0; index < 4; ++index) {
      Result cache = native(0x8000'001d, index);
      cache.eax &= 0x3fff;
      builder.add(0x8000'001d, index, cache);
    }
  }
  // LFENCE serializes; null selectors clear the base. Guest code is interpreted, so the guest's branches
  // never train the host's predictors: automatic IBRS, SRSO_NO, TSA_SQ_NO and TSA_L1_NO spare guests their
  // mitigations.
  builder.add(0x8000'0021,
              {1u << 2 | 1u << 6 | cpuid_ext21_eax::auto_ibrs | 1u << 29, 0, 1u << 1 | 1u << 2, 0});
}

}  // namespace

std::vector<kvm_cpuid_entry2> host_cpuid() {
  const Result leaf0 = native(0);
  const bool amd = leaf0.ebx == 0x6874'7541 || leaf0.ebx == 0x6f67'7948;  // "Auth", "Hygo"
  const uint64_t components = host_components();
  Builder builder;
  builder.add(0, {0xd, leaf0.ebx, leaf0.ecx, leaf0.edx});
  add_features(builder, components, amd);
  add_caches(builder, amd);
  builder.add(5, {0, 0, 0, 0});
  builder.add(6, {1u << 2, 0, 0, 0});  // ARAT: the APIC timer never stops
  builder.add(0xb, 0, {0, 1, 0x100, 0});
  builder.add(0xb, 1, {0, 1, 0x201, 0});
  add_xsave(builder, components);
  add_hypervisor(builder);
  add_extended(builder, amd);
  return builder.take();
}

uint32_t xsave_size(const Features& features, uint64_t components, bool compacted) noexcept {
  uint32_t size = 512 + 64;
  for (uint32_t i = 2; i < 63; ++i) {
    if ((components >> i & 1) == 0) continue;
    const Result part = features.query(0xd, i);
    if (compacted) {
      if ((part.ecx & 2) != 0) size = (size + 63) & ~63u;
      size += part.eax;
    } else {
      size = std::max(size, part.ebx + part.eax);
    }
  }
  return size;
}

Result cpuid(Cpu& cpu, uint32_t leaf, uint32_t subleaf) noexcept {
  return cpuid(cpu, cpu.features, leaf, subleaf);
}

Result cpuid(Cpu& cpu, const Features& features, uint32_t leaf, uint32_t subleaf) noexcept {
  Result out = features.query(leaf, subleaf);
  const auto follow = [](uint32_t& word, uint32_t bit, bool on) { word = on ? word | bit : word & ~bit; };
  switch (leaf) {
    case 1:
      follow(out.ecx, cpuid1_ecx::osxsave, (cpu.cr4 & cr4::osxsave) != 0);
      if (!cpu.platform().apic_enabled()) out.edx &= ~cpuid1_edx::apic;
      break;
    case 7:
      if (subleaf == 0) follow(out.ecx, cpuid7_ecx::ospke, (cpu.cr4 & cr4::pke) != 0);
      break;
    case 0xd:
      if (subleaf == 0 && out.eax != 0) out.ebx = xsave_size(features, cpu.xcr0, false);
      if (subleaf == 1 && (out.eax & (cpuid_d_1_eax::xsavec | cpuid_d_1_eax::xsaves)) != 0) {
        out.ebx = xsave_size(features, cpu.xcr0 | cpu.msr.xss, true);
      }
      break;
    case 0x8000'0001:
      if (features.amd_like && !cpu.platform().apic_enabled()) out.edx &= ~cpuid1_edx::apic;
      break;
    default: break;
  }
  return out;
}

}  // namespace lodge::kvm::soft
