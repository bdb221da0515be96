// Compressed clusters: raw deflate (a window of 4 KiB, as other readers expect it) or one zstd frame.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "block/qcow2/format.hpp"

namespace lodge::block::qcow2 {

// Fills `cluster` from the start of `data`, which may go on behind the compressed data. False: damaged.
bool decompress(Compression type, std::span<const uint8_t> data, std::span<uint8_t> cluster);

// Empty when the result would not be smaller than `cluster`.
std::vector<uint8_t> compress(Compression type, std::span<const uint8_t> cluster);

}  // namespace lodge::block::qcow2
