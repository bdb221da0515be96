// The translator tier of one vCPU: blocks that ran often become host code, which is chained and runs until
// something asks for attention. The code is the VM's (CodeCache); what this vCPU has linked by its own
// mappings - slots, the tables of indirect branches - is its own (MappedCode). Only the vCPU's thread calls
// it, but for the members that say otherwise.
#pragma once

#include <atomic>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvm/soft/options.hpp"
#include "kvm/soft/translate/area.hpp"
#include "kvm/soft/translate/code_cache.hpp"
#include "kvm/soft/translate/instruction.hpp"
#include "kvm/soft/translate/mapped_code.hpp"
#include "kvm/soft/translate/translation.hpp"

namespace lodge::kvm::soft {

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
  // Makes wants_attention() true soon. Any thread.
  virtual void interrupt() noexcept = 0;
  // A piece of code in a page: where it begins and ends.
  struct Piece {
    uint32_t offset, end;
  };
  // These pieces of the page of `head`, which is at `linear`, decoded again with offsets from the start of
  // the page; null when that cannot be done.
  virtual std::shared_ptr<const DecodedBlock> decode_pieces(const DecodedBlock& head, uint64_t linear,
                                                            std::span<const Piece> pieces) noexcept = 0;
};

struct TranslatorStatistics {
  uint64_t translations = 0, host_bytes = 0, guest_instructions = 0;  // made so far
  uint64_t superblocks = 0;                                           // paths that became one piece
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
};

class Translator {
 public:
  // `cache` outlives it.
  Translator(Cpu& cpu, TranslatorArea& area, BlockSource& source, const Options& options, CodeCache& cache);
  ~Translator();
  Translator(const Translator&) = delete;
  Translator& operator=(const Translator&) = delete;

  // The vCPU's CPUID has changed.
  void features_changed();

  // Runs `block` at Cpu::rip if it is or now becomes host code; false when it is not. Returns with the state
  // in the Cpu, at an instruction boundary, with `pending` or `stops` set when an instruction wanted that.
  bool run(Block& block) noexcept;

  // The same for one block only, without a link to what comes behind; false also when it left in the middle
  // of the block, to be translated anew. For the lockstep engine.
  bool run_once(Block& block) noexcept;
  bool ready(Block& block) noexcept;

  // Fills in what another vCPU has decoded and translated of `block`, of which only the first page is known,
  // if it is all in this page. False: nothing is known of it.
  bool adopt(Block& block) noexcept;

  // A loop is hot: the run loop leaves the next blocks to the interpreter and shows each to record() before
  // it runs, until that says false.
  bool records() const noexcept { return record_.has_value(); }
  bool record(const Block& block) noexcept;

  // A page of code was written to: drops what was made of it.
  void drop_stale() noexcept { cache_.drop_stale(); }
  // The vCPU halts and has been idle for a while, or not. True: so have all, and the code cache was given
  // back to the host.
  bool set_idle(bool idle) noexcept;

  const TranslatorStatistics& statistics() const noexcept { return statistics_; }
  // How often the interpreter has run an instruction for translated code, by ZydisMnemonic (0: one that
  // reaches into the next page). Empty when nothing is counted.
  const std::vector<uint64_t>& interpreted() const noexcept { return interpreted_; }
  // Of the cache that all vCPUs share: the first one tells, the others say 0 or nothing.
  size_t code_bytes() const noexcept { return cache_.is_first(*this) ? cache_.used_bytes() : 0; }
  CodeCacheStatistics cache_statistics() const noexcept {
    return cache_.is_first(*this) ? cache_.statistics() : CodeCacheStatistics{};
  }

  // --- for the code cache, any thread, under its lock
  // Nothing may lead to `translation` any more; this vCPU sees to it before it runs translated code again.
  void gone(Translation& translation) noexcept { note_gone(&translation); }
  // The memory of some that are gone will be used again, once this vCPU has passed this removal.
  void expiring() noexcept { note_gone(nullptr); }
  // Does so now, if the vCPU is not running translated code.
  void forget_gone_if_outside() noexcept;
  // Whether it has forgotten all up to this removal.
  bool passed(uint64_t removal) const noexcept { return gone_.empty() || passed_ >= removal; }
  // Asks for that.
  void hurry() noexcept {
    if (!gone_.empty()) source_.interrupt();
  }
  void place_slot(const DirectExit& exit) noexcept { area_.slot[exit.slot] = exit.stub; }
  // All of the cache is gone: memory for tables goes back to the host.
  void give_back() noexcept;
  std::string guest_name() const;

  // --- for the stubs and the signal handler, on the vCPU's thread ---
  const void* on_slow_access(Site& site) noexcept;
  const void* on_complex(Site& site) noexcept;
  const void* on_request(Site& site) noexcept;
  const void* on_exit(DirectExit& exit) noexcept;
  const void* on_indirect(Site& site) noexcept;
  const void* on_hot(Site& site) noexcept;
  // Where to go on when the host instruction at `at` raised a signal; null: not ours.
  const uint8_t* fault_stub(const uint8_t* at) noexcept;

 private:
  friend class CodeCache;
  friend class UnitEmitter;
  class Inside;  // while one exists, only the own thread touches what depends on translations
  Translation* translation_of(Block& block, Boundary boundary) noexcept;
  // Whether translation_of() may find or make one.
  bool may_be_ready(const Block& block) const noexcept;
  void note_gone(Translation* translation) noexcept;
  void forget_gone() noexcept;
  void link(DirectExit& exit, Translation& target) noexcept;
  static uint32_t heat_index(const DecodedBlock& block) noexcept;

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
  // After the interpreter has done an access that nothing could be filled in for.
  void note_unfilled() noexcept;
  // Whether the mode and the mappings are still those that the running code was entered in.
  bool still_fits(const DecodedBlock& block) const noexcept;
  bool interpret(const Op& op) noexcept;

  Cpu& cpu_;
  TranslatorArea& area_;
  BlockSource& source_;
  const Options options_;
  CodeCache& cache_;
  const Stubs& stubs_;
  const bool counts_;
  const uint32_t heat_;  // what a turn of a loop adds to its TranslatorArea::heat; 0: nothing is counted
  bool once_ = false;
  uint32_t profile_ = CodeCache::no_profile;

  MappedCode mapped_;
  // What has been removed from the cache and is still known here.
  std::atomic<bool> inside_{false}, has_gone_{false};
  std::vector<Translation*> gone_;  // guarded by the cache's lock; null: expiring()
  uint64_t passed_ = 0;             // likewise: up to this removal everything is forgotten
  bool idle_ = false;               // likewise
  std::atomic<uint64_t> seen_{1};   // counts the times that memory expired; see Block::code_seen
  // The path from a hot loop's head, while it is being recorded.
  struct Record {
    DecodedBlock head;
    uint64_t linear = 0;  // of the head
    std::vector<BlockSource::Piece> pieces;
    unsigned instructions = 0, waited = 0;
  };
  std::optional<Record> record_;
  void finish_record() noexcept;
  Translation* retranslate_ = nullptr;  // its runs of accesses cross pages: make it anew without them
  std::vector<Instruction> analysed_;   // of the block being translated
  TranslatorStatistics statistics_;
  std::vector<uint64_t> interpreted_;
};

}  // namespace lodge::kvm::soft
