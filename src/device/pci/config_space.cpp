// Configuration space (PCI Local Bus Specification 3.0, sections 6.1 and 6.7).
//
// Every bit is of one of three kinds: fixed, writable, or cleared by writing a one. Two masks beside the
// bytes say which, so that a guest's write and a saved state go through the same filter and neither can
// change what a device is.
#include "device/pci/config_space.hpp"

#include <algorithm>
#include <stdexcept>

namespace lodge::device::pci {

namespace {

void put(std::vector<uint8_t>& bytes, unsigned offset, unsigned size, uint32_t value) noexcept {
  for (unsigned i = 0; i < size && offset + i < bytes.size(); i++)
    bytes[offset + i] = static_cast<uint8_t>(value >> (i * 8));
}

}  // namespace

uint32_t ConfigSpace::get(unsigned offset, unsigned size) const noexcept {
  uint32_t value = 0;
  for (unsigned i = 0; i < size; i++)
    value |= uint32_t{offset + i < bytes_.size() ? bytes_[offset + i] : uint8_t{0xff}} << (i * 8);
  return value;
}

void ConfigSpace::set(unsigned offset, unsigned size, uint32_t value) noexcept {
  put(bytes_, offset, size, value);
}

void ConfigSpace::allow(unsigned offset, unsigned size, uint32_t mask) noexcept {
  put(writable_, offset, size, mask);
}

void ConfigSpace::clear_by_ones(unsigned offset, unsigned size, uint32_t mask) noexcept {
  put(ones_clear_, offset, size, mask);
}

unsigned ConfigSpace::add_capability(uint8_t id, unsigned size) {
  unsigned offset = next_capability_;
  if (offset + size > 256) throw std::logic_error("PCI capabilities do not fit into the configuration space");
  set(offset, 1, id);
  set(offset + 1, 1, get(CAPABILITIES, 1));
  set(CAPABILITIES, 1, offset);
  set(STATUS, 2, get(STATUS, 2) | STATUS_CAPABILITIES);
  // Capabilities start on a double word: the two low bits of a list pointer are reserved.
  next_capability_ = (offset + size + 3) & ~3u;
  return offset;
}

uint32_t ConfigSpace::read(unsigned offset, unsigned size) const noexcept {
  return get(offset, size);
}

void ConfigSpace::write(unsigned offset, unsigned size, uint32_t value) noexcept {
  for (unsigned i = offset; i < offset + size && i < bytes_.size(); i++, value >>= 8) {
    auto byte = static_cast<uint8_t>(value);
    bytes_[i] = static_cast<uint8_t>((bytes_[i] & ~writable_[i]) | (byte & writable_[i]));
    bytes_[i] &= static_cast<uint8_t>(~(byte & ones_clear_[i]));
  }
}

bool ConfigSpace::restore(std::span<const uint8_t> saved) noexcept {
  if (saved.size() != bytes_.size()) return false;
  for (size_t i = 0; i < bytes_.size(); i++) {
    uint8_t mutable_bits = writable_[i] | ones_clear_[i];
    bytes_[i] = static_cast<uint8_t>((bytes_[i] & ~mutable_bits) | (saved[i] & mutable_bits));
  }
  return true;
}

}  // namespace lodge::device::pci
