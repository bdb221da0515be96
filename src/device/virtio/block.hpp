// The block device: a disk image as /dev/vda.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "block/image.hpp"
#include "device/disk.hpp"
#include "device/virtio/depth.hpp"
#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

// Requests go to the image as they come out of the queues, and complete on the image's threads or within the
// call, in any order. The device's lock is not held meanwhile. Where a vCPU may serve its own kick it does so
// for a driver that waits for each answer; the loop serves one that keeps several requests out.
class Block final : public Device, public Disk {
 public:
  struct Config {
    std::string serial;  // at most max_serial bytes; what the guest shows as the disk's serial number
    unsigned queues = 1;
    std::string name = {};  // for its owner
  };
  static constexpr unsigned max_queues = 16;
  static constexpr size_t max_serial = 20;

  // The image outlives machine resets, so it may be shared with the device that comes after this one.
  Block(machine::GuestMemory& memory, std::shared_ptr<block::Image> image, Config config,
        const RingFeatures& rings = {});
  // Waits for the requests that are out.
  ~Block() override;

  const std::string& name() const noexcept override { return config_.name; }
  uint64_t size() const noexcept override { return image_->size(); }
  std::string_view format() const noexcept override { return image_->format(); }
  bool read_only() const noexcept override { return image_->read_only(); }
  Counts counts() const noexcept override;
  int resize(uint64_t bytes) noexcept override;

  // Tells the driver the image's present size.
  void resized() noexcept;

 private:
  // A request on its way through the image. Its thread owns it until the image has it, then the lock.
  struct Request {
    unsigned queue = 0;
    uint32_t type = 0;
    Chain chain;
    uint64_t status_at = 0;  // the last byte of the writable part
    unsigned parts = 0;      // requests of the image that have not completed
    int error = 0;
    std::vector<Segment> pieces;  // of transfer(), kept for their allocations
    std::vector<iovec> buffers;
  };
  // What is taken out of a queue before any of it is given to the image.
  static constexpr unsigned batch_size = 32;
  struct Batch {
    std::array<Request*, batch_size> requests;
    unsigned size = 0;   // of them
    unsigned taken = 0;  // chains, also those that came back at once
    bool broken = false;
  };

  void serve(unsigned queue, std::unique_lock<std::mutex>& lock) noexcept override;
  bool hands_over(unsigned queue) noexcept override { return loop_ && depth_[queue].hand_over(); }
  void attached(EventLoop& loop) override { loop_ = &loop; }
  unsigned config_size() const noexcept override;
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void quiesce(std::unique_lock<std::mutex>& lock, int queue) noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  // What the loop still has to interrupt for.
  struct Telling {
    std::chrono::steady_clock::time_point last;
    bool owed = false;
  };

  // With the lock held.
  void tell(unsigned queue, Telling& telling) noexcept;
  bool await_more(unsigned queue, std::unique_lock<std::mutex>& lock, Telling& telling) noexcept;
  Batch take(unsigned queue) noexcept;
  Request& idle_request() noexcept;
  void complete(Request& request, uint8_t status) noexcept;
  void count(const Request& request, uint8_t status) noexcept;
  // Without it.
  void issue(const Batch& batch) noexcept;
  uint8_t begin(Request& request) noexcept;
  uint8_t transfer(Request& request, bool write, uint64_t sector) noexcept;
  uint8_t change_ranges(Request& request, bool zero) noexcept;
  uint8_t identify(const Request& request) noexcept;
  bool inside(uint64_t sector, uint64_t bytes) const noexcept;
  block::Completion part(Request& request) noexcept;
  void part_done(Request& request, int error) noexcept;

  std::shared_ptr<block::Image> image_;
  Config config_;
  std::deque<Request> requests_;  // as many as were ever out at a time
  std::vector<Request*> idle_;    // those that are not
  unsigned out_ = 0;
  std::array<unsigned, max_queues> out_of_{};  // requests that the image has, by queue
  std::array<unsigned, max_queues>
      servants_{};  // threads in serve(): they interrupt for what completes meanwhile
  std::condition_variable came_back_;
  EventLoop* loop_ = nullptr;
  std::array<Depth, max_queues> depth_;
  Counts counts_;
};

}  // namespace lodge::device::virtio
