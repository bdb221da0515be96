// SMBIOS: what the machine is called and what it is made of, for dmidecode and its kind.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "machine/memory.hpp"

namespace lodge::machine::smbios {

struct Config {
  unsigned cpus = 1;
  uint32_t cpuid_eax = 0, cpuid_edx = 0;  // of leaf 1: the processor's ID
  std::string cpu_name = "x86-64";        // the brand string
  std::array<uint8_t, 16> uuid{};         // in the order it is written; all zeros: not set
  std::string serial;                     // empty: none
};

// The structures for this machine (types 0, 1, 3, 4, 16, 17, 19 for each RAM range, 32, 127), one after the
// other.
std::vector<uint8_t> structures(const Config& config, std::span<const RamRange> ranges);

// Writes the entry points (3.0 "_SM3_", 2.8 "_SM_") and the structures into guest memory at
// layout::smbios_base, where systems without UEFI search. Throws UsageError when the guest has less than 1
// MiB. Again after a machine reset.
void install(const Config& config, GuestMemory& memory);

}  // namespace lodge::machine::smbios
