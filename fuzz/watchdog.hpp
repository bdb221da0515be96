// Ends guests that loop.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "kvm/kvm.hpp"

namespace lodge::fuzz {

// Kicks a vCPU out of run() that has been watched for `patience`.
class Watchdog {
 public:
  explicit Watchdog(std::chrono::milliseconds patience) : patience_(patience) {}
  void start(kvm::Vcpu& vcpu) { set(&vcpu); }
  void stop() { set(nullptr); }

 private:
  void set(kvm::Vcpu* vcpu) {
    const std::lock_guard lock(mutex_);
    vcpu_ = vcpu;
    ++count_;
    wake_.notify_one();
  }
  void watch(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (wake_.wait(lock, stop, [this] { return vcpu_ != nullptr; })) {
      const uint64_t count = count_;
      if (!wake_.wait_for(lock, stop, patience_, [&] { return count_ != count; }) && vcpu_ != nullptr)
        vcpu_->kick();
    }
  }

  const std::chrono::milliseconds patience_;
  std::mutex mutex_;
  std::condition_variable_any wake_;
  kvm::Vcpu* vcpu_ = nullptr;
  uint64_t count_ = 0;
  std::jthread thread_{[this](const std::stop_token& stop) { watch(stop); }};
};

}  // namespace lodge::fuzz
