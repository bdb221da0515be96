// A folder of the host as a file system of the guest.
#pragma once

#include <condition_variable>
#include <memory>
#include <string>

#include "device/virtio/device.hpp"
#include "share/fuse.hpp"

namespace lodge::device::virtio {

// Requests are served one after another on the thread that kicks, without the device's lock: a slow disk of
// the host holds up this device and no vCPU.
class FileSystem final : public Device {
 public:
  static constexpr size_t max_tag = 36;
  // The tag is what the guest mounts: 1 to max_tag bytes.
  FileSystem(machine::GuestMemory& memory, std::shared_ptr<const share::Folder> folder, std::string tag,
             const share::FuseServer::Config& config, const RingFeatures& rings = {});

  // A part of what this process may have open, so that a guest leaves enough to the rest of its machine.
  static size_t files_that_may_be_open() noexcept;

 private:
  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override;
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void quiesce(std::unique_lock<std::mutex>& lock, int queue) noexcept override;
  void was_reset() noexcept override { server_.reset(); }
  void save_device(nlohmann::json& json) const override { server_.save(json); }
  void load_device(const nlohmann::json& json) override { server_.load(json); }

  std::string tag_;
  share::FuseServer
      server_;  // used by whoever has set `serving_`, or by anyone with the lock while it is not
  bool serving_ = false;
  std::condition_variable served_;
  Chain chain_;
};

}  // namespace lodge::device::virtio
