// The fuzzer's bytes, taken from the front; zeroes when there are none left.
#pragma once

#include <cstdint>
#include <span>

namespace lodge::fuzz {

class Bytes {
 public:
  explicit Bytes(std::span<const uint8_t> data) : data_(data) {}
  bool empty() const { return data_.empty(); }
  uint8_t byte() {
    if (data_.empty()) return 0;
    const uint8_t value = data_.front();
    data_ = data_.subspan(1);
    return value;
  }

 private:
  std::span<const uint8_t> data_;
};

}  // namespace lodge::fuzz
