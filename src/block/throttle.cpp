#include "block/throttle.hpp"

namespace lodge::block {
namespace {

constexpr std::chrono::milliseconds default_burst{100};
// What one request costs, or a burst holds, at most: so that no sum leaves the clock's range.
constexpr std::chrono::duration<double> longest{3600};

}  // namespace

ThrottledImage::Bucket ThrottledImage::bucket(uint64_t rate, uint64_t burst) noexcept {
  Bucket bucket{.per_second = static_cast<double>(rate), .burst = default_burst};
  if (rate != 0 && burst != 0)
    bucket.burst = std::chrono::duration_cast<Clock::duration>(
        std::min(std::chrono::duration<double>(static_cast<double>(burst) / bucket.per_second), longest));
  return bucket;
}

ThrottledImage::ThrottledImage(std::unique_ptr<Image> image, const RateLimits& limits)
    : image_(std::move(image)),
      operations_(bucket(limits.operations, limits.operations_burst)),
      bytes_(bucket(limits.bytes, limits.bytes_burst)) {
  thread_ = std::thread([this] { loop(); });
}

ThrottledImage::~ThrottledImage() {
  close();
}

ThrottledImage::Clock::time_point ThrottledImage::charge(Bucket& bucket, double amount,
                                                         Clock::time_point now) noexcept {
  if (bucket.per_second <= 0) return now;
  const Clock::time_point start = bucket.paid_until - bucket.burst;
  const auto cost = std::chrono::duration_cast<Clock::duration>(
      std::min(std::chrono::duration<double>(amount / bucket.per_second), longest));
  bucket.paid_until = std::max(bucket.paid_until, now) + cost;
  return start;
}

void ThrottledImage::admit(uint64_t bytes, Start start) noexcept {
  {
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    const auto by_count = charge(operations_, 1, now),
               by_size = charge(bytes_, static_cast<double>(bytes), now);
    const auto when = std::max(by_count, by_size);
    if (when > now || !queue_.empty()) {
      queue_.emplace_back(when, std::move(start));
      wake_.notify_one();
      return;
    }
  }
  start();
}

void ThrottledImage::loop() noexcept {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (queue_.empty()) {
      wake_.wait(lock);
      continue;
    }
    const auto when = queue_.front().first;
    if (when > Clock::now()) {
      wake_.wait_until(lock, when);
      continue;
    }
    Start start = std::move(queue_.front().second);
    queue_.pop_front();
    lock.unlock();
    start();
    lock.lock();
  }
}

void ThrottledImage::read(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept {
  admit(total_length(buffers),
        [this, list = std::vector(buffers.begin(), buffers.end()), offset,
         done = inflight_.enter(std::move(done))]() mutable { image_->read(list, offset, std::move(done)); });
}

void ThrottledImage::write(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept {
  admit(total_length(buffers), [this, list = std::vector(buffers.begin(), buffers.end()), offset,
                                done = inflight_.enter(std::move(done))]() mutable {
    image_->write(list, offset, std::move(done));
  });
}

void ThrottledImage::write_zeroes(uint64_t offset, uint64_t length, bool unmap, Completion done) noexcept {
  admit(length, [this, offset, length, unmap, done = inflight_.enter(std::move(done))]() mutable {
    image_->write_zeroes(offset, length, unmap, std::move(done));
  });
}

int ThrottledImage::close() noexcept {
  inflight_.wait();
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
  return image_->close();
}

}  // namespace lodge::block
