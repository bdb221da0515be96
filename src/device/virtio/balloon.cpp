// Traditional memory balloon device (VirtIO 1.2, section 5.5).
//
// Modelled: inflating and deflating, statistics, deflating when the guest runs out of memory, reporting of
// free pages. Pages go back to the host at once and are zeros when the guest touches them again. Not
// modelled: hinting of free pages (5.5.6.4; it serves migration), page poison (a guest that poisons with a
// pattern does not report then).
#include "device/virtio/balloon.hpp"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::device::virtio {

namespace {

constexpr uint64_t F_STATS_VQ = feature(1), F_DEFLATE_ON_OOM = feature(2), F_PAGE_REPORTING = feature(5);
constexpr unsigned inflateq = 0, deflateq = 1, first_optional = 2;
constexpr uint16_t queue_size = 64;
constexpr uint32_t pci_class_other = 0xff0000;
constexpr uint64_t page_size = 4096;
constexpr unsigned ACTUAL = 4;  // offset in the configuration
// Of one request; Linux puts 256 page numbers into one.
constexpr uint64_t max_page_numbers = 64 * 1024;
struct [[gnu::packed]] StatisticEntry {
  uint16_t tag;
  uint64_t value;
};

struct BalloonState {
  static constexpr std::string_view name = "virtio-balloon";
  static constexpr unsigned version = 1;
  uint32_t target_pages = 0, actual_pages = 0;
  Balloon::Statistics statistics{};
  template <class V>
  void visit(V& v) {
    v("target_pages", target_pages), v("actual_pages", actual_pages), v("statistics", statistics);
  }
};

}  // namespace

Balloon::Balloon(machine::GuestMemory& memory, const RingFeatures& rings)
    : Device({.name = "virtio-balloon",
              .type = DeviceType::balloon,
              .pci_class = pci_class_other,
              .features = F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING,
              .queue_sizes = {queue_size, queue_size, queue_size, queue_size}},
             memory, rings) {
  statistics_.fill(UINT64_MAX);
}

// --- For the host

void Balloon::set_target(uint64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  target_pages_ = static_cast<uint32_t>(std::min(bytes, memory_.size()) / page_size);
  config_changed();
}

uint64_t Balloon::target() noexcept {
  const std::lock_guard lock(mutex_);
  return target_pages_ * page_size;
}

uint64_t Balloon::actual() noexcept {
  const std::lock_guard lock(mutex_);
  return actual_pages_ * page_size;
}

Balloon::Statistics Balloon::statistics() noexcept {
  const std::lock_guard lock(mutex_);
  return statistics_;
}

// --- Queues

// Which optional queues there are, and so their numbers, is a matter of the negotiated features.
void Balloon::process(unsigned index) noexcept {
  const unsigned statisticsq = has_feature(F_STATS_VQ) ? first_optional : ~0u;
  const unsigned reportingq = has_feature(F_PAGE_REPORTING) ? first_optional + has_feature(F_STATS_VQ) : ~0u;
  if (index == inflateq) return inflate();
  if (index == deflateq) return deflate();
  if (index == statisticsq) return take_statistics();
  if (index == reportingq) return take_reports(index);
}

void Balloon::inflate() noexcept {
  drain(inflateq, chain_, [this](const Chain& chain) {
    const uint64_t count = std::min(chain.readable_size() / sizeof(uint32_t), max_page_numbers);
    uint64_t first = 0, length = 0;  // neighbours go back together
    for (uint64_t done = 0; done < count;) {
      std::array<uint32_t, 256> numbers;
      const size_t size = std::min<uint64_t>(count - done, numbers.size());
      chain.read(done * sizeof(uint32_t),
                 {reinterpret_cast<uint8_t*>(numbers.data()), size * sizeof(uint32_t)});
      for (size_t i = 0; i < size; i++) {
        const uint64_t gpa = numbers[i] * page_size;
        if (length != 0 && gpa == first + length) {
          length += page_size;
          continue;
        }
        if (length != 0 && gpa + page_size == first) {  // Linux takes pages from the top down
          first = gpa;
          length += page_size;
          continue;
        }
        if (length != 0) released_ += memory_.release(first, length);
        first = gpa;
        length = page_size;
      }
      done += size;
    }
    if (length != 0) released_ += memory_.release(first, length);
    queue(inflateq).push(chain, 0);
    return true;
  });
}

// The memory comes back when the guest touches it.
void Balloon::deflate() noexcept {
  drain(deflateq, chain_, [this](const Chain& chain) {
    queue(deflateq).push(chain, 0);
    return true;
  });
}

// 5.5.6.3: the driver's buffer stays with the device until statistics are wanted again. It is left in the
// queue, so that nothing is out when the machine is saved.
void Balloon::take_statistics() noexcept {
  drain(first_optional, chain_, [this](const Chain& chain) {
    std::array<StatisticEntry, 32> entries;
    const size_t size = chain.read(0, {reinterpret_cast<uint8_t*>(entries.data()), sizeof entries});
    for (const StatisticEntry& entry : std::span(entries).first(size / sizeof(StatisticEntry)))
      if (entry.tag < statistics_.size()) statistics_[entry.tag] = entry.value;
    return false;
  });
}

bool Balloon::request_statistics() noexcept {
  const std::lock_guard lock(mutex_);
  if (!running() || !has_feature(F_STATS_VQ)) return false;
  Queue& from = queue(first_optional);
  if (from.pop(chain_) != Pop::chain) return false;
  from.push(chain_, 0);
  from.want_kicks(true);
  notify(first_optional);
  return true;
}

void Balloon::take_reports(unsigned index) noexcept {
  drain(index, chain_, [&](const Chain& chain) {
    for (const Segment& segment : chain.writable())
      released_ += memory_.release(segment.gpa, segment.bytes.size());
    queue(index).push(chain, 0);
    return true;
  });
}

// --- Configuration and state

void Balloon::config_bytes(std::span<uint8_t> out) const noexcept {
  std::memcpy(out.data(), &target_pages_, sizeof target_pages_);
  std::memcpy(out.data() + ACTUAL, &actual_pages_, sizeof actual_pages_);
}

void Balloon::config_written(unsigned offset, std::span<const uint8_t> data) noexcept {
  if (offset == ACTUAL && data.size() >= sizeof actual_pages_)
    std::memcpy(&actual_pages_, data.data(), sizeof actual_pages_);
}

void Balloon::was_reset() noexcept {
  actual_pages_ = 0;
  statistics_.fill(UINT64_MAX);
}

void Balloon::save_device(nlohmann::json& json) const {
  save_state(BalloonState{target_pages_, actual_pages_, statistics_}, json);
}

void Balloon::load_device(const nlohmann::json& json) {
  const auto state = load_state<BalloonState>(json);
  if (state.target_pages > memory_.size() / page_size)
    usage_error("saved state of virtio-balloon: a target of {} pages is more than the machine has",
                state.target_pages);
  target_pages_ = state.target_pages;
  actual_pages_ = state.actual_pages;
  statistics_ = state.statistics;
}

}  // namespace lodge::device::virtio
