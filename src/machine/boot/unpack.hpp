// Unpacks the payload of a Linux bzImage, so that the guest does not spend its time on it.
#pragma once

#include <optional>
#include <string_view>

#include "base/mapping.hpp"
#include "machine/boot/bytes.hpp"

namespace lodge::machine::boot {

// "gzip", "xz", "lzma", "lz4", "zstd" by the first bytes; empty for bzip2, LZO and whatever else: then the
// kernel's own decompressor has to do it.
std::string_view payload_format(Bytes payload) noexcept;

// What `payload` promises to unpack to: its last four bytes, which the kernel's build appends. Nothing when
// the format is not known or the promise is zero or above `limit`.
std::optional<uint64_t> unpacked_size(Bytes payload, uint64_t limit) noexcept;
// Unpacks into `out`, of the promised size. False when the data are damaged or the size is another: `out` is
// spoiled.
bool unpack_into(Bytes payload, std::span<uint8_t> out);

// The unpacked payload, at most `limit` bytes of it (no more memory than that is touched, however the file
// lies). Nothing when the format is not known, the data are damaged, or the size is not the promised one.
// Throws std::system_error when the host refuses the address space.
std::optional<Mapping> unpack(Bytes payload, uint64_t limit);

}  // namespace lodge::machine::boot
