// What format a file has, by its first bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

namespace lodge::block {

class Storage;

constexpr size_t magic_size = 4;
constexpr std::array<uint8_t, magic_size> qcow_magic{'Q', 'F', 'I', 0xfb};

// Whether a disk with these first bytes would be taken for an image format when nobody says what it is.
inline bool looks_formatted(std::span<const uint8_t> start) {
  return start.size() >= magic_size && std::ranges::equal(start.first(magic_size), qcow_magic);
}

// Throws UsageError for an encrypted volume (LUKS) and for another program's image format, by name: nobody
// said that the file is raw, and its bytes are not those of the disk that was meant.
void refuse_foreign(Storage& storage);

}  // namespace lodge::block
