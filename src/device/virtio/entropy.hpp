// The entropy device: random bytes from the host's kernel.
#pragma once

#include <functional>

#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

class Entropy final : public Device {
 public:
  // Fills a buffer with random bytes: getrandom(2), or something repeatable in tests.
  using Source = std::function<void(std::span<uint8_t>)>;
  explicit Entropy(machine::GuestMemory& memory, const RingFeatures& rings = {},
                   Source source = host_entropy);

  static void host_entropy(std::span<uint8_t> out);

 private:
  // A request gets at most this much: enough for any pool, and the loop is not held for long.
  static constexpr size_t largest_answer = 64 * 1024;

  void process(unsigned queue) noexcept override;
  uint32_t fill(const Chain& chain) noexcept;

  Source source_;
  Chain chain_;
};

}  // namespace lodge::device::virtio
