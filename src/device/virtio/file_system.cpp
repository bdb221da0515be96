// File system device (VirtIO 1.2, section 5.11): carries FUSE to share/fuse.
//
// Modelled: the high priority queue (forget and interrupt) and one request queue. Not modelled: the DAX
// window, in which a guest would map the host's page cache; notifications, which no driver asks for.
#include "device/virtio/file_system.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <cstring>

namespace lodge::device::virtio {

namespace {

constexpr uint16_t hiprio_size = 128;
constexpr uint16_t request_size = 1024;  // 1 MiB a request in Linux, which wants a place for each page
constexpr uint32_t pci_class_storage_other = 0x018000;
constexpr size_t most_files = 16384;

class ChainMessage final : public share::Message {
 public:
  explicit ChainMessage(const Chain& chain) : chain_(chain) {}
  uint64_t request_size() const noexcept override { return chain_.readable_size(); }
  uint64_t room() const noexcept override { return chain_.writable_size(); }
  size_t read(uint64_t offset, std::span<uint8_t> out) const noexcept override {
    return chain_.read(offset, out);
  }
  size_t write(uint64_t offset, std::span<const uint8_t> data) noexcept override {
    return chain_.write(offset, data);
  }
  void request_pieces(uint64_t offset, uint64_t size, std::vector<iovec>& out) const override {
    std::vector<Segment> segments;
    chain_.cut_readable(offset, size, segments);
    for (const Segment& segment : segments) out.push_back({segment.bytes.data(), segment.bytes.size()});
  }
  void answer_pieces(uint64_t offset, uint64_t size, std::vector<iovec>& out) override {
    std::vector<Segment> segments;
    chain_.cut_writable(offset, size, segments);
    for (const Segment& segment : segments) out.push_back({segment.bytes.data(), segment.bytes.size()});
  }

 private:
  const Chain& chain_;
};

}  // namespace

FileSystem::FileSystem(machine::GuestMemory& memory, std::shared_ptr<const share::Folder> folder,
                       std::string tag, const share::FuseServer::Config& config, const RingFeatures& rings)
    : Device({.name = "virtio-fs",
              .type = DeviceType::file_system,
              .pci_class = pci_class_storage_other,
              .features = 0,
              .queue_sizes = {hiprio_size, request_size}},
             memory, rings),
      tag_(std::move(tag)),
      server_(std::move(folder), config) {}

size_t FileSystem::files_that_may_be_open() noexcept {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return std::clamp<size_t>(limit.rlim_cur / 4, 16, most_files);
}

void FileSystem::process(unsigned index) noexcept {
  if (serving_) return kick_later(index);  // another thread has kicked
  drain(index, chain_, [&](const Chain& chain) {
    if (!running()) return false;  // somebody waits to reset the device
    serving_ = true;
    mutex_.unlock();
    ChainMessage message(chain);
    const uint32_t written = server_.serve(message);
    mutex_.lock();
    serving_ = false;
    queue(index).push(chain, written);
    notify(index);  // the next request may take long
    served_.notify_all();
    return true;
  });
}

void FileSystem::quiesce(std::unique_lock<std::mutex>& lock, int) noexcept {
  served_.wait(lock, [this] { return !serving_; });
}

// 5.11.4
unsigned FileSystem::config_size() const noexcept {
  return max_tag + sizeof(uint32_t);
}

void FileSystem::config_bytes(std::span<uint8_t> out) const noexcept {
  std::memcpy(out.data(), tag_.data(), tag_.size());
  out[max_tag] = 1;  // request queues
}

}  // namespace lodge::device::virtio
