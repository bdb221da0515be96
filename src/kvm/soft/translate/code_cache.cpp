#include "kvm/soft/translate/code_cache.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>

#include "kvm/soft/translate/discard.hpp"
#include "kvm/soft/translate/perf_map.hpp"
#include "kvm/soft/translate/translator.hpp"
#include "kvm/soft/translate/unit.hpp"

namespace lodge::kvm::soft {
namespace {

// Room that is certainly enough for one translation: host code, slots.
constexpr size_t largest_translation = size_t{32} << 10;
constexpr size_t most_slots = 256;
constexpr size_t stubs_room = size_t{32} << 10;
static_assert(stubs_room >= Stubs::max_size);
// Small enough to be emptied in a millisecond or two.
constexpr size_t largest_region = size_t{256} << 10;
constexpr size_t fewest_regions = 4;
// Sites and the like may take so much for each byte of a region's code.
constexpr size_t metadata_share = 8;
constexpr size_t most_hints = 1 << 12;

}  // namespace

CodeCache::CodeCache(const Options& options, PerfMap* perf_map) : options_(options), perf_map_(perf_map) {
  if (options_.engine == Engine::interpret) return;
  code_ = Mapping(options.code_cache, PROT_READ | PROT_WRITE | PROT_EXEC,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0,
                  "cannot map the translator's code cache (is executable memory forbidden here?)");
  const size_t room = code_.size() - stubs_room;
  const size_t count = std::max(fewest_regions, room / largest_region);
  const size_t size = room / count & ~page_mask;
  for (size_t i = 0; i < count; ++i) {
    uint8_t* const begin = code_.data() + stubs_room + i * size;
    regions_.push_back({.begin = begin,
                        .end = begin + size,
                        .bump = begin,
                        .memory = std::make_unique<std::pmr::monotonic_buffer_resource>(),
                        .translations = {}});
  }
}

CodeCache::~CodeCache() = default;

// --- vCPUs

void CodeCache::attach(Translator& translator, const StateOffsets& offsets) {
  const std::lock_guard lock(mutex_);
  if (!stubs_) {
    stubs_.emplace(code_.data(), offsets);
    if (perf_map_ != nullptr) perf_map_->add(this, code_.data(), stubs_->end, "lodge_stubs");
  }
  translators_.push_back(&translator);
  vcpus_ = translators_.size();
  for (const DirectExit* exit : slot_exit_)
    if (exit != nullptr) translator.place_slot(*exit);
}

void CodeCache::detach(Translator& translator) noexcept {
  const std::lock_guard lock(mutex_);
  std::erase(translators_, &translator);
  vcpus_ = translators_.size();
}

uint32_t CodeCache::profile(const FeatureWords& features) {
  const std::lock_guard lock(mutex_);
  const auto it = std::find(profiles_.begin(), profiles_.end(), features);
  const auto number = static_cast<uint32_t>(it - profiles_.begin());
  if (it != profiles_.end() || number == no_profile) return number;
  profiles_.push_back(features);
  return number;
}

bool CodeCache::is_first(const Translator& translator) noexcept {
  const std::lock_guard lock(mutex_);
  return !translators_.empty() && translators_.front() == &translator;
}

CodeCacheStatistics CodeCache::statistics() noexcept {
  const std::lock_guard lock(mutex_);
  return statistics_;
}

size_t CodeCache::used_bytes() noexcept {
  const std::lock_guard lock(mutex_);
  size_t used = 0;
  for (const Region& region : regions_) used += static_cast<size_t>(region.bump - region.begin);
  return used;
}

bool CodeCache::set_idle(Translator& translator, bool idle) noexcept {
  const std::lock_guard lock(mutex_);
  translator.idle_ = idle;
  if (!idle ||
      !std::all_of(translators_.begin(), translators_.end(), [](auto* t) { return t->idle_ && !t->inside_; }))
    return false;
  for (Region& region : regions_) retire(region);
  settle();
  bool all = true;
  for (Region& region : regions_) {
    all = recycle(region) && all;
    if (region.bump == region.begin) discard(region.begin, region.end);
  }
  if (!all) return false;
  translations_ = {};
  by_page_ = {};
  hints_ = {};
  for (Translator* t : translators_) t->give_back();
  ++statistics_.given_back;
  return true;
}

// --- translations

CodeCache::Key CodeCache::key_of(const DecodedBlock& block, uint32_t profile, Boundary boundary) noexcept {
  static_assert(Boundary::count <= 8 && no_profile < 64);
  return {.host = block.host,
          .second_page = block.host_page[1],
          .modes = block.key << 9 | profile << 3 | boundary.index()};
}

Translation* CodeCache::find(const DecodedBlock& block, uint32_t profile, Boundary boundary) noexcept {
  const auto it = translations_.find(key_of(block, profile, boundary));
  if (it == translations_.end()) return nullptr;
  if (it->second->block.same_code(block)) return it->second;
  // Its page was written to, or is in another slot now.
  kill(*it->second);
  settle();
  return nullptr;
}

const DecodedBlock* CodeCache::known(const DecodedBlock& place, uint32_t profile) const noexcept {
  for (unsigned boundary = 0; boundary < Boundary::count; ++boundary) {
    const auto it = translations_.find(key_of(place, profile, Boundary::from(boundary)));
    if (it == translations_.end()) continue;
    const DecodedBlock& block = it->second->block;
    if (block.word[1] == nullptr && block.same_code(place)) return &block;
  }
  return nullptr;
}

Hints CodeCache::hints(const DecodedBlock& block, uint32_t profile) noexcept {
  const auto it = hints_.find(key_of(block, profile, {}));
  if (it == hints_.end()) return {};
  if (it->second.version == block.word_value[0] &&
      (it->second.path == nullptr || it->second.path->same_page(block)))
    return it->second;
  hints_.erase(it);  // of what was there before
  return {};
}

Translation* CodeCache::make(Translator& by, const DecodedBlock& block, uint32_t profile, Boundary boundary,
                             bool& refused) noexcept {
  refused = profile == no_profile;
  if (refused || !room()) return nullptr;
  Region& region = regions_[current_];
  auto translation =
      std::make_unique<Translation>(block, profile, boundary, hints(block, profile), *region.memory);
  UnitEmitter unit(by, *translation, region.bump, region.bump + largest_translation);
  refused = !unit.emit();
  region.metadata += sizeof(Translation) + translation->sites.size() * (sizeof(Site) + 16) +
                     translation->exits.size() * (sizeof(DirectExit) + 16);
  if (refused) {
    for (const DirectExit& exit : translation->exits)
      if (exit.has_slot) {
        slot_exit_[exit.slot] = nullptr;
        free_slots_.push_back(exit.slot);
      }
    if (translation->hints.path == nullptr) return nullptr;
    // The path is not one for the translator; the block may be.
    hints_[key_of(block, profile, {})].path = nullptr;
    return make(by, block, profile, boundary, refused);
  }
  region.bump = const_cast<uint8_t*>(translation->end);
  translations_.insert_or_assign(key_of(block, profile, boundary), translation.get());
  for (const uint64_t page : block.host_page)
    if (page != 0) by_page_[page].push_back(translation.get());
  if (perf_map_ != nullptr) name_for_perf(region, *translation, by);
  region.translations.push_back(std::move(translation));
  published_.fetch_add(1, std::memory_order_release);
  return region.translations.back().get();
}

void CodeCache::improve(const DecodedBlock& block, uint32_t profile, Hints hints) noexcept {
  if (hints_.size() >= most_hints) hints_.clear();
  hints.version = block.word_value[0];
  hints_.insert_or_assign(key_of(block, profile, {}), std::move(hints));
  for (unsigned b = 0; b < Boundary::count; ++b)
    if (Translation* t = find(block, profile, Boundary::from(b)); t != nullptr) kill(*t);
  settle();
}

bool CodeCache::link(DirectExit& exit, Translation& target) noexcept {
  if (exit.target != nullptr || exit.owner->dead || target.dead) return false;
  const DecodedBlock& from = exit.owner->block;
  if (from.word[0] != target.block.word[0] || from.word_value[0] != target.block.word_value[0] ||
      exit.owner->profile != target.profile)
    return false;
  exit.target = &target;
  exit.next = target.incoming;
  exit.previous = nullptr;
  if (exit.next != nullptr) exit.next->previous = &exit;
  target.incoming = &exit;
  Emitter::patch_running(exit.displacement, target.begin);
  return true;
}

// It is linked, so it has a target.
void CodeCache::unlink(DirectExit& exit) noexcept {
  // NOLINTNEXTLINE(clang-analyzer-core.NullDereference)
  (exit.previous != nullptr ? exit.previous->next : exit.target->incoming) = exit.next;
  if (exit.next != nullptr) exit.next->previous = exit.previous;
  exit.target = nullptr;
  Emitter::patch_running(exit.displacement, exit.stub);
}

// By where the guest is: its address, mode and privilege.
void CodeCache::name_for_perf(const Region& region, const Translation& t, const Translator& by) noexcept {
  perf_map_->add(&region, t.begin, t.end, by.guest_name());
}

// --- slots

uint32_t CodeCache::new_slot(DirectExit& exit) noexcept {
  if (free_slots_.empty()) return TranslatorArea::slot_count;
  const uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  slot_exit_[slot] = &exit;
  return slot;
}

void CodeCache::place_slot(const DirectExit& exit) noexcept {
  for (Translator* translator : translators_) translator->place_slot(exit);
}

// Those whose owners no vCPU can be in any more.
void CodeCache::collect_slots() noexcept {
  while (!limbo_.empty() && passed(limbo_.front().removal)) {
    free_slots_.push_back(limbo_.front().slot);
    limbo_.pop_front();
  }
}

// --- removal

void CodeCache::kill(Translation& t) noexcept {
  t.dead = true;
  ++removals_;
  const Key key = key_of(t.block, t.profile, t.boundary);
  if (const auto it = translations_.find(key); it != translations_.end() && it->second == &t)
    translations_.erase(it);
  for (const uint64_t page : t.block.host_page)
    if (const auto it = by_page_.find(page); page != 0 && it != by_page_.end()) {
      std::erase(it->second, &t);
      if (it->second.empty()) by_page_.erase(it);
    }
  while (t.incoming != nullptr) unlink(*t.incoming);
  for (DirectExit& exit : t.exits) {
    if (exit.target != nullptr) unlink(exit);
    if (!exit.has_slot) continue;
    slot_exit_[exit.slot] = nullptr;
    limbo_.push_back({.removal = removals_, .slot = exit.slot});
  }
  for (Translator* translator : translators_) translator->gone(t);
}

void CodeCache::settle() noexcept {
  for (Translator* translator : translators_) translator->forget_gone_if_outside();
}

bool CodeCache::passed(uint64_t removal) noexcept {
  return std::all_of(translators_.begin(), translators_.end(),
                     [&](const Translator* t) { return t->passed(removal); });
}

void CodeCache::retire(Region& region) noexcept {
  if (region.retired_at != 0 || region.bump == region.begin) return;
  for (const auto& translation : region.translations)
    if (!translation->dead) kill(*translation);
  region.retired_at = ++removals_;
  for (Translator* translator : translators_) translator->expiring();
}

// Makes the region empty when nobody can be in its code; false: not yet.
bool CodeCache::recycle(Region& region) noexcept {
  if (region.bump == region.begin && region.metadata == 0) return true;
  if (region.retired_at == 0 || !passed(region.retired_at)) return false;
  region.translations.clear();
  region.translations.shrink_to_fit();
  region.memory->release();
  region.bump = region.begin;
  region.metadata = region.retired_at = 0;
  if (perf_map_ != nullptr) perf_map_->forget(&region);
  return true;
}

// Sees to it that the current region has room for a translation.
bool CodeCache::room() noexcept {
  if (free_slots_.size() < most_slots) collect_slots();
  if (free_slots_.size() < most_slots && slots_made_ < TranslatorArea::slot_count) {
    constexpr uint32_t batch = 4096;
    static_assert(TranslatorArea::slot_count % batch == 0 && batch >= most_slots);
    for (uint32_t i = batch; i-- > 0;) free_slots_.push_back(slots_made_ + i);
    slots_made_ += batch;
    slot_exit_.resize(slots_made_);
  }
  const Region& now = regions_[current_];
  const auto left = static_cast<size_t>(now.end - now.bump);
  const auto size = static_cast<size_t>(now.end - now.begin);
  if (left >= largest_translation && now.metadata < size * metadata_share && now.retired_at == 0 &&
      free_slots_.size() >= most_slots)
    return true;
  if (free_slots_.size() < most_slots && !limbo_.empty()) {
    for (Translator* translator : translators_) translator->hurry();
    return false;
  }
  const auto start = std::chrono::steady_clock::now();
  Region& next = regions_[(current_ + 1) % regions_.size()];
  Region& behind = regions_[(current_ + 2) % regions_.size()];
  const bool used = next.bump != next.begin;
  retire(next);
  settle();
  const bool found = recycle(next);
  if (found) {
    current_ = (current_ + 1) % regions_.size();
    retire(behind);
    settle();
  }
  for (Translator* translator : translators_) translator->hurry();
  if (found && used) {
    ++statistics_.evictions;
    const auto took = std::chrono::steady_clock::now() - start;
    statistics_.longest_eviction_ns =
        std::max(statistics_.longest_eviction_ns,
                 static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(took).count()));
  }
  collect_slots();
  return found && free_slots_.size() >= most_slots;
}

void CodeCache::retire_all() noexcept {
  const std::lock_guard lock(mutex_);
  for (Region& region : regions_) retire(region);
  hints_.clear();
  settle();
}

void CodeCache::note_stale(uint64_t host_page) noexcept {
  if (regions_.empty()) return;  // nothing is translated
  const std::lock_guard lock(stale_mutex_);
  stale_pages_.push_back(host_page);
}

void CodeCache::drop_stale() noexcept {
  const std::lock_guard lock(mutex_);
  std::vector<uint64_t> pages;
  {
    const std::lock_guard stale(stale_mutex_);
    pages.swap(stale_pages_);
  }
  std::vector<Translation*> stale;
  for (const uint64_t page : pages)
    if (const auto it = by_page_.find(page); it != by_page_.end())
      for (Translation* t : it->second)
        if (!t->block.fresh()) stale.push_back(t);
  for (Translation* t : stale)
    if (!t->dead) {
      kill(*t);
      ++statistics_.dropped;
    }
  settle();
}

// --- faults

const uint8_t* CodeCache::fault_stub(const uint8_t* at) noexcept {
  const std::lock_guard lock(mutex_);
  const auto region = std::find_if(regions_.begin(), regions_.end(),
                                   [&](const Region& r) { return at >= r.begin && at < r.bump; });
  if (region == regions_.end()) return nullptr;
  const auto& all = region->translations;
  const auto behind = std::upper_bound(all.begin(), all.end(), at,
                                       [](const uint8_t* a, const auto& t) { return a < t->begin; });
  if (behind == all.begin()) return nullptr;
  for (const Translation::Fault& fault : (*std::prev(behind))->faults)
    if (fault.at == at) return fault.stub;
  return nullptr;
}

}  // namespace lodge::kvm::soft
