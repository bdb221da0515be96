// Rate limits on an image.
#pragma once

#include <deque>
#include <thread>

#include "base/token_bucket.hpp"
#include "block/requests.hpp"

namespace lodge::block {

// Passes requests on, in order, no faster than the limits: each limit has a bucket that fills at its rate and
// holds a burst. Reads, writes and write-zeroes count; flush and discard do not.
class ThrottledImage final : public Image {
 public:
  ThrottledImage(std::unique_ptr<Image> image, const RateLimits& limits);
  ~ThrottledImage() override;

  void read(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void write(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void flush(Completion done) noexcept override { image_->flush(std::move(done)); }
  void discard(uint64_t offset, uint64_t length, Completion done) noexcept override {
    image_->discard(offset, length, std::move(done));
  }
  void write_zeroes(uint64_t offset, uint64_t length, bool unmap, Completion done) noexcept override;
  void resize(uint64_t size, Completion done) noexcept override { image_->resize(size, std::move(done)); }
  void plug() noexcept override { image_->plug(); }
  void unplug() noexcept override { image_->unplug(); }
  uint64_t size() const noexcept override { return image_->size(); }
  bool read_only() const noexcept override { return image_->read_only(); }
  std::string_view format() const noexcept override { return image_->format(); }
  uint32_t block_size() const noexcept override { return image_->block_size(); }
  uint32_t discard_granularity() const noexcept override { return image_->discard_granularity(); }
  int close() noexcept override;

 private:
  using Clock = TokenBucket::Clock;
  using Start = std::move_only_function<void()>;

  void admit(uint64_t bytes, Start start) noexcept;
  void loop() noexcept;

  std::unique_ptr<Image> image_;
  std::mutex mutex_;
  std::condition_variable wake_;
  TokenBucket operations_, bytes_;
  std::deque<std::pair<Clock::time_point, Start>> queue_;
  bool stop_ = false;
  Inflight inflight_;
  std::thread thread_;
};

}  // namespace lodge::block
