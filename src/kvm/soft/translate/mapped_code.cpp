#include "kvm/soft/translate/mapped_code.hpp"

#include <utility>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/translate/discard.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr unsigned level_shift = 24;  // in a place: above the entry's index

bool is_user_key(uint32_t decode_key) noexcept {
  return (decode_key & key::user) != 0;
}

}  // namespace

// --- jump tables

unsigned MappedCode::view_of(uint32_t decode_key) noexcept {
  static_assert(TranslatorArea::views == 8);
  const bool wide = (decode_key & key::mode) == 0;
  return (decode_key >> key::tlb_shift & 3) | (wide ? 0u : 4u);
}

uint32_t MappedCode::place_of(uint64_t linear, uint8_t level) noexcept {
  return uint32_t{level} << level_shift | JumpTable::offset(linear) >> JumpTable::shift;
}

JumpTable::Entry& MappedCode::entry(unsigned view, uint32_t place) noexcept {
  return area_.jump[view][place >> level_shift].entry[place & (JumpTable::size - 1)];
}

const void* MappedCode::jump(uint64_t linear, uint8_t level) noexcept {
  const JumpTable::Entry& known = entry(view_of(cpu_.decode_key), place_of(linear, level));
  if (known.linear == linear) return known.code;
  // Another address may have taken its entry: two of them that take turns must not cost a search each time.
  const Page* page = place_in(pages(is_user_key(cpu_.decode_key)), linear >> page_shift);
  if (page == nullptr || page->linear != linear >> page_shift) return nullptr;
  for (const Jump& jump : page->jumps)
    if (jump.offset == (linear & page_mask) && jump.level == level && jump.key == cpu_.decode_key) {
      set_jump(jump, page->linear);
      return jump.code;
    }
  return nullptr;
}

void MappedCode::set_jump(const Jump& jump, uint64_t linear_page) noexcept {
  const unsigned view = view_of(jump.key);
  const uint64_t linear = linear_page << page_shift | jump.offset;
  const uint32_t place = place_of(linear, jump.level);
  JumpTable::Entry& known = entry(view, place);
  if (known.code == nullptr) views_[view].taken.push_back(place);
  known = {.linear = linear, .code = jump.code};
}

void MappedCode::remember_jump(const Translation& target, uint64_t linear) noexcept {
  Pages& all = pages(is_user_key(target.block.key));
  const auto it = all.by_host.find(target.block.host_page[0]);
  if (it == all.by_host.end() || !all.knows(it->second) || it->second.linear != linear >> page_shift) return;
  const Jump jump{.code = target.begin,
                  .key = target.block.key,
                  .offset = static_cast<uint16_t>(linear & page_mask),
                  .level = target.boundary.level};
  set_jump(jump, it->second.linear);
  // It may be there: another address has taken its entry.
  for (Jump& known : it->second.jumps)
    if (known.offset == jump.offset && known.key == jump.key && known.level == jump.level) {
      known.code = jump.code;
      return;
    }
  it->second.jumps.push_back(jump);
}

void MappedCode::empty(unsigned view) noexcept {
  View& what = views_[view];
  for (const uint32_t place : what.taken)
    entry(view, place) = {.linear = JumpTable::nobody(place & (JumpTable::size - 1)), .code = nullptr};
  what.taken.clear();
}

// --- flushes

void MappedCode::flush(bool user) noexcept {
  for (unsigned view = 0; view < TranslatorArea::views; ++view)
    if (is_user_key(views_[view].key) == user) empty(view);
  Pages& all = pages(user);
  for (const uint32_t slot : all.in_use) {
    Lead& lead = leads_[slot];
    if (lead.to != nullptr) area_.slot[slot] = lead.stub;
    lead.in_use = false;
  }
  all.in_use.clear();
  for (const uint64_t host_page : all.known)
    if (const auto it = all.by_host.find(host_page); it != all.by_host.end()) {
      const Page& page = it->second;
      if (page.jumps.empty() && page.in.empty() && page.out.empty()) all.by_host.erase(it);
    }
  all.known.clear();
  all.by_linear = {};
  ++all.flushes;
  if (user) {
    cpu_.user_code_pages.clear();
    cpu_.user_code_flushed = false;
  } else {
    cpu_.supervisor_code_pages.clear();
    cpu_.supervisor_code_flushed = false;
    cpu_.supervisor_code_is_local = false;
  }
}

void MappedCode::sync() noexcept {
  if (cpu_.user_code_flushed) flush(true);
  if (cpu_.supervisor_code_flushed) flush(false);
  const unsigned view = view_of(cpu_.decode_key);
  View& present = views_[view];
  if (present.key == cpu_.decode_key) return;
  empty(view);
  if (present.key == View::none)
    for (JumpTable& table : area_.jump[view]) table.entry[0].linear = JumpTable::nobody(0);
  present.key = cpu_.decode_key;
}

// --- pages

void MappedCode::enter(const DecodedBlock& block, uint64_t linear) noexcept {
  const bool user = is_user_key(block.key), wide = (block.key & key::mode) == 0;
  const uint64_t page = linear >> page_shift, last = (wide ? ~uint64_t{0} : 0xffff'ffff) >> page_shift;
  enter_page(user, block.host_page[0], page);
  if (block.host_page[1] != 0) enter_page(user, block.host_page[1], (page + 1) & last);
}

void MappedCode::enter_page(bool user, uint64_t host_page, uint64_t linear_page) noexcept {
  Pages& all = pages(user);
  Page* page = &all.by_host[host_page];
  if (all.knows(*page)) {
    if (page->linear == linear_page) return;
    // The same code under a second address: what is known holds for the first one only.
    flush(true);
    flush(false);
    page = &all.by_host[host_page];
  }
  page->linear = linear_page;
  page->known_in = all.flushes;
  all.known.push_back(host_page);
  place_in(all, linear_page) = page;
  (user ? cpu_.user_code_pages : cpu_.supervisor_code_pages).insert(linear_page);
  if (!user && !cpu_.in_global_page(linear_page << page_shift)) cpu_.supervisor_code_is_local = true;
  put_back(all, *page);
}

void MappedCode::put_back(Pages& all, Page& page) noexcept {
  for (const Jump& jump : page.jumps)
    if (views_[view_of(jump.key)].key == jump.key) set_jump(jump, page.linear);
  for (const auto* slots : {&page.in, &page.out})
    for (const uint32_t slot : *slots)
      if (fits(all, leads_[slot])) set(all, slot);
}

// --- slots

bool MappedCode::fits(const Pages& all, const Lead& lead) const noexcept {
  return all.knows(*lead.from_page) && all.knows(*lead.to_page) &&
         lead.from_page->linear + static_cast<uint64_t>(int64_t{lead.distance}) == lead.to_page->linear;
}

void MappedCode::set(Pages& all, uint32_t slot) noexcept {
  Lead& lead = leads_[slot];
  area_.slot[slot] = lead.code;
  if (!std::exchange(lead.in_use, true)) all.in_use.push_back(slot);
}

bool MappedCode::link(const DirectExit& exit, const Translation& target) noexcept {
  // An entry's slot answers for its own code only, and leads to the second page of that.
  if (exit.is_entry && exit.owner != &target) return false;
  Pages& all = pages(is_user_key(target.block.key));
  const auto from = all.by_host.find(exit.owner->block.host_page[0]);
  const auto to = all.by_host.find(target.block.host_page[exit.is_entry ? 1 : 0]);
  if (from == all.by_host.end() || to == all.by_host.end()) return false;
  Lead lead{.to = &target,
            .code = exit.is_entry ? target.body : target.begin,
            .stub = exit.stub,
            .from_page = &from->second,
            .to_page = &to->second,
            .distance = exit.is_entry ? 1 : exit.offset >> page_shift};
  if (!fits(all, lead)) return false;
  if (leads_.size() <= exit.slot) leads_.resize(exit.slot + 1);
  if (leads_[exit.slot].to != nullptr) drop(exit.slot);
  lead.in_use = leads_[exit.slot].in_use;
  lead.in_at = static_cast<uint32_t>(lead.to_page->in.size());
  lead.to_page->in.push_back(exit.slot);
  lead.out_at = static_cast<uint32_t>(lead.from_page->out.size());
  lead.from_page->out.push_back(exit.slot);
  leads_[exit.slot] = lead;
  set(all, exit.slot);
  return true;
}

// The last one takes the place of the one that goes.
void MappedCode::remove(std::vector<uint32_t>& slots, uint32_t at, uint32_t Lead::*place) noexcept {
  slots[at] = slots.back();
  leads_[slots[at]].*place = at;
  slots.pop_back();
}

void MappedCode::drop(uint32_t slot) noexcept {
  Lead& lead = leads_[slot];
  area_.slot[slot] = lead.stub;
  remove(lead.to_page->in, lead.in_at, &Lead::in_at);
  remove(lead.from_page->out, lead.out_at, &Lead::out_at);
  lead.to = nullptr;
}

// --- what is gone

void MappedCode::forget(const Translation& gone) noexcept {
  Pages& all = pages(is_user_key(gone.block.key));
  for (const DirectExit& exit : gone.exits)
    if (exit.has_slot && exit.slot < leads_.size() && leads_[exit.slot].to != nullptr) drop(exit.slot);
  const auto it = all.by_host.find(gone.block.host_page[0]);
  if (it == all.by_host.end()) return;
  Page& page = it->second;
  for (size_t i = page.in.size(); i-- > 0;)
    if (leads_[page.in[i]].to == &gone) drop(page.in[i]);
  std::erase_if(page.jumps, [&](const Jump& jump) {
    if (jump.code != gone.begin) return false;
    // The entry stays among those that are taken: emptying it again does no harm.
    const uint32_t place = place_of(page.linear << page_shift | jump.offset, jump.level);
    JumpTable::Entry& known = entry(view_of(jump.key), place);
    if (known.code == jump.code) known.linear = JumpTable::nobody(place & (JumpTable::size - 1));
    return true;
  });
}

void MappedCode::give_back() noexcept {
  for (Pages* all : {&user_, &supervisor_}) {
    all->by_host = {};
    all->known = {};
    all->by_linear = {};
    all->in_use = {};
    ++all->flushes;
  }
  leads_ = {};
  // No slot and no entry of a table leads anywhere any more. Empty ones are zero, so those that share a page
  // with something else may stay.
  for (View& view : views_) view = {};
  discard(area_.jump.data(), area_.slot.data() + area_.slot.size());
}

}  // namespace lodge::kvm::soft
