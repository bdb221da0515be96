// When a balloon is inflated for a moment, to collect free memory that the host still holds.
//
// Linux reports free pages a part at a time (a sixteenth of its free lists every two seconds, at least 64
// blocks) and in blocks of 2 MiB or more, so fragments stay with the host for ever. Inflating takes small
// blocks first and as fast as the guest runs, and deflating at once leaves the guest its memory.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lodge::device::virtio {

// The policy alone. Not synchronised: its device guards it. Times are nanoseconds of a Clock.
class Squeeze {
 public:
  struct Memory {
    uint64_t size;      // bytes of the machine
    uint64_t resident;  // of it held by the host
    uint64_t free;      // by the guest's own account
    uint64_t balloon;   // what it does without already
  };

  // Whether it is time to ask the guest how much is free.
  bool due(uint64_t now) const noexcept { return now >= next_; }

  // By how many bytes to inflate now; 0: it is not worth it. The guest keeps a tenth of its memory free for
  // what it needs meanwhile.
  uint64_t begin(const Memory& memory, uint64_t now) noexcept {
    next_ = now + pause_;
    const uint64_t used = memory.size - std::min(memory.size, memory.free + memory.balloon);
    const uint64_t held = std::min(memory.resident - std::min(memory.resident, used), memory.free);
    const uint64_t reserve = std::max(memory.size / 10, min_reserve);
    const uint64_t amount = std::min(held, memory.free - std::min(memory.free, reserve));
    if (amount < std::max(memory.size / 32, min_amount)) return 0;
    amount_ = amount;
    resident_ = memory.resident;
    return amount;
  }

  // The balloon has been inflated, or as far as it went. What did not pay is done less often.
  void end(uint64_t resident, uint64_t now) noexcept {
    const uint64_t fallen = resident_ - std::min(resident_, resident);
    pause_ = fallen >= amount_ / 4 ? first_pause : std::min(2 * pause_, longest_pause);
    next_ = now + pause_;
  }

 private:
  static constexpr uint64_t MiB = 1 << 20, second = 1'000'000'000;
  static constexpr uint64_t min_reserve = 64 * MiB, min_amount = 16 * MiB;
  static constexpr uint64_t first_pause = second, longest_pause = 600 * second;

  uint64_t next_ = 0, pause_ = first_pause;
  uint64_t amount_ = 0, resident_ = 0;  // when the last one began
};

}  // namespace lodge::device::virtio
