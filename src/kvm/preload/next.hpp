// How a function of the library finds the C library's of the same name, and is seen by the client.
#pragma once

#include <atomic>

#include "kvm/preload/real.hpp"

#define LODGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace lodge::kvm::preload {

// Found at the first call and then kept: two threads that find it at once find the same.
template <class Function>
class Next {
 public:
  constexpr explicit Next(const char* name) : name_(name) {}
  Function get() noexcept {
    void* found = found_.load(std::memory_order_acquire);
    if (found == nullptr) {
      found = real::next(name_);
      found_.store(found, std::memory_order_release);
    }
    return reinterpret_cast<Function>(found);
  }

 private:
  const char* const name_;
  std::atomic<void*> found_{nullptr};
};

}  // namespace lodge::kvm::preload
