// One block as host code. Made under the code cache's lock; after that, what is not said to be guarded by it
// is only read. The memory stays until no vCPU can be in the code or at one of its sites any more.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <memory_resource>
#include <utility>
#include <vector>

#include "kvm/soft/interpret/block.hpp"
#include "kvm/soft/translate/area.hpp"

namespace lodge::kvm::soft {

class Translation;

// A place in translated code that may have to call the translator: a memory access that misses the soft TLB,
// an instruction for the interpreter, an interrupt request, an indirect branch.
struct Site {
  Translation* owner = nullptr;
  uint16_t first = 0, last = 0;  // ops that the interpreter runs when the access cannot be done natively
  uint16_t counted = 0;          // up to this op instructions have been counted, where they are
  const uint8_t* retry = nullptr;
  const uint8_t* next = nullptr;  // behind the last op
  Boundary before, after;         // before.native_flags: at the stub, not at `retry`, which never has them
  // What the code has added to the guest's RSP and not yet stored.
  int32_t rsp_before = 0, rsp_after = 0;
  // The access: [base + (index << scale) + disp] of `span` bytes, RSP without the part that is not stored.
  int64_t disp = 0;
  uint16_t span = 0;
  uint8_t base = gpr_zero, index = gpr_zero, scale = 0, segment = seg_none;
  uint8_t bit_register = gpr_zero;  // BT: the bit offset, which moves the access
  bool write = false, narrow = false, run = false;
  uint16_t mnemonic = 0;  // ZydisMnemonic of an instruction for the interpreter; 0: not known
};

// A direct branch out of a translation. Within the page it is a jump that is patched for all vCPUs; to
// another page, which each vCPU may have mapped differently, it goes through a slot, each vCPU's own.
struct DirectExit {
  Translation* owner = nullptr;
  int32_t offset = 0;               // of the target from the start of the owner's page
  uint8_t* displacement = nullptr;  // of the jump that is patched; null for one through a slot
  uint32_t slot = 0;
  bool has_slot = false;
  // The owner's own entry: it reaches into a second page, and the slot says that this vCPU has that page
  // mapped as the code expects.
  bool is_entry = false;
  const uint8_t* stub = nullptr;  // where it goes while not linked
  Boundary boundary;
  // Guarded by the cache's lock: what the jump is linked to, and its place in that one's list.
  Translation* target = nullptr;
  DirectExit *next = nullptr, *previous = nullptr;
};

// How a block is best translated, found out while its first translation ran.
struct Hints {
  bool no_runs = false;  // runs of accesses meet page ends often: each access is looked up by itself
  bool settled = false;  // how often it runs need not be counted any more
  // A superblock: the instructions of several blocks of one page along a path that the guest has taken from
  // here. Their offsets are from the start of the page.
  std::shared_ptr<const DecodedBlock> path;
  uint32_t version = 0;  // of the page's bytes (DecodedBlock::word_value)
};

class Translation {
 public:
  Translation(const DecodedBlock& of, uint32_t of_profile, Boundary entered, Hints how,
              std::pmr::memory_resource& memory)
      : block(of),
        profile(of_profile),
        boundary(entered),
        hints(std::move(how)),
        sites(&memory),
        exits(&memory),
        faults(&memory) {}
  Translation(const Translation&) = delete;
  Translation& operator=(const Translation&) = delete;

  const DecodedBlock block;
  const uint32_t profile;   // CodeCache::profile()
  const Boundary boundary;  // at its entry
  const Hints hints;
  // What was translated: the block or, from it on, a path.
  const DecodedBlock& code() const noexcept { return hints.path ? *hints.path : block; }
  const uint8_t* begin = nullptr;
  const uint8_t* body = nullptr;  // behind the check of the entry (DirectExit::is_entry), or `begin`
  const uint8_t* end = nullptr;
  std::pmr::list<Site> sites;
  std::pmr::list<DirectExit> exits;
  struct Fault {
    const uint8_t* at;    // native instruction that may raise a signal
    const uint8_t* stub;  // where it is interpreted
  };
  std::pmr::vector<Fault> faults;

  // Replaced, or its page was written to: nothing new leads here. Set under the lock.
  std::atomic<bool> dead{false};
  std::atomic<uint32_t> crossings{0};  // runs of accesses that met a page's end
  DirectExit* incoming = nullptr;      // patched jumps; guarded by the cache's lock
};

}  // namespace lodge::kvm::soft
