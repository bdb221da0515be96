// The host code of all vCPUs of a VM, in one bounded mapping.
//
// Code is a function of the guest's code bytes, the decode key, what CPUID offers (a profile) and the
// boundary, and names neither a guest address nor a vCPU: everything is [rsp + displacement] from the running
// vCPU's Cpu. So one translation serves all vCPUs and all mappings of a page.
//
// The mapping is cut into regions that are filled in turn. Before a region is used again, everything in it is
// taken out of use ("retired"), one region ahead, and its memory is used again when every vCPU has passed a
// safe point since: the entry of Translator::run(). Nobody waits for that; a block that finds no room is
// interpreted.
//
// Any thread; members that say "locked" want mutex() held. Nothing here waits for a vCPU or calls out while
// holding it.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/adaptive_mutex.hpp"
#include "base/mapping.hpp"
#include "kvm/soft/cpu/features.hpp"
#include "kvm/soft/options.hpp"
#include "kvm/soft/translate/stubs.hpp"
#include "kvm/soft/translate/translation.hpp"

namespace lodge::kvm::soft {

class PerfMap;
class Translator;

struct CodeCacheStatistics {
  uint64_t dropped = 0;    // translations of pages that were written to
  uint64_t evictions = 0;  // regions emptied to make room
  uint64_t longest_eviction_ns = 0;
  uint64_t given_back = 0;  // times that all vCPUs were idle and all memory went back to the host
};

class CodeCache {
 public:
  // `perf_map` may be null; it outlives the cache. Throws std::system_error without executable memory.
  CodeCache(const Options& options, PerfMap* perf_map);
  ~CodeCache();
  CodeCache(const CodeCache&) = delete;
  CodeCache& operator=(const CodeCache&) = delete;

  AdaptiveMutex& mutex() noexcept { return mutex_; }

  // --- vCPUs
  void attach(Translator& translator, const StateOffsets& offsets);
  void detach(Translator& translator) noexcept;
  // Whether there is more than one.
  bool is_shared() const noexcept { return vcpus_.load(std::memory_order_relaxed) > 1; }
  const Stubs& stubs() const noexcept { return *stubs_; }  // once a translator is attached
  // The number of a set of features; equal ones share code. no_profile: there are too many of them.
  static constexpr uint32_t no_profile = 63;
  uint32_t profile(const FeatureWords& features);

  // --- translations; locked
  Translation* find(const DecodedBlock& block, uint32_t profile, Boundary boundary) noexcept;
  // What was decoded for a translation at `place`, of which only its first page is known; null when none is
  // there or the code goes on in a second page.
  const DecodedBlock* known(const DecodedBlock& place, uint32_t profile) const noexcept;
  // Null when there is no room at the moment, or (sets `refused`) the block is not one for the translator.
  Translation* make(Translator& by, const DecodedBlock& block, uint32_t profile, Boundary boundary,
                    bool& refused) noexcept;
  // What there is of the block goes, and is made anew by these hints when it runs again.
  void improve(const DecodedBlock& block, uint32_t profile, Hints hints) noexcept;
  Hints hints(const DecodedBlock& block, uint32_t profile) noexcept;
  // The jump of `exit` goes to `target` from now on, if both are still in use. False: it does not.
  bool link(DirectExit& exit, Translation& target) noexcept;

  uint64_t removals() const noexcept { return removals_; }

  // For the emitter. slot_count: none is left.
  uint32_t new_slot(DirectExit& exit) noexcept;
  // exit.stub is known: all vCPUs' slots go there.
  void place_slot(const DirectExit& exit) noexcept;

  // --- removal
  // A page of code was written to: drop_stale() will look at what was made of it.
  void note_stale(uint64_t host_page) noexcept;
  void drop_stale() noexcept;
  // The memory slots have changed: nothing is used any more.
  void retire_all() noexcept;
  // This vCPU halts and has been idle for a while, or has not. When all have, and none is in translated code,
  // everything goes and memory is given back to the host: true.
  bool set_idle(Translator& translator, bool idle) noexcept;

  // The translation whose host code has `at`; for the signal handler.
  const uint8_t* fault_stub(const uint8_t* at) noexcept;

  // Publishes what make() has written to those who come upon it by a patched jump.
  void observe() const noexcept { (void)published_.load(std::memory_order_acquire); }
  // Bytes of host code in use. The cache is one, so one vCPU's statistics tell of it.
  size_t used_bytes() noexcept;
  CodeCacheStatistics statistics() noexcept;
  bool is_first(const Translator& translator) noexcept;

 private:
  struct Region {
    uint8_t *begin = nullptr, *end = nullptr, *bump = nullptr;
    std::unique_ptr<std::pmr::monotonic_buffer_resource> memory;
    std::vector<std::unique_ptr<Translation>> translations;  // by address
    uint64_t retired_at = 0;                                 // 0: in use or empty
    size_t metadata = 0;                                     // bytes, about
  };
  struct Key {
    uint64_t host, second_page;
    uint32_t modes;  // decode key, profile, boundary
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const noexcept {
      return (key.host ^ key.second_page >> 7 ^ uint64_t{key.modes} << 40) * 0x9e37'79b9'7f4a'7c15 >> 7;
    }
  };
  static Key key_of(const DecodedBlock& block, uint32_t profile, Boundary boundary) noexcept;

  void kill(Translation& translation) noexcept;
  void unlink(DirectExit& exit) noexcept;
  // Vcpus that are not running translated code now forget what has been killed.
  void settle() noexcept;
  bool passed(uint64_t removal) noexcept;
  bool room() noexcept;
  void retire(Region& region) noexcept;
  bool recycle(Region& region) noexcept;
  void collect_slots() noexcept;
  void name_for_perf(const Region& region, const Translation& translation, const Translator& by) noexcept;

  const Options options_;
  PerfMap* const perf_map_;
  AdaptiveMutex mutex_;
  Mapping code_;
  std::optional<Stubs> stubs_;
  std::vector<Region> regions_;
  size_t current_ = 0;
  std::vector<Translator*> translators_;
  std::atomic<size_t> vcpus_{0};  // as many as there are of these
  std::vector<FeatureWords> profiles_;
  std::unordered_map<Key, Translation*, KeyHash> translations_;  // not the dead ones
  std::unordered_map<uint64_t, std::vector<Translation*>> by_page_;
  std::unordered_map<Key, Hints, KeyHash> hints_;  // by the first boundary
  uint64_t removals_ = 0;                          // counts kills and retired regions

  // Slots: whose it is (null: free), those that may be used again, and those that may be later.
  std::vector<DirectExit*> slot_exit_;
  std::vector<uint32_t> free_slots_;
  uint32_t slots_made_ = 0;  // the rest has never been used
  struct Limbo {
    uint64_t removal;
    uint32_t slot;
  };
  std::deque<Limbo> limbo_;

  std::mutex stale_mutex_;
  std::vector<uint64_t> stale_pages_;
  std::atomic<uint64_t> published_{0};
  CodeCacheStatistics statistics_;
};

}  // namespace lodge::kvm::soft
