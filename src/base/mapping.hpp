// A memory mapping with one owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "base/fd.hpp"

namespace lodge {

class Mapping {
 public:
  Mapping() noexcept = default;
  // mmap(2) with the given arguments; throws std::system_error with `what`.
  Mapping(size_t size, int protection, int flags, int fd, uint64_t offset, const std::string& what);
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  // Private anonymous memory, zeroed on first touch.
  static Mapping anonymous(size_t size);
  // The whole of a file, read-only. Throws UsageError naming `path` and `option` when it cannot be read or is
  // empty.
  static Mapping file(const std::string& path, const std::string& option);

  uint8_t* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  std::span<uint8_t> bytes() const noexcept { return {data_, size_}; }
  explicit operator bool() const noexcept { return data_ != nullptr; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lodge
