// Entropy device (VirtIO 1.2, section 5.4). One queue of writable buffers; nothing is missing.
#include "device/virtio/entropy.hpp"

#include <sys/random.h>

#include <algorithm>
#include <array>

namespace lodge::device::virtio {

namespace {
constexpr unsigned requestq = 0;
constexpr uint16_t queue_size = 64;
constexpr uint32_t pci_class_other = 0xff0000;
}  // namespace

Entropy::Entropy(machine::GuestMemory& memory, const RingFeatures& rings, Source source)
    : Device({.name = "virtio-rng",
              .type = DeviceType::entropy,
              .pci_class = pci_class_other,
              .features = 0,
              .queue_sizes = {queue_size}},
             memory, rings),
      source_(std::move(source)) {}

void Entropy::host_entropy(std::span<uint8_t> out) {
  while (!out.empty()) {
    const ssize_t count = ::getrandom(out.data(), out.size(), 0);
    if (count > 0) out = out.subspan(static_cast<size_t>(count));
  }
}

// 5.4.6: the device places at least one byte. A request without room for it is given back empty.
void Entropy::process(unsigned) noexcept {
  drain(requestq, chain_, [this](const Chain& chain) {
    queue(requestq).push(chain, fill(chain));
    return true;
  });
}

uint32_t Entropy::fill(const Chain& chain) noexcept {
  std::array<uint8_t, 4096> bytes;
  const auto wanted = static_cast<size_t>(std::min<uint64_t>(chain.writable_size(), largest_answer));
  size_t done = 0;
  while (done < wanted) {
    const std::span<uint8_t> piece(bytes.data(), std::min(bytes.size(), wanted - done));
    source_(piece);
    done += chain.write(done, piece);
  }
  return static_cast<uint32_t>(done);
}

}  // namespace lodge::device::virtio
