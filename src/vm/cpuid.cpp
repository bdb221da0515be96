#include "vm/cpuid.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "base/error.hpp"

namespace lodge::vm {
namespace {

constexpr uint32_t bit(unsigned n) {
  return 1u << n;
}

enum class Register { eax, ebx, ecx, edx };

uint32_t& word(kvm_cpuid_entry2& entry, Register reg) {
  switch (reg) {
    case Register::eax: return entry.eax;
    case Register::ebx: return entry.ebx;
    case Register::ecx: return entry.ecx;
    default: return entry.edx;
  }
}

kvm_cpuid_entry2* find(CpuidEntries& entries, uint32_t leaf, uint32_t index = 0) {
  for (auto& entry : entries) {
    const bool indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    if (entry.function == leaf && (!indexed || entry.index == index)) return &entry;
  }
  return nullptr;
}

// A feature bit that a psABI level asks for (x86-64 psABI, table 3.1).
struct LevelFeature {
  unsigned level;
  uint32_t leaf;
  Register reg;
  unsigned bit;
  std::string_view name;
};

constexpr std::array level_features = {LevelFeature{1, 1, Register::edx, 0, "fpu"},
                                       LevelFeature{1, 1, Register::edx, 8, "cx8"},
                                       LevelFeature{1, 1, Register::edx, 15, "cmov"},
                                       LevelFeature{1, 1, Register::edx, 23, "mmx"},
                                       LevelFeature{1, 1, Register::edx, 24, "fxsr"},
                                       LevelFeature{1, 1, Register::edx, 25, "sse"},
                                       LevelFeature{1, 1, Register::edx, 26, "sse2"},
                                       LevelFeature{1, 0x80000001, Register::edx, 11, "syscall"},
                                       LevelFeature{1, 0x80000001, Register::edx, 29, "lm"},
                                       LevelFeature{2, 1, Register::ecx, 0, "sse3"},
                                       LevelFeature{2, 1, Register::ecx, 9, "ssse3"},
                                       LevelFeature{2, 1, Register::ecx, 13, "cx16"},
                                       LevelFeature{2, 1, Register::ecx, 19, "sse4.1"},
                                       LevelFeature{2, 1, Register::ecx, 20, "sse4.2"},
                                       LevelFeature{2, 1, Register::ecx, 23, "popcnt"},
                                       LevelFeature{2, 0x80000001, Register::ecx, 0, "lahf"},
                                       LevelFeature{3, 1, Register::ecx, 12, "fma"},
                                       LevelFeature{3, 1, Register::ecx, 22, "movbe"},
                                       LevelFeature{3, 1, Register::ecx, 26, "xsave"},
                                       LevelFeature{3, 1, Register::ecx, 28, "avx"},
                                       LevelFeature{3, 1, Register::ecx, 29, "f16c"},
                                       LevelFeature{3, 7, Register::ebx, 3, "bmi1"},
                                       LevelFeature{3, 7, Register::ebx, 5, "avx2"},
                                       LevelFeature{3, 7, Register::ebx, 8, "bmi2"},
                                       LevelFeature{3, 0x80000001, Register::ecx, 5, "lzcnt"},
                                       LevelFeature{4, 7, Register::ebx, 16, "avx512f"},
                                       LevelFeature{4, 7, Register::ebx, 17, "avx512dq"},
                                       LevelFeature{4, 7, Register::ebx, 28, "avx512cd"},
                                       LevelFeature{4, 7, Register::ebx, 30, "avx512bw"},
                                       LevelFeature{4, 7, Register::ebx, 31, "avx512vl"}};

// What any PC of the last twenty years has beside its instruction set: VME DE PSE TSC MSR PAE MCE APIC SEP
// MTRR PGE MCA PAT PSE36 CLFSH HTT; x2APIC, TSC deadline, hypervisor; NX. They belong to every level.
constexpr uint32_t pc_leaf1_edx = 0x100bfafe, pc_leaf1_ecx = bit(21) | bit(24) | bit(31);
constexpr uint32_t pc_ext1_edx = bit(20);
// AMD repeats leaf 1 EDX in 0x80000001 EDX; and says there how it numbers cores (CmpLegacy, ExtApicSpace,
// AltMovCr8, TopologyExtensions).
constexpr uint32_t amd_mirror = 0x0183f3ff, amd_platform_ecx = bit(1) | bit(3) | bit(4) | bit(22);

constexpr uint32_t vmx = bit(5), svm = bit(2), htt = bit(28);
constexpr uint32_t cpuid_indexed = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

// Leaves that a named level keeps; all others would tell hosts of one level apart.
bool level_keeps(uint32_t leaf) {
  switch (leaf) {
    case 0:
    case 1:
    case 4:
    case 6:
    case 7:
    case 0xb:
    case 0xd:
    case 0x1f:
    case 0x80000000:
    case 0x80000001:
    case 0x80000002:
    case 0x80000003:
    case 0x80000004:
    case 0x80000007:
    case 0x80000008:
    case 0x8000001d:
    case 0x8000001e:
    case 0x80000021: return true;
    default: return (leaf >> 8) == 0x400000;  // the hypervisor's own
  }
}

void cut_xsave(CpuidEntries& entries, unsigned level) {
  // XCR0 components: x87, SSE, AVX; opmask and the two upper halves of ZMM.
  const uint32_t components = level >= 4 ? 0xe7 : level == 3 ? 0x07 : 0;
  auto* base = find(entries, 0xd, 0);
  if (!base) return;
  const uint32_t allowed = base->eax & components;
  std::erase_if(entries, [&](const kvm_cpuid_entry2& entry) {
    return entry.function == 0xd && entry.index >= 2 && (entry.index >= 32 || !(allowed & bit(entry.index)));
  });
  uint32_t size = allowed ? 576 : 0;  // legacy region and header
  for (const auto& entry : entries) {
    if (entry.function == 0xd && entry.index >= 2) size = std::max(size, entry.ebx + entry.eax);
  }
  base = find(entries, 0xd, 0);
  base->eax = allowed;
  base->edx = 0;
  base->ebx = base->ecx = size;
  if (auto* extra = find(entries, 0xd, 1)) extra->eax = extra->ebx = extra->ecx = extra->edx = 0;
}

void cut_to_level(CpuidEntries& entries, unsigned level, std::string_view model) {
  CpuidEntries original = entries;
  std::erase_if(entries, [](const auto& entry) { return !level_keeps(entry.function); });
  std::erase_if(entries, [](const auto& entry) { return entry.function == 7 && entry.index != 0; });
  const auto clear = [&](uint32_t leaf, auto... keep) {
    if (auto* entry = find(entries, leaf)) {
      const std::array<uint32_t, 4> masks{keep...};
      entry->eax &= masks[0], entry->ebx &= masks[1], entry->ecx &= masks[2], entry->edx &= masks[3];
    }
  };
  clear(1, ~0u, ~0u, pc_leaf1_ecx, pc_leaf1_edx);
  // An APIC timer that never stops, an invariant TSC and TSC_ADJUST, or Linux distrusts the clock of several
  // processors; and what spares guests the mitigations of flaws that are not there.
  clear(6, bit(2), 0u, 0u, 0u);
  clear(0x80000007, 0u, 0u, 0u, bit(8));
  clear(7, 0u, bit(1), 0u, bit(29));
  clear(0x80000001, ~0u, ~0u, amd_platform_ecx, pc_ext1_edx | amd_mirror);
  clear(0x80000008, ~0u, 0u, ~0u, 0u);
  for (const auto& feature : level_features) {
    if (feature.level > level) break;
    auto* have = find(original, feature.leaf);
    if (!have || !(word(*have, feature.reg) & bit(feature.bit))) {
      usage_error(
          "--cpu: {} needs {}, which this host's processor (or accelerator) lacks; choose a lower level",
          model, feature.name);
    }
    word(*find(entries, feature.leaf), feature.reg) |= bit(feature.bit);
  }
  cut_xsave(entries, level);
  // Brand string: what lscpu shows.
  std::array<char, 48> brand{};
  fmt::format_to_n(brand.data(), brand.size() - 1, "Lodge {} processor", model);
  for (uint32_t i = 0; i < 3; i++) {
    if (auto* entry = find(entries, 0x80000002 + i)) std::memcpy(&entry->eax, brand.data() + 16 * i, 16);
  }
}

kvm_cpuid_entry2 topology_entry(uint32_t leaf, uint32_t index, uint32_t shift, uint32_t count, uint32_t type,
                                uint32_t id) {
  kvm_cpuid_entry2 entry{};
  entry.function = leaf, entry.index = index, entry.flags = cpuid_indexed;
  entry.eax = shift, entry.ebx = count, entry.ecx = type << 8 | index, entry.edx = id;
  return entry;
}

// Caches below the third level are a core's own, the third is everyone's (leaf 4 and 0x8000001d share the
// layout).
void share_cache(kvm_cpuid_entry2& entry, uint32_t id_space) {
  const uint32_t level = entry.eax >> 5 & 7;
  if ((entry.eax & 0x1f) == 0) return;  // no more caches
  entry.eax = (entry.eax & ~(0xfffu << 14)) | (level >= 3 ? id_space - 1 : 0) << 14;
}

}  // namespace

CpuidEntries model_cpuid(CpuidEntries entries, bool tsc_deadline, std::string_view model) {
  if (auto* basic = find(entries, 1)) {
    basic->ecx &= ~vmx;
    basic->ecx |= bit(31);
    if (tsc_deadline) basic->ecx |= bit(24);
  }
  if (auto* extended = find(entries, 0x80000001)) extended->ecx &= ~svm;
  if (auto* nested = find(entries, 0x8000000a)) nested->eax = nested->ebx = nested->ecx = nested->edx = 0;
  if (model != "host") cut_to_level(entries, static_cast<unsigned>(model.back() - '0'), model);
  return entries;
}

CpuidEntries model_cpuid(const kvm::System& system, std::string_view model) {
  return model_cpuid(system.supported_cpuid(), system.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0, model);
}

CpuidEntries vcpu_cpuid(const CpuidEntries& model, unsigned apic_id, unsigned cpus) {
  CpuidEntries entries = model;
  const unsigned shift = static_cast<unsigned>(std::bit_width(cpus - 1));  // APIC ID bits inside the package
  const uint32_t id_space = 1u << shift;
  const auto* leaf0 = find(entries, 0);
  const uint32_t max_leaf = leaf0 ? leaf0->eax : 0;
  std::erase_if(entries, [](const auto& entry) { return entry.function == 0xb || entry.function == 0x1f; });
  for (auto& entry : entries) {
    switch (entry.function) {
      case 1:
        entry.ebx = (entry.ebx & 0xffff) | std::min(id_space, 255u) << 16 | apic_id << 24;
        entry.edx = cpus > 1 ? entry.edx | htt : entry.edx & ~htt;
        break;
      case 4:
        share_cache(entry, id_space);
        if (entry.eax & 0x1f) entry.eax = (entry.eax & 0x03ff'ffff) | std::min(id_space - 1, 63u) << 26;
        break;
      case 0x80000008: entry.ecx = shift << 12 | (cpus - 1); break;
      case 0x8000001d: share_cache(entry, id_space); break;
      case 0x8000001e: entry.eax = apic_id, entry.ebx = apic_id & 0xff, entry.ecx = 0, entry.edx = 0; break;
      default: break;
    }
  }
  for (const uint32_t leaf : {0xbu, 0x1fu}) {
    if (leaf > max_leaf) continue;
    entries.push_back(topology_entry(leaf, 0, 0, 1, 1, apic_id));         // threads of a core
    entries.push_back(topology_entry(leaf, 1, shift, cpus, 2, apic_id));  // cores of the package
    entries.push_back(topology_entry(leaf, 2, 0, 0, 0, apic_id));         // the end of the list
  }
  return entries;
}

void add_frequencies(CpuidEntries& entries, uint32_t tsc_khz) {
  constexpr uint32_t signature = 0x4000'0000, frequencies = 0x4000'0010, apic_bus_khz = 1'000'000;
  auto* const hypervisor = find(entries, signature);
  if (hypervisor == nullptr || tsc_khz == 0 || find(entries, frequencies) != nullptr) return;
  hypervisor->eax = std::max(hypervisor->eax, frequencies);
  kvm_cpuid_entry2 entry{};
  entry.function = frequencies;
  entry.eax = tsc_khz;
  entry.ebx = apic_bus_khz;
  entries.push_back(entry);
}

std::string brand_string(const CpuidEntries& entries) {
  std::array<char, 49> text{};
  for (const auto& entry : entries) {
    const uint32_t part = entry.function - 0x80000002;
    if (part < 3) std::memcpy(text.data() + 16 * part, &entry.eax, 16);
  }
  std::string brand(text.data());
  brand.erase(0, brand.find_first_not_of(' '));
  return brand.erase(brand.find_last_not_of(' ') + 1);
}

}  // namespace lodge::vm
