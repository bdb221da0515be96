// What format a file has, by its first bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>

namespace lodge::block {

constexpr size_t magic_size = 4;
constexpr std::array<uint8_t, magic_size> qcow_magic{'Q', 'F', 'I', 0xfb};

// How many bytes tell every format that is recognised.
constexpr size_t probe_size = 6;
// LUKS1 and LUKS2 alike (LUKS On-Disk Format Specification, "phdr" and "Binary header"; big-endian version
// next).
constexpr std::array<uint8_t, probe_size> luks_magic{'L', 'U', 'K', 'S', 0xba, 0xbe};

// Whether a disk with these first bytes would be taken for an image format when nobody says what it is.
inline bool looks_formatted(std::span<const uint8_t> start) {
  return start.size() >= magic_size && std::ranges::equal(start.first(magic_size), qcow_magic);
}

// Throws UsageError for a file that begins as a LUKS volume: nobody said that it is raw, and its bytes are
// not those of the disk that was meant.
void refuse_encrypted(std::span<const uint8_t> start, const std::string& path);

}  // namespace lodge::block
