// One block as host code.
#pragma once

#include <cstdint>
#include <deque>
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

// A direct branch out of a translation.
struct DirectExit {
  Translation* owner = nullptr;
  Translation* target = nullptr;    // what it is linked to
  int32_t offset = 0;               // of the target from the start of the owner's page
  uint8_t* displacement = nullptr;  // of the jump that is patched; null for one through a slot
  uint32_t slot = 0;
  bool has_slot = false;
  const uint8_t* stub = nullptr;  // where it goes while not linked
  Boundary boundary;
  uint32_t index = 0;  // in target->incoming
};

class Translation {
 public:
  Translation(Translator& by, Block& of, Boundary entered) noexcept
      : translator(by), block(of), boundary(entered) {}
  ~Translation();  // unlinks it from everything
  Translation(const Translation&) = delete;
  Translation& operator=(const Translation&) = delete;

  Translator& translator;
  Block& block;
  const Boundary boundary;  // at its entry
  const uint8_t* begin = nullptr;
  const uint8_t* end = nullptr;
  std::deque<Site> sites;
  std::deque<DirectExit> exits;
  std::vector<DirectExit*> incoming;
  std::vector<uint32_t> jump_entries;  // of the area's table for its level, that name it
  struct Fault {
    const uint8_t* at;    // native instruction that may raise a signal
    const uint8_t* stub;  // where it is interpreted
  };
  std::vector<Fault> faults;
};

}  // namespace lodge::kvm::soft
