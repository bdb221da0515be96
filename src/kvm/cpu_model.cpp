#include "kvm/cpu_model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "base/error.hpp"

namespace lodge::kvm {
namespace {

enum Register : uint8_t { eax, ebx, ecx, edx };

// An instruction-set feature that the levels know or that no level contains. Supervisor features are not
// listed: they stay.
struct IsaFeature {
  uint32_t leaf, subleaf;
  Register reg;
  uint8_t bit;
  uint8_t level;  // first level that has it; 9: none
  std::string_view name;
};

constexpr uint8_t none = 9;

constexpr IsaFeature isa_features[] = {
    {1, 0, edx, 0, 1, "fpu"},
    {1, 0, edx, 8, 1, "cx8"},
    {1, 0, edx, 15, 1, "cmov"},
    {1, 0, edx, 23, 1, "mmx"},
    {1, 0, edx, 24, 1, "fxsr"},
    {1, 0, edx, 25, 1, "sse"},
    {1, 0, edx, 26, 1, "sse2"},
    {0x8000'0001, 0, edx, 29, 1, "lm"},
    {1, 0, ecx, 0, 2, "sse3"},
    {1, 0, ecx, 9, 2, "ssse3"},
    {1, 0, ecx, 13, 2, "cx16"},
    {1, 0, ecx, 19, 2, "sse4.1"},
    {1, 0, ecx, 20, 2, "sse4.2"},
    {1, 0, ecx, 23, 2, "popcnt"},
    {0x8000'0001, 0, ecx, 0, 2, "lahf"},
    {1, 0, ecx, 12, 3, "fma"},
    {1, 0, ecx, 22, 3, "movbe"},
    {1, 0, ecx, 26, 3, "xsave"},
    {1, 0, ecx, 28, 3, "avx"},
    {1, 0, ecx, 29, 3, "f16c"},
    {7, 0, ebx, 3, 3, "bmi1"},
    {7, 0, ebx, 5, 3, "avx2"},
    {7, 0, ebx, 8, 3, "bmi2"},
    {0x8000'0001, 0, ecx, 5, 3, "lzcnt"},
    {7, 0, ebx, 16, 4, "avx512f"},
    {7, 0, ebx, 17, 4, "avx512dq"},
    {7, 0, ebx, 28, 4, "avx512cd"},
    {7, 0, ebx, 30, 4, "avx512bw"},
    {7, 0, ebx, 31, 4, "avx512vl"},
    {1, 0, ecx, 1, none, "pclmulqdq"},
    {1, 0, ecx, 25, none, "aes"},
    {1, 0, ecx, 30, none, "rdrand"},
    {7, 0, ebx, 4, none, "hle"},
    {7, 0, ebx, 11, none, "rtm"},
    {7, 0, ebx, 18, none, "rdseed"},
    {7, 0, ebx, 19, none, "adx"},
    {7, 0, ebx, 21, none, "avx512ifma"},
    {7, 0, ebx, 29, none, "sha"},
    {7, 0, ecx, 1, none, "avx512vbmi"},
    {7, 0, ecx, 6, none, "avx512vbmi2"},
    {7, 0, ecx, 8, none, "gfni"},
    {7, 0, ecx, 9, none, "vaes"},
    {7, 0, ecx, 10, none, "vpclmulqdq"},
    {7, 0, ecx, 11, none, "avx512vnni"},
    {7, 0, ecx, 12, none, "avx512bitalg"},
    {7, 0, ecx, 14, none, "avx512vpopcntdq"},
    {7, 0, edx, 8, none, "avx512vp2intersect"},
    {7, 0, edx, 23, none, "avx512fp16"},
    {7, 1, eax, 4, none, "avx-vnni"},
    {7, 1, eax, 5, none, "avx512bf16"},
    {7, 1, eax, 23, none, "avx-ifma"},
    {0x8000'0001, 0, ecx, 6, none, "sse4a"},
    {0x8000'0001, 0, ecx, 7, none, "misalignsse"},
    {0x8000'0001, 0, ecx, 11, none, "xop"},
    {0x8000'0001, 0, ecx, 16, none, "fma4"},
    {0x8000'0001, 0, ecx, 21, none, "tbm"},
    {0x8000'0001, 0, edx, 22, none, "mmxext"},
    {0x8000'0001, 0, edx, 30, none, "3dnowext"},
    {0x8000'0001, 0, edx, 31, none, "3dnow"},
};

constexpr std::array<std::string_view, 5> names = {"host", "x86-64-v1", "x86-64-v2", "x86-64-v3",
                                                   "x86-64-v4"};

uint32_t& field(kvm_cpuid_entry2& entry, Register reg) {
  switch (reg) {
    case eax: return entry.eax;
    case ebx: return entry.ebx;
    case ecx: return entry.ecx;
    default: return entry.edx;
  }
}

kvm_cpuid_entry2* find(std::span<kvm_cpuid_entry2> entries, uint32_t leaf, uint32_t subleaf) {
  const auto found = std::ranges::find_if(entries, [&](const kvm_cpuid_entry2& entry) {
    return entry.function == leaf &&
           ((entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) == 0 || entry.index == subleaf);
  });
  return found == entries.end() ? nullptr : &*found;
}

// Leaf 0xd describes the components of XCR0: what the level's registers do not need goes.
void trim_xsave(std::vector<kvm_cpuid_entry2>& entries, unsigned level) {
  const uint32_t components = level >= 4 ? 0xe7 : level == 3 ? 7 : 0;
  std::erase_if(entries, [&](const kvm_cpuid_entry2& entry) {
    if (entry.function != 0xd) return false;
    if (components == 0) return true;
    return entry.index >= 2 && (entry.index > 31 || (components >> entry.index & 1) == 0);
  });
  uint32_t size = 512 + 64;
  for (const kvm_cpuid_entry2& entry : entries) {
    if (entry.function == 0xd && entry.index >= 2) size = std::max(size, entry.ebx + entry.eax);
  }
  if (kvm_cpuid_entry2* const main = find(entries, 0xd, 0)) {
    main->eax &= components;
    main->edx = 0;
    main->ebx = main->ecx = size;
  }
  if (kvm_cpuid_entry2* const second = find(entries, 0xd, 1)) second->ecx = second->edx = 0;
}

// The brand string (0x80000002 to 4) names the model, so that a guest's user sees what was asked for.
void set_brand(std::vector<kvm_cpuid_entry2>& entries, std::string_view model) {
  std::array<char, 48> text{};
  const std::string brand = fmt::format("Lodge {}", model);
  std::memcpy(text.data(), brand.data(), std::min(brand.size(), text.size() - 1));
  for (uint32_t i = 0; i < 3; ++i) {
    kvm_cpuid_entry2* const entry = find(entries, 0x8000'0002 + i, 0);
    if (entry == nullptr) continue;
    std::memcpy(&entry->eax, &text[i * 16], 4);
    std::memcpy(&entry->ebx, &text[i * 16 + 4], 4);
    std::memcpy(&entry->ecx, &text[i * 16 + 8], 4);
    std::memcpy(&entry->edx, &text[i * 16 + 12], 4);
  }
}

}  // namespace

std::span<const std::string_view> cpu_model_names() noexcept {
  return names;
}

std::vector<kvm_cpuid_entry2> cpu_model(std::span<const kvm_cpuid_entry2> supported, std::string_view model) {
  const auto found = std::ranges::find(names, model);
  if (found == names.end()) {
    throw UsageError(
        fmt::format("unknown processor model '{}'; known are {}", model, fmt::join(names, ", ")));
  }
  std::vector<kvm_cpuid_entry2> entries(supported.begin(), supported.end());
  const auto level = static_cast<unsigned>(found - names.begin());
  if (level == 0) return entries;
  for (const IsaFeature& feature : isa_features) {
    kvm_cpuid_entry2* const entry = find(entries, feature.leaf, feature.subleaf);
    const uint32_t bit = 1u << feature.bit;
    const bool present = entry != nullptr && (field(*entry, feature.reg) & bit) != 0;
    if (feature.level <= level && !present) {
      throw UsageError(fmt::format("the host's processor cannot offer {}: it lacks {}; use --cpu host", model,
                                   feature.name));
    }
    if (present && feature.level > level) field(*entry, feature.reg) &= ~bit;
  }
  trim_xsave(entries, level);
  set_brand(entries, model);
  return entries;
}

}  // namespace lodge::kvm
