// What the formats share about requests.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <numeric>

#include "block/image.hpp"

namespace lodge::block {

inline uint64_t total_length(std::span<const iovec> buffers) noexcept {
  return std::accumulate(buffers.begin(), buffers.end(), uint64_t{0},
                         [](uint64_t sum, const iovec& buffer) { return sum + buffer.iov_len; });
}

// Copies the first bytes of a scatter-gather list; fewer if it is shorter.
inline void gather(std::span<const iovec> buffers, std::span<uint8_t> to) noexcept {
  for (const auto& buffer : buffers) {
    const size_t size = std::min(buffer.iov_len, to.size());
    if (size == 0) continue;
    std::memcpy(to.data(), buffer.iov_base, size);
    to = to.subspan(size);
  }
}

// Counts requests in flight, so that closing can wait for them.
class Inflight {
 public:
  // The completion that, when called, calls `done` and then counts the request as ended.
  Completion enter(Completion done) noexcept {
    {
      const std::lock_guard lock(mutex_);
      count_++;
    }
    return [this, done = std::move(done)](int error) mutable {
      done(error);
      done = nullptr;  // what it holds may be what waits for us
      // Under the lock to its end: wait() cannot return, and its caller destroy this, while it is in use
      // here.
      const std::lock_guard lock(mutex_);
      if (--count_ == 0) idle_.notify_all();
    };
  }
  void wait() noexcept {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return count_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable idle_;
  uint64_t count_ = 0;
};

}  // namespace lodge::block
