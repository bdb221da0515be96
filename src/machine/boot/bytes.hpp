// Bounded little-endian reads out of an untrusted file.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>

namespace lodge::machine::boot {

using Bytes = std::span<const uint8_t>;

// The `size` bytes at `offset`, or nothing when they are not all there. No arithmetic on the arguments can
// wrap.
inline std::optional<Bytes> slice(Bytes bytes, uint64_t offset, uint64_t size) noexcept {
  if (offset > bytes.size() || size > bytes.size() - offset) return std::nullopt;
  return bytes.subspan(offset, size);
}

// A plain integer or struct at `offset` (the host is little-endian as well: Lodge runs on x86-64 only).
template <class T>
std::optional<T> get(Bytes bytes, uint64_t offset) noexcept {
  static_assert(std::is_trivially_copyable_v<T>);
  const auto part = slice(bytes, offset, sizeof(T));
  if (!part) return std::nullopt;
  T value;
  std::memcpy(&value, part->data(), sizeof value);
  return value;
}

template <class T>
void put(std::span<uint8_t> bytes, uint64_t offset, const T& value) noexcept {
  static_assert(std::is_trivially_copyable_v<T>);
  if (offset <= bytes.size() && sizeof(T) <= bytes.size() - offset) {
    std::memcpy(bytes.data() + offset, &value, sizeof value);
  }
}

inline constexpr uint64_t align_up(uint64_t value, uint64_t alignment) noexcept {
  return (value + alignment - 1) & ~(alignment - 1);
}

}  // namespace lodge::machine::boot
