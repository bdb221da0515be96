// Counters as KVM_GET_STATS_FD shows them (api.rst, section 4.133): a file that says by itself what is in it.
// The counters lie in the file, so that a read sees them as they are, also after what they count is gone.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/fd.hpp"
#include "base/mapping.hpp"

namespace lodge::kvm::soft {

class BinaryStatistics {
 public:
  // `id`: "kvm-PID" and so on. `names`: of cumulative counters without a unit. Throws std::system_error.
  BinaryStatistics(const std::string& id, std::span<const char* const> names);

  // One for each name, in that order.
  std::span<std::atomic<uint64_t>> values() noexcept { return values_; }
  // A new descriptor to read from, with a position of its own.
  Fd open() const;

 private:
  const Fd file_;
  Mapping mapping_;
  std::span<std::atomic<uint64_t>> values_;
};

// Counters that become such a file when somebody asks for it: until then they cost no descriptor.
template <size_t Count>
class Counters {
 public:
  std::atomic<uint64_t>& operator[](size_t index) noexcept { return current_[index]; }
  uint64_t value(size_t index) const noexcept { return current_[index].load(std::memory_order_relaxed); }
  // By the one thread that counts; another may read.
  void count(size_t index) noexcept {
    std::atomic<uint64_t>& counter = current_[index];
    counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  // KVM_GET_STATS_FD. While nobody counts.
  Fd open(const std::string& id, const std::array<const char*, Count>& names) {
    if (!file_) {
      file_ = std::make_unique<BinaryStatistics>(id, names);
      for (size_t i = 0; i < Count; ++i) file_->values()[i] = own_[i].load();
      current_ = file_->values().data();
    }
    return file_->open();
  }

 private:
  std::array<std::atomic<uint64_t>, Count> own_{};
  std::atomic<uint64_t>* current_ = own_.data();
  std::unique_ptr<BinaryStatistics> file_;
};

}  // namespace lodge::kvm::soft
