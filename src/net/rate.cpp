// Rate limits: a token bucket for each direction, of the payload and its Ethernet header.
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <mutex>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "base/token_bucket.hpp"
#include "net/interposer.hpp"

namespace lodge::net {

namespace {

using Clock = TokenBucket::Clock;

class RateLimited final : public Interposer {
 public:
  RateLimited(std::unique_ptr<Backend> limited, const RateLimit& limit)
      : Interposer(std::move(limited)),
        timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)),
        sent_(TokenBucket::of(limit.rate, limit.burst)),
        received_(TokenBucket::of(limit.rate, limit.burst)) {
    if (!timer_) throw_errno("timerfd_create");
  }
  ~RateLimited() override { watch_.reset(); }

  void connect(Card& plugged, EventLoop& loop) noexcept override {
    Interposer::connect(plugged, loop);
    watch_ = loop.watch(timer_.get(), EPOLLIN, [this](uint32_t) { go_on(); });
  }
  void disconnect() noexcept override {
    watch_.reset();
    Interposer::disconnect();
  }
  bool send(unsigned queue, const PacketHeader& header, std::span<const iovec> frame) noexcept override {
    if (!sent_.may_pass(*this)) return false;
    if (!network().send(queue, header, frame)) return false;
    sent_.pass(total_size(frame));
    return true;
  }

 private:
  // One direction. What has to wait is told when the time has come.
  struct Direction {
    TokenBucket bucket;
    std::mutex mutex;
    bool waits = false;
    explicit Direction(const TokenBucket& filled) : bucket(filled) {}
    bool may_pass(RateLimited& owner) noexcept {
      const std::lock_guard lock(mutex);
      const auto when = bucket.free_at();
      if (when <= Clock::now()) return true;
      waits = true;
      owner.wake_at(when);
      return false;
    }
    void pass(size_t size) noexcept {
      const std::lock_guard lock(mutex);
      bucket.pay(static_cast<double>(size), Clock::now());
    }
    bool take_waiting() noexcept {
      const std::lock_guard lock(mutex);
      return std::exchange(waits, false);
    }
  };
  // Says that there is nothing while the time has not come.
  class Limited final : public Source {
   public:
    Limited(Source& source, RateLimited& owner) : source_(source), owner_(owner) {}
    size_t largest() noexcept override {
      const size_t size = source_.largest();
      if (size == 0 || owner_.received_.may_pass(owner_)) return size;
      held_back_ = true;
      return 0;
    }
    size_t read(PacketHeader& header, std::span<const iovec> room) noexcept override {
      const size_t size = source_.read(header, room);
      if (size != 0) owner_.received_.pass(size);
      return size;
    }
    bool held_back() const noexcept { return held_back_; }

   private:
    Source& source_;
    RateLimited& owner_;
    bool held_back_ = false;
  };
  // What waits for the time waits, for the network, for room.
  Received receive(unsigned queue, Source& source) noexcept override {
    Limited limited(source, *this);
    const Received result = card().receive(queue, limited);
    return limited.held_back() ? Received::full : result;
  }

  void wake_at(Clock::time_point when) noexcept {
    const std::lock_guard lock(timer_mutex_);
    if (when >= armed_for_) return;
    armed_for_ = when;
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count();
    const itimerspec at{{}, {ns / 1'000'000'000, ns % 1'000'000'000}};
    ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &at, nullptr);
  }
  void go_on() noexcept {
    uint64_t count;
    if (::read(timer_.get(), &count, sizeof count) != sizeof count) return;
    {
      const std::lock_guard lock(timer_mutex_);
      armed_for_ = Clock::time_point::max();
    }
    // Who waits for longer than that asks for the time again.
    const bool sending = sent_.take_waiting(), receiving = received_.take_waiting();
    for (unsigned queue = 0; queue < queues(); queue++) {
      if (sending) card().transmit_ready(queue);
      if (receiving) network().receive_ready(queue);
    }
  }

  Fd timer_;
  std::mutex timer_mutex_;  // a leaf, as those of the directions, which come before it
  Clock::time_point armed_for_ = Clock::time_point::max();
  Direction sent_, received_;
  EventLoop::Watch watch_;
};

}  // namespace

std::unique_ptr<Backend> limit_rate(std::unique_ptr<Backend> network, const RateLimit& limit) {
  return std::make_unique<RateLimited>(std::move(network), limit);
}

}  // namespace lodge::net
