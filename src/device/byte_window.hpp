// Register windows of chips with an 8-bit data bus: the ISA bus splits wider accesses into bytes, lowest
// address first.
#pragma once

#include "machine/io.hpp"

namespace lodge::device {

class ByteWindow : public machine::RegisterWindow {
 public:
  uint64_t read(uint64_t offset, unsigned size) noexcept final {
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++) value |= uint64_t{read_byte(offset + i)} << (i * 8);
    return value;
  }
  void write(uint64_t offset, unsigned size, uint64_t value) noexcept final {
    for (unsigned i = 0; i < size; i++) write_byte(offset + i, static_cast<uint8_t>(value >> (i * 8)));
  }

 protected:
  virtual uint8_t read_byte(uint64_t offset) noexcept = 0;
  virtual void write_byte(uint64_t offset, uint8_t value) noexcept = 0;
};

}  // namespace lodge::device
