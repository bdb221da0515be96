// Random bytes as guest code for the translator: every block becomes host code before its first run. It must
// end in guest exceptions, a shutdown or the VMM's hands. A guest that loops is ended after some
// milliseconds.
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "cpu_guest.hpp"

namespace {

using namespace lodge;
constexpr unsigned max_exits = 16;
constexpr std::chrono::milliseconds patience{3};

// Kicks a vCPU out of run().
class Watchdog {
 public:
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
      if (!wake_.wait_for(lock, stop, patience, [&] { return count_ != count; }) && vcpu_ != nullptr)
        vcpu_->kick();
    }
  }

  std::mutex mutex_;
  std::condition_variable_any wake_;
  kvm::Vcpu* vcpu_ = nullptr;
  uint64_t count_ = 0;
  std::jthread thread_{[this](const std::stop_token& stop) { watch(stop); }};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static fuzz::Guest guest({.translate_after = 0, .superblock_after = 2, .code_cache = size_t{1} << 20});
  static Watchdog watchdog;
  if (size <= fuzz::header_size) return 0;
  const fuzz::Machine machine = fuzz::make_machine(guest, data, size);
  watchdog.start(*machine.vcpu);
  for (unsigned i = 0; i < max_exits; ++i) {
    const kvm::Exit exit = machine.vcpu->run();
    if (exit.interrupted() || !fuzz::answer(exit)) break;
  }
  watchdog.stop();
  return 0;
}
