#include "block/throttle.hpp"

namespace lodge::block {

ThrottledImage::ThrottledImage(std::unique_ptr<Image> image, const RateLimits& limits)
    : image_(std::move(image)),
      operations_(TokenBucket::of(limits.operations, limits.operations_burst)),
      bytes_(TokenBucket::of(limits.bytes, limits.bytes_burst)) {
  thread_ = std::thread([this] { loop(); });
}

ThrottledImage::~ThrottledImage() {
  close();
}

void ThrottledImage::admit(uint64_t bytes, Start start) noexcept {
  {
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    const auto when = std::max(operations_.free_at(), bytes_.free_at());
    operations_.pay(1, now);
    bytes_.pay(static_cast<double>(bytes), now);
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
