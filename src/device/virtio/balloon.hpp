// The balloon: memory that the guest gives back to the host.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>

#include "base/clock.hpp"
#include "device/virtio/device.hpp"
#include "device/virtio/squeeze.hpp"

namespace lodge::device::virtio {

class Balloon final : public Device {
 public:
  // What the driver has last told of its memory, by the specification's tags (5.5.6.3); UINT64_MAX: not told.
  static constexpr unsigned statistic_tags = 10;
  using Statistics = std::array<uint64_t, statistic_tags>;

  explicit Balloon(machine::GuestMemory& memory, const RingFeatures& rings = {});

  // From now on inflates for a moment when the guest's reports say that it has freed memory (squeeze.hpp).
  // Before the device is used; `clock` outlives it.
  void collect_free_memory(Clock& clock);

  // How much the guest shall do without, in bytes; at most all of its memory. Takes effect as its driver
  // allows: a guest that runs out of memory takes it back (DEFLATE_ON_OOM).
  void set_target(uint64_t bytes) noexcept;
  uint64_t target() noexcept;
  // How much it does without now, by its own account.
  uint64_t actual() noexcept;
  // Asks for new statistics; false when the driver has not offered any since the last time.
  bool request_statistics() noexcept;
  Statistics statistics() noexcept;
  // Asks, and waits for what the driver answers; false when that has not come in time. Not from the thread
  // that serves the queues.
  bool refresh_statistics(std::chrono::milliseconds patience) noexcept;

  // Free page hinting (5.5.6.5): the driver names all its free memory, which whoever saves or moves the
  // machine need not copy if the guest has not written to it since begin_hinting(). Nothing is given back to
  // the host: the driver may use a page again before the device has seen the hint.
  enum class Hinting : uint8_t {
    none,
    asked,     // the driver has not answered yet
    running,   // it names pages
    complete,  // it has named all that it could; it holds them until finish_hinting()
  };
  // False when the guest's driver does not know how, or a round is not finished.
  bool begin_hinting() noexcept;
  // The driver may use the pages again; they are not known any more. Also after loading a saved state in
  // which hinting() is not none.
  void finish_hinting() noexcept;
  Hinting hinting() noexcept;
  uint64_t hinted_bytes() noexcept;
  bool is_hinted(uint64_t gpa) noexcept;

  // Bytes given back to the host so far, by inflating and by reports of free pages.
  uint64_t released() const noexcept { return released_; }

 private:
  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override { return 16; }
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void config_written(unsigned offset, std::span<const uint8_t> data) noexcept override;
  void was_reset() noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  void inflate() noexcept;
  void deflate() noexcept;
  void take_statistics() noexcept;
  bool give_statistics_back() noexcept;
  void take_reports(unsigned queue) noexcept;
  void begin_squeeze() noexcept;
  void end_squeeze() noexcept;
  void take_hints(unsigned queue) noexcept;
  void take_hint_command(uint32_t command) noexcept;
  void note_hint(uint64_t gpa, uint64_t size) noexcept;
  bool is_noted(uint64_t page) const noexcept { return hints_[page / 64] >> page % 64 & 1; }
  void end_hinting(uint32_t command) noexcept;

  uint32_t target_pages_ = 0, actual_pages_ = 0;
  Statistics statistics_{};
  uint64_t statistics_taken_ = 0;  // how often
  std::condition_variable statistics_came_;
  std::atomic<uint64_t> released_ = 0;

  Hinting hinting_ = Hinting::none;
  uint32_t hint_command_ = 0, next_hint_command_;  // what the configuration shows, and a round's next name
  std::vector<uint64_t> hints_;                    // a bit for each page of RAM, while hinting
  uint64_t hinted_pages_ = 0;

  Clock* clock_ = nullptr;  // null: nothing is collected
  Squeeze squeeze_;
  bool squeeze_asked_ = false;            // statistics were asked for to decide
  uint32_t squeeze_pages_ = 0;            // beyond the target, for the moment
  std::unique_ptr<Timer> squeeze_timer_;  // last: its callback uses the others
  Chain chain_;
};

}  // namespace lodge::device::virtio
