// The block device: a disk image as /dev/vda.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "block/image.hpp"
#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

// Requests go to the image as they come out of the queues and complete on the image's threads, in any order.
// A completion takes the device's lock, unless it is called within the request itself.
class Block final : public Device {
 public:
  struct Config {
    std::string serial;  // at most max_serial bytes; what the guest shows as the disk's serial number
    unsigned queues = 1;
  };
  static constexpr unsigned max_queues = 16;
  static constexpr size_t max_serial = 20;

  // The image outlives machine resets, so it may be shared with the device that comes after this one.
  Block(machine::GuestMemory& memory, std::shared_ptr<block::Image> image, Config config,
        const RingFeatures& rings = {});
  // Waits for the requests that are out.
  ~Block() override;

  // Tells the driver the image's present size.
  void resized() noexcept;

 private:
  // A request on its way through the image.
  struct Request {
    unsigned queue;
    Chain chain;
    uint64_t status_at;  // the last byte of the writable part
    unsigned parts = 0;  // requests of the image that have not completed
    int error = 0;
  };
  using Pointer = std::shared_ptr<Request>;

  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override;
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void quiesce(std::unique_lock<std::mutex>& lock, int queue) noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  void take(unsigned queue, const Chain& chain) noexcept;
  uint8_t begin(const Pointer& request, uint32_t type, uint64_t sector) noexcept;
  uint8_t transfer(const Pointer& request, bool write, uint64_t sector) noexcept;
  uint8_t change_ranges(const Pointer& request, bool zero) noexcept;
  uint8_t identify(const Request& request) noexcept;
  bool inside(uint64_t sector, uint64_t bytes) const noexcept;
  block::Completion part(const Pointer& request) noexcept;
  void part_done(const Pointer& request, int error) noexcept;
  void complete(const Request& request, uint8_t status) noexcept;

  std::shared_ptr<block::Image> image_;
  Config config_;
  unsigned out_ = 0;
  std::array<unsigned, max_queues> out_of_{};  // requests that the image has, by queue
  std::condition_variable came_back_;
  // The thread that is giving requests to the image, with the lock held: completions on it must not take it
  // again.
  std::atomic<std::thread::id> giving_;
  Chain chain_;
};

}  // namespace lodge::device::virtio
