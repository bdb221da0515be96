// A mutex for what is held for microseconds by threads that run all the time: whoever finds it taken looks
// again for a while before it sleeps, because waking a thread takes longer than the wait. When the holder has
// lost its processor, the wait ends in a sleep as everywhere.
#pragma once

#include <mutex>

namespace lodge {

// As std::mutex, and used with std::lock_guard.
class AdaptiveMutex {
 public:
  void lock() {
    for (unsigned i = 0; i < looks; ++i) {
      if (mutex_.try_lock()) return;
      __builtin_ia32_pause();
    }
    mutex_.lock();
  }
  bool try_lock() { return mutex_.try_lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static constexpr unsigned looks = 1000;  // some 10 to 40 microseconds
  std::mutex mutex_;
};

}  // namespace lodge
