// The card's end for tests of back ends.
#pragma once

#include <unistd.h>

#include <atomic>
#include <mutex>
#include <vector>

#include "net/backend.hpp"

namespace lodge::net::testing {

using Bytes = std::vector<uint8_t>;

// Takes packets as long as `room` is set, and keeps them.
class Listener final : public Card {
 public:
  Received receive(unsigned queue, Source& source) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!room) return Received::full;
    last_queue = queue;
    for (unsigned i = 0; i < 16; i++) {
      const size_t largest = source.largest();
      if (largest == 0) return Received::all;
      Bytes frame(largest);
      // In two pieces, as guests have them.
      const size_t first = std::min<size_t>(largest, 20);
      const iovec pieces[] = {{frame.data(), first}, {frame.data() + first, largest - first}};
      PacketHeader header;
      const size_t size = source.read(header, pieces);
      if (size == 0) return Received::all;
      frame.resize(size);
      frames_.push_back(std::move(frame));
      headers_.push_back(header);
    }
    return Received::some;
  }
  void transmit_ready(unsigned) noexcept override { ready++; }
  void set_link(bool up) noexcept override { link = up; }

  // Waits for a frame for which `matches` holds.
  template <class Matches>
  bool saw(Matches matches, int milliseconds = 20000) {
    return eventually(
        [&] {
          const std::lock_guard lock(mutex_);
          for (const auto& frame : frames_)
            if (matches(frame)) return true;
          return false;
        },
        milliseconds);
  }
  bool saw_frame(const Bytes& wanted) {
    return saw([&](const Bytes& frame) { return frame == wanted; });
  }
  template <class Condition>
  static bool eventually(Condition holds, int milliseconds = 20000) {
    for (int i = 0; i < milliseconds; i++) {
      if (holds()) return true;
      ::usleep(1000);
    }
    return false;
  }
  std::vector<Bytes> frames() {
    const std::lock_guard lock(mutex_);
    return frames_;
  }
  PacketHeader header_of(size_t index) {
    const std::lock_guard lock(mutex_);
    return headers_.at(index);
  }

  std::atomic<bool> room = true, link = true;
  std::atomic<unsigned> ready = 0, last_queue = 0;

 private:
  std::mutex mutex_;
  std::vector<Bytes> frames_;
  std::vector<PacketHeader> headers_;
};

// As a card sends it: in two pieces.
inline bool send(Backend& backend, Bytes frame, const PacketHeader& header = {}, unsigned queue = 0) {
  const size_t first = frame.size() / 2;
  const iovec pieces[] = {{frame.data(), first}, {frame.data() + first, frame.size() - first}};
  const bool sent = backend.send(queue, header, pieces);
  backend.flush(queue);
  return sent;
}

inline Bytes frame_of(size_t size, uint8_t seed = 1) {
  Bytes frame(size);
  for (size_t i = 0; i < size; i++) frame[i] = static_cast<uint8_t>(i * 7 + i / 256 + seed);
  return frame;
}

}  // namespace lodge::net::testing
