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

// The unpacked payload, at most `limit` bytes of it (no more memory than that is touched, however the file
// lies). `payload` ends in the four bytes that the kernel's build appends: the unpacked size. Nothing when
// the format is not known, the data are damaged, or the size is not the promised one. Throws
// std::system_error when the host refuses the address space.
std::optional<Mapping> unpack(Bytes payload, uint64_t limit);

}  // namespace lodge::machine::boot
