// Traditional memory balloon device (VirtIO 1.2, section 5.5).
//
// Modelled: inflating and deflating, statistics, deflating when the guest runs out of memory, reporting of
// free pages, hinting of free pages. Pages go back to the host at once and are zeros when the guest touches
// them again. Not modelled: page poison (a guest that poisons with a pattern does not report then).
#include "device/virtio/balloon.hpp"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.hpp"

namespace lodge::device::virtio {

namespace {

constexpr uint64_t F_STATS_VQ = feature(1), F_DEFLATE_ON_OOM = feature(2), F_FREE_PAGE_HINT = feature(3),
                   F_PAGE_REPORTING = feature(5);
constexpr unsigned inflateq = 0, deflateq = 1, first_optional = 2;
constexpr uint16_t queue_size = 64;
// Linux names 4 MiB by a descriptor and spins while the queue is full.
constexpr uint16_t hint_queue_size = 256;
// 5.5.6.5: reserved names of rounds.
constexpr uint32_t CMD_ID_STOP = 0, CMD_ID_DONE = 1, first_hint_command = 2;
constexpr uint32_t pci_class_other = 0xff0000;
constexpr uint64_t page_size = 4096;
constexpr unsigned S_MEMFREE = 4;  // 5.5.6.4
// A guest that cannot inflate so far in this time has something better to do with its memory.
constexpr uint64_t squeeze_patience = 3'000'000'000;
constexpr unsigned ACTUAL = 4, FREE_PAGE_HINT_CMD_ID = 8;  // offsets in the configuration
// Of one request; Linux puts 256 page numbers into one.
constexpr uint64_t max_page_numbers = 64 * 1024;
struct [[gnu::packed]] StatisticEntry {
  uint16_t tag;
  uint64_t value;
};

struct BalloonState {
  static constexpr std::string_view name = "virtio-balloon";
  static constexpr unsigned version = 2;
  uint32_t target_pages = 0, actual_pages = 0;
  Balloon::Statistics statistics{};
  uint32_t hint_command = 0, next_hint_command = first_hint_command;
  bool hints = false;  // the driver may hold pages
  uint32_t squeeze_pages = 0;
  template <class V>
  void visit(V& v) {
    v("target_pages", target_pages), v("actual_pages", actual_pages), v("statistics", statistics);
    v("hint_command", hint_command), v("next_hint_command", next_hint_command), v("hints", hints);
    v("squeeze_pages", squeeze_pages);
  }
};

}  // namespace

Balloon::Balloon(machine::GuestMemory& memory, const RingFeatures& rings)
    : Device({.name = "virtio-balloon",
              .type = DeviceType::balloon,
              .pci_class = pci_class_other,
              .features = F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_PAGE_REPORTING,
              .queue_sizes = {queue_size, queue_size, queue_size, hint_queue_size, queue_size}},
             memory, rings),
      next_hint_command_(first_hint_command) {
  statistics_.fill(UINT64_MAX);
}

void Balloon::collect_free_memory(Clock& clock) {
  clock_ = &clock;
  squeeze_timer_ = clock.make_timer([this] {
    const std::lock_guard lock(mutex_);
    end_squeeze();
  });
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
  unsigned next = first_optional;
  const unsigned statisticsq = has_feature(F_STATS_VQ) ? next++ : ~0u;
  const unsigned hintq = has_feature(F_FREE_PAGE_HINT) ? next++ : ~0u;
  const unsigned reportingq = has_feature(F_PAGE_REPORTING) ? next : ~0u;
  if (index == inflateq) return inflate();
  if (index == deflateq) return deflate();
  if (index == statisticsq) return take_statistics();
  if (index == hintq) return take_hints(index);
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
    statistics_taken_++;
    statistics_came_.notify_all();
    return false;
  });
  if (std::exchange(squeeze_asked_, false)) begin_squeeze();
}

bool Balloon::request_statistics() noexcept {
  const std::lock_guard lock(mutex_);
  return give_statistics_back();
}

bool Balloon::refresh_statistics(std::chrono::milliseconds patience) noexcept {
  std::unique_lock lock(mutex_);
  const uint64_t before = statistics_taken_;
  return give_statistics_back() &&
         statistics_came_.wait_for(lock, patience, [&] { return statistics_taken_ != before; });
}

bool Balloon::give_statistics_back() noexcept {
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
  if (clock_ && memory_.gives_back() && squeeze_pages_ == 0 && squeeze_.due(clock_->now()))
    squeeze_asked_ = give_statistics_back() || squeeze_asked_;
}

// The driver inflates as fast as it can, and deflates when it has got there.
void Balloon::begin_squeeze() noexcept {
  const uint64_t free = statistics_[S_MEMFREE];
  if (free == UINT64_MAX || squeeze_pages_ != 0) return;
  const uint64_t now = clock_->now();
  const uint64_t amount =
      squeeze_.begin({memory_.size(), memory_.resident(), free, actual_pages_ * page_size}, now);
  if (amount == 0) return;
  squeeze_pages_ = static_cast<uint32_t>(amount / page_size);
  squeeze_timer_->arm(now + squeeze_patience);
  config_changed();
}

void Balloon::end_squeeze() noexcept {
  if (std::exchange(squeeze_pages_, 0) == 0) return;
  squeeze_timer_->cancel();
  squeeze_.end(memory_.resident(), clock_->now());
  config_changed();
}

// --- Hints

bool Balloon::begin_hinting() noexcept {
  const std::lock_guard lock(mutex_);
  if (!running() || !has_feature(F_FREE_PAGE_HINT) || hinting_ != Hinting::none) return false;
  hints_.assign(memory_.size() / page_size / 64 + 1, 0);
  hinted_pages_ = 0;
  hinting_ = Hinting::asked;
  // A name is never used twice in a row, so hints that are late are not taken for new ones.
  hint_command_ = next_hint_command_;
  next_hint_command_ = std::max(first_hint_command, next_hint_command_ + 1);
  config_changed();
  return true;
}

void Balloon::finish_hinting() noexcept {
  const std::lock_guard lock(mutex_);
  if (hinting_ == Hinting::none) return;
  end_hinting(CMD_ID_DONE);
  config_changed();
}

void Balloon::end_hinting(uint32_t command) noexcept {
  hinting_ = Hinting::none;
  hint_command_ = command;
  hinted_pages_ = 0;
  hints_ = {};
}

Balloon::Hinting Balloon::hinting() noexcept {
  const std::lock_guard lock(mutex_);
  return hinting_;
}

uint64_t Balloon::hinted_bytes() noexcept {
  const std::lock_guard lock(mutex_);
  return hinted_pages_ * page_size;
}

bool Balloon::is_hinted(uint64_t gpa) noexcept {
  const std::lock_guard lock(mutex_);
  const auto offset = memory_.offset(gpa);
  return offset && !hints_.empty() && is_noted(*offset / page_size);
}

void Balloon::take_hints(unsigned index) noexcept {
  drain(index, chain_, [&](const Chain& chain) {
    if (uint32_t command;
        chain.read(0, {reinterpret_cast<uint8_t*>(&command), sizeof command}) == sizeof command)
      take_hint_command(command);
    for (const Segment& segment : chain.writable()) note_hint(segment.gpa, segment.bytes.size());
    queue(index).push(chain, 0);
    return true;
  });
}

// The driver's word that its hints follow, or that there are no more. Another name is an old round's, whose
// pages are ignored.
void Balloon::take_hint_command(uint32_t command) noexcept {
  if (hinting_ == Hinting::asked && command == hint_command_)
    hinting_ = Hinting::running;
  else if (hinting_ == Hinting::running && command == CMD_ID_STOP)
    hinting_ = Hinting::complete;
}

// Only pages that lie wholly in what was named.
void Balloon::note_hint(uint64_t gpa, uint64_t size) noexcept {
  if (hinting_ != Hinting::running || hints_.empty()) return;
  const auto begin = memory_.offset(gpa);
  if (!begin) return;
  const uint64_t end = std::min(*begin + size, memory_.size()) / page_size;
  for (uint64_t page = (*begin + page_size - 1) / page_size; page < end; page++) {
    if (is_noted(page)) continue;
    hints_[page / 64] |= uint64_t{1} << page % 64;
    hinted_pages_++;
  }
}

// --- Configuration and state

void Balloon::config_bytes(std::span<uint8_t> out) const noexcept {
  const auto all = static_cast<uint32_t>(memory_.size() / page_size);
  const uint32_t wanted = target_pages_ + std::min(squeeze_pages_, all - target_pages_);
  std::memcpy(out.data(), &wanted, sizeof wanted);
  std::memcpy(out.data() + ACTUAL, &actual_pages_, sizeof actual_pages_);
  std::memcpy(out.data() + FREE_PAGE_HINT_CMD_ID, &hint_command_, sizeof hint_command_);
}

void Balloon::config_written(unsigned offset, std::span<const uint8_t> data) noexcept {
  if (offset == ACTUAL && data.size() >= sizeof actual_pages_)
    std::memcpy(&actual_pages_, data.data(), sizeof actual_pages_);
  if (squeeze_pages_ != 0 && actual_pages_ >= uint64_t{target_pages_} + squeeze_pages_) end_squeeze();
}

void Balloon::was_reset() noexcept {
  actual_pages_ = 0;
  statistics_.fill(UINT64_MAX);
  end_hinting(CMD_ID_STOP);
  squeeze_asked_ = false;
  squeeze_pages_ = 0;
}

void Balloon::save_device(nlohmann::json& json) const {
  save_state(BalloonState{target_pages_, actual_pages_, statistics_, hint_command_, next_hint_command_,
                          hinting_ != Hinting::none, squeeze_pages_},
             json);
}

void Balloon::load_device(const nlohmann::json& json) {
  const auto state = load_state<BalloonState>(json);
  if (state.target_pages > memory_.size() / page_size)
    usage_error("saved state of virtio-balloon: a target of {} pages is more than the machine has",
                state.target_pages);
  target_pages_ = state.target_pages;
  actual_pages_ = state.actual_pages;
  statistics_ = state.statistics;
  hint_command_ = state.hint_command;
  next_hint_command_ = std::max(first_hint_command, state.next_hint_command);
  // One that was under way ends at once: it is not worth to be continued.
  squeeze_pages_ = clock_ ? state.squeeze_pages : 0;
  if (squeeze_pages_ != 0) squeeze_timer_->arm(clock_->now());
  // Which pages they were is not saved: the round is over, and waits for finish_hinting().
  hinting_ = state.hints ? Hinting::complete : Hinting::none;
  hints_ = {};
  hinted_pages_ = 0;
}

}  // namespace lodge::device::virtio
