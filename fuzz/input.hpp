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
  // Of so many bytes, the lowest first.
  uint64_t number(unsigned bytes) {
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++) value |= uint64_t{byte()} << (i * 8);
    return value;
  }
  template <class T>
  T take() {
    return static_cast<T>(number(sizeof(T)));
  }

 private:
  std::span<const uint8_t> data_;
};

}  // namespace lodge::fuzz
