// What one vCPU knows of translated code by linear address: the jump tables of indirect branches, and the
// slots through which direct branches go to other pages. All of it holds for the mappings that were looked
// at, and a flush of the TLB takes it out of use.
//
// It is taken out of use, not forgotten. Each page of host memory keeps the *leads* into its code: entries of
// jump tables by their offset in the page, and slots with the page they are used in. When the page has been
// looked up again after a flush, wherever it is mapped now, its leads are put back at once: a switch of
// address spaces costs a look-up for each page that runs then, not for each branch.
//
// Invariant: a slot leads somewhere only while both pages, the one with the branch and the one it goes to,
// have been looked up since the last flush and are as far apart as the branch reaches. So no order in which
// pages are entered, and no second mapping of a page, makes a branch go where the guest's page tables do not
// say.
//
// Only the vCPU's thread calls it, but for forget() and give_back(), which any thread may call under the code
// cache's lock while the vCPU is not in translated code (CodeCache::settle()).
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/translate/area.hpp"
#include "kvm/soft/translate/translation.hpp"

namespace lodge::kvm::soft {

class MappedCode {
 public:
  // Both outlive it.
  MappedCode(Cpu& cpu, TranslatorArea& area) noexcept : cpu_(cpu), area_(area) {}

  // Takes out of use what the Cpu says was flushed; afterwards the present mode has its jump tables.
  void sync() noexcept;
  // The page or pages of `block` have just been looked up in the present mode: they are mapped at `linear`.
  void enter(const DecodedBlock& block, uint64_t linear) noexcept;

  // The code at `linear` for a boundary with this level and stored flags, which is in its jump table now;
  // null: not known.
  const void* jump(uint64_t linear, uint8_t level) noexcept;
  // `target` is the code at `linear`, whose page has been entered.
  void remember_jump(const Translation& target, uint64_t linear) noexcept;
  // `exit`, which has a slot, goes to `target`, whose page has been entered. False: it may not.
  bool link(const DirectExit& exit, const Translation& target) noexcept;

  // Nothing leads to this translation or from it any more.
  void forget(const Translation& gone) noexcept;
  // All translations are gone: memory goes back to the host.
  void give_back() noexcept;

  // Which of the area's sets of jump tables the code of a decode key uses.
  static unsigned view_of(uint32_t decode_key) noexcept;

 private:
  struct Jump {
    const uint8_t* code;
    uint32_t key;  // the decode key of the code
    uint16_t offset;
    uint8_t level;
  };
  // One page of host memory that has run as code.
  struct Page {
    uint64_t linear = 0;    // page number, while it is known
    uint64_t known_in = 0;  // the flush count (Pages::flushes) in which it was looked up
    std::vector<Jump> jumps;
    std::vector<uint32_t> in, out;  // slots that lead here; of branches that are here
  };
  // Those that run as user code or those that run as supervisor code.
  struct Pages {
    std::unordered_map<uint64_t, Page> by_host;
    uint64_t flushes = 1;
    std::vector<uint64_t> known;         // host pages looked up since the last one
    std::vector<uint32_t> in_use;        // slots that were set since then
    std::array<Page*, 256> by_linear{};  // some of the known ones, by the low bits of their page number
    bool knows(const Page& page) const noexcept { return page.known_in == flushes; }
  };
  // What a slot leads to; by its number.
  struct Lead {
    const Translation* to = nullptr;  // null: nothing
    const void *code = nullptr, *stub = nullptr;
    Page *from_page = nullptr, *to_page = nullptr;
    uint32_t in_at = 0, out_at = 0;  // its places in to_page->in and from_page->out
    int32_t distance = 0;            // of the pages
    bool in_use = false;             // is in Pages::in_use, whatever it leads to
  };
  // What a view's jump tables are filled with.
  struct View {
    uint32_t key = none;          // the decode key that they are for
    std::vector<uint32_t> taken;  // entries with code: level and index
    static constexpr uint32_t none = ~0u;
  };

  Pages& pages(bool user) noexcept { return user ? user_ : supervisor_; }
  void enter_page(bool user, uint64_t host_page, uint64_t linear_page) noexcept;
  static Page*& place_in(Pages& pages, uint64_t linear_page) noexcept {
    return pages.by_linear[linear_page % std::tuple_size_v<decltype(pages.by_linear)>];
  }
  void put_back(Pages& pages, Page& page) noexcept;
  void set(Pages& pages, uint32_t slot) noexcept;
  bool fits(const Pages& pages, const Lead& lead) const noexcept;
  void drop(uint32_t slot) noexcept;
  void remove(std::vector<uint32_t>& slots, uint32_t at, uint32_t Lead::*place) noexcept;
  void flush(bool user) noexcept;
  void empty(unsigned view) noexcept;
  void set_jump(const Jump& jump, uint64_t linear_page) noexcept;
  static uint32_t place_of(uint64_t linear, uint8_t level) noexcept;
  JumpTable::Entry& entry(unsigned view, uint32_t place) noexcept;

  Cpu& cpu_;
  TranslatorArea& area_;
  Pages user_, supervisor_;
  std::vector<Lead> leads_;
  std::array<View, TranslatorArea::views> views_;
};

}  // namespace lodge::kvm::soft
