// Names of CPUID feature bits, as the manuals have them. SDM volume 2, CPUID; AMD APM volume 3, appendix E.
#pragma once

#include <cstdint>

namespace lodge::kvm::soft {

namespace cpuid1_ecx {
inline constexpr uint32_t sse3 = 1u << 0, pclmul = 1u << 1, monitor = 1u << 3, vmx = 1u << 5, smx = 1u << 6,
                          ssse3 = 1u << 9, fma = 1u << 12, cx16 = 1u << 13, pcid = 1u << 17, sse41 = 1u << 19,
                          sse42 = 1u << 20, x2apic = 1u << 21, movbe = 1u << 22, popcnt = 1u << 23,
                          tsc_deadline = 1u << 24, aes = 1u << 25, xsave = 1u << 26, osxsave = 1u << 27,
                          avx = 1u << 28, f16c = 1u << 29, rdrand = 1u << 30, hypervisor = 1u << 31;
}
namespace cpuid1_edx {
inline constexpr uint32_t fpu = 1u << 0, vme = 1u << 1, de = 1u << 2, pse = 1u << 3, tsc = 1u << 4,
                          msr = 1u << 5, pae = 1u << 6, mce = 1u << 7, cx8 = 1u << 8, apic = 1u << 9,
                          sep = 1u << 11, mtrr = 1u << 12, pge = 1u << 13, mca = 1u << 14, cmov = 1u << 15,
                          pat = 1u << 16, pse36 = 1u << 17, clflush = 1u << 19, mmx = 1u << 23,
                          fxsr = 1u << 24, sse = 1u << 25, sse2 = 1u << 26, ss = 1u << 27, htt = 1u << 28;
}
namespace cpuid7_ebx {
inline constexpr uint32_t fsgsbase = 1u << 0, tsc_adjust = 1u << 1, bmi1 = 1u << 3, hle = 1u << 4,
                          avx2 = 1u << 5, fdp_excptn = 1u << 6, smep = 1u << 7, bmi2 = 1u << 8,
                          erms = 1u << 9, invpcid = 1u << 10, rtm = 1u << 11, zero_fcs = 1u << 13,
                          mpx = 1u << 14, avx512f = 1u << 16, avx512dq = 1u << 17, rdseed = 1u << 18,
                          adx = 1u << 19, smap = 1u << 20, avx512ifma = 1u << 21, clflushopt = 1u << 23,
                          clwb = 1u << 24, pt = 1u << 25, avx512cd = 1u << 28, sha = 1u << 29,
                          avx512bw = 1u << 30, avx512vl = 1u << 31;
}
namespace cpuid7_ecx {
inline constexpr uint32_t prefetchwt1 = 1u << 0, avx512vbmi = 1u << 1, umip = 1u << 2, pku = 1u << 3,
                          ospke = 1u << 4, waitpkg = 1u << 5, avx512vbmi2 = 1u << 6, cet_ss = 1u << 7,
                          gfni = 1u << 8, vaes = 1u << 9, vpclmulqdq = 1u << 10, avx512vnni = 1u << 11,
                          avx512bitalg = 1u << 12, avx512vpopcntdq = 1u << 14, la57 = 1u << 16,
                          rdpid = 1u << 22, cldemote = 1u << 25, movdiri = 1u << 27, movdir64b = 1u << 28,
                          enqcmd = 1u << 29;
}
namespace cpuid7_edx {
inline constexpr uint32_t fsrm = 1u << 4, avx512vp2intersect = 1u << 8, md_clear = 1u << 10,
                          serialize = 1u << 14, tsxldtrk = 1u << 16, avx512fp16 = 1u << 23,
                          spec_ctrl = 1u << 26, stibp = 1u << 27, flush_l1d = 1u << 28,
                          arch_capabilities = 1u << 29, ssbd = 1u << 31;
}
namespace cpuid7_1_eax {
inline constexpr uint32_t avx_vnni = 1u << 4, avx512bf16 = 1u << 5, fzrm = 1u << 10, fsrs = 1u << 11,
                          fsrc = 1u << 12, avx_ifma = 1u << 23;
}
namespace cpuid_d_1_eax {
inline constexpr uint32_t xsaveopt = 1, xsavec = 2, xgetbv1 = 4, xsaves = 8;
}
namespace cpuid_ext_ecx {  // 0x80000001
inline constexpr uint32_t lahf = 1u << 0, cmp_legacy = 1u << 1, svm = 1u << 2, cr8_legacy = 1u << 4,
                          lzcnt = 1u << 5, sse4a = 1u << 6, misalignsse = 1u << 7, prefetchw = 1u << 8,
                          osvw = 1u << 9, xop = 1u << 11, fma4 = 1u << 16, tbm = 1u << 21, topoext = 1u << 22,
                          monitorx = 1u << 29;
}
namespace cpuid_ext_edx {
inline constexpr uint32_t syscall = 1u << 11, nx = 1u << 20, mmxext = 1u << 22, fxsr_opt = 1u << 25,
                          page1gb = 1u << 26, rdtscp = 1u << 27, lm = 1u << 29, ext_3dnow2 = 1u << 30,
                          ext_3dnow = 1u << 31;
}
namespace cpuid_ext8_ebx {  // 0x80000008
inline constexpr uint32_t clzero = 1u << 0, xsaveerptr = 1u << 2, rdpru = 1u << 4, wbnoinvd = 1u << 9,
                          ibpb = 1u << 12, ibrs = 1u << 14, stibp = 1u << 15, amd_ssbd = 1u << 24,
                          ssb_no = 1u << 26;
}
namespace cpuid_ext21_eax {  // 0x80000021
inline constexpr uint32_t auto_ibrs = 1u << 8;
}
namespace kvm_feature {  // 0x40000001
inline constexpr uint32_t clocksource = 1u << 0, nop_io_delay = 1u << 1, clocksource2 = 1u << 3,
                          async_pf = 1u << 4, steal_time = 1u << 5, pv_eoi = 1u << 6, pv_unhalt = 1u << 7,
                          pv_tlb_flush = 1u << 9, pv_send_ipi = 1u << 11, poll_control = 1u << 12,
                          pv_sched_yield = 1u << 13, clocksource_stable = 1u << 24;
}

}  // namespace lodge::kvm::soft
