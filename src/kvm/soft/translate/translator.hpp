// The translator tier of one vCPU: blocks that ran often become host code, which is chained and runs until
// something asks for attention. Only the vCPU's thread touches it.
#pragma once

#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/mapping.hpp"
#include "kvm/soft/options.hpp"
#include "kvm/soft/translate/area.hpp"
#include "kvm/soft/translate/instruction.hpp"
#include "kvm/soft/translate/stubs.hpp"
#include "kvm/soft/translate/translation.hpp"

namespace lodge::kvm::soft {

class PerfMap;

// Where the translator gets decoded blocks: the vCPU.
class BlockSource {
 public:
  virtual ~BlockSource() = default;
  // The block at `linear` in the present mode; null when an exception is pending or the code is not in RAM.
  virtual Block* block_at(uint64_t linear) noexcept = 0;
  // Whether translated code has to end now: a request, or a page of code that was written to.
  virtual bool wants_attention() noexcept = 0;
  // Whether an event has waited until the guest can take it, which may be now: asked behind every
  // interpreted instruction.
  virtual bool event_waits() noexcept = 0;
};

struct TranslatorStatistics {
  uint64_t translations = 0, host_bytes = 0, guest_instructions = 0;  // made so far
  uint64_t entries = 0;  // from the run loop into translated code
  // Look-ups that missed the soft TLB, or accesses that faulted natively; why, or how they ended.
  uint64_t slow_accesses = 0;
  uint64_t filled = 0;         // the page was mapped: found by a page walk
  uint64_t crossings = 0;      // reaches into the next page
  uint64_t device = 0;         // outside RAM: an exit to the VMM
  uint64_t faults = 0;         // an exception for the guest
  uint64_t guarded = 0;        // a page that holds code, logs writes or is read-only; a watchpoint
  uint64_t native_faults = 0;  // a signal: #DE, a misaligned vector operand
  uint64_t interpreted = 0;    // instructions that translated code left to the interpreter
  uint64_t links = 0, indirect_misses = 0;
  uint64_t dropped = 0;  // translations of pages that were written to
  uint64_t flushes = 0;  // of the whole cache, because it was full
};

class Translator {
 public:
  Translator(Cpu& cpu, TranslatorArea& area, BlockSource& source, const Options& options, PerfMap* perf_map);
  ~Translator();
  Translator(const Translator&) = delete;
  Translator& operator=(const Translator&) = delete;

  // Runs `block` at Cpu::rip if it is or now becomes host code; false when it is not. Returns with the state
  // in the Cpu, at an instruction boundary, with `pending` or `stops` set when an instruction wanted that.
  bool run(Block& block) noexcept;

  // The same for one block only, without a link to what comes behind; false also when it left in the middle
  // of the block, to be translated anew. For the lockstep engine.
  bool run_once(Block& block) noexcept;
  bool ready(Block& block) noexcept {
    sync();
    return translation_of(block, {}) != nullptr;
  }

  // A page of code was written to: drops what was made of it.
  void drop_stale() noexcept;
  // The cache is full: the owner drops all blocks, then calls rewind().
  bool full() const noexcept { return full_; }
  void rewind() noexcept;
  // The owner has dropped all blocks: gives memory back to the host.
  void release() noexcept;

  const TranslatorStatistics& statistics() const noexcept { return statistics_; }
  // How often the interpreter has run an instruction for translated code, by ZydisMnemonic (0: one that
  // reaches into the next page). Empty when nothing is counted.
  const std::vector<uint64_t>& interpreted() const noexcept { return interpreted_; }
  size_t code_bytes() const noexcept { return static_cast<size_t>(bump_ - code_.data()); }

  // --- for Translation ---
  void remove(Translation& translation) noexcept;

  // --- for the stubs and the signal handler, on the vCPU's thread ---
  const void* on_slow_access(Site& site) noexcept;
  const void* on_complex(Site& site) noexcept;
  const void* on_request(Site& site) noexcept;
  const void* on_exit(DirectExit& exit) noexcept;
  const void* on_indirect(Site& site) noexcept;
  // Where to go on when the host instruction at `at` raised a signal; null: not ours.
  const uint8_t* fault_stub(const uint8_t* at) noexcept;

 private:
  friend class UnitEmitter;
  static constexpr uint32_t jump_multiplier = 0x9e37'79b1;
  Translation* translate(Block& block, Boundary boundary) noexcept;
  Translation* translation_of(Block& block, Boundary boundary) noexcept;
  // What flushes have left valid; the tag for the present mode.
  void sync() noexcept;
  void forget_user() noexcept;
  void forget_supervisor() noexcept;
  uint32_t new_slot(DirectExit& exit) noexcept;  // slot_count: none is left
  void start_anew() noexcept;
  void reset_slots(std::vector<uint32_t>& slots) noexcept;
  void unlink_crossing(std::vector<Translation*>& crossing) noexcept;
  void register_page(const Block& block, uint64_t linear) noexcept;
  void link(DirectExit& exit, Translation& target) noexcept;
  void unlink(DirectExit& exit) noexcept;
  void remember_jump(Translation& translation, uint64_t linear) noexcept;
  static uint32_t jump_index(uint64_t linear) noexcept;

  bool event_waits() noexcept { return !once_ && source_.event_waits(); }
  const void* leave() noexcept;
  const void* resume(const uint8_t* code, Boundary boundary) noexcept;
  bool leave_shadow() noexcept;
  const void* resume_at_rip() noexcept;
  const void* resume_at_rip(uint8_t level) noexcept;
  void before_interpreting(const Site& site) noexcept;
  // Execution leaves a block with so many of its instructions, which are counted already, not run.
  void uncount(uint64_t instructions) noexcept {
    if (counts_) area_.instructions -= instructions;
  }
  void restart_perf_map() noexcept;
  void name_for_perf(const Translation& translation) noexcept;
  // After the interpreter has done an access that nothing could be filled in for.
  void note_unfilled() noexcept;
  bool interpret(const Op& op) noexcept;

  Cpu& cpu_;
  TranslatorArea& area_;
  BlockSource& source_;
  const Options options_;
  Mapping code_;
  uint8_t* bump_;
  Stubs stubs_;
  const bool counts_;
  bool full_ = false, once_ = false;
  PerfMap* const perf_map_;  // or null
  uint64_t removals_ = 0;    // translations that are gone; a caller that sees it change has lost its own
  std::vector<DirectExit*> slot_exit_;  // whose slot it is; null: free
  std::vector<uint32_t> free_slots_;
  std::vector<uint32_t> user_links_, supervisor_links_;  // slots that are or were linked
  // Translations that reach into a second page and are linked within their first one.
  std::vector<Translation*> user_crossing_, supervisor_crossing_;
  // Linear page under which the code of a host page is being run.
  std::unordered_map<uint64_t, uint64_t> user_pages_, supervisor_pages_;
  std::unordered_map<uint64_t, std::vector<Translation*>> by_page_;
  std::map<const uint8_t*, Translation*> by_address_;
  Block* retranslate_ = nullptr;  // its runs of accesses cross pages: make it anew without them
  // Tags: a number for each (generation, mode).
  struct ModeTag {
    uint32_t key;
    uint16_t id;
  };
  std::vector<ModeTag> user_modes_, supervisor_modes_;
  uint16_t last_id_ = 0;
  std::vector<Instruction> analysed_;  // of the block being translated
  TranslatorStatistics statistics_;
  std::vector<uint64_t> interpreted_;
};

}  // namespace lodge::kvm::soft
