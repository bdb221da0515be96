#include "kvm/soft/translate/translator.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/translate/host_signal.hpp"
#include "kvm/soft/translate/perf_map.hpp"
#include "kvm/soft/translate/unit.hpp"

namespace lodge::kvm::soft {
namespace {

// Room that is certainly enough for one translation.
constexpr size_t largest_translation = size_t{64} << 10;

// The whole pages of [begin, end).
void discard(void* begin, void* end) noexcept {
  const uint64_t first = (reinterpret_cast<uint64_t>(begin) + page_mask) & ~page_mask;
  const uint64_t last = reinterpret_cast<uint64_t>(end) & ~page_mask;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

bool is_user(const Cpu& cpu) noexcept {
  return cpu.cpl() == 3;
}

}  // namespace

Translation::~Translation() {
  translator.remove(*this);
}

Translator::Translator(Cpu& cpu, TranslatorArea& area, BlockSource& source, const Options& options,
                       PerfMap* perf_map)
    : cpu_(cpu),
      area_(area),
      source_(source),
      options_(options),
      code_(options.code_cache, PROT_READ | PROT_WRITE | PROT_EXEC,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0,
            "cannot map the translator's code cache (is executable memory forbidden here?)"),
      bump_(code_.data()),
      stubs_(code_.data(), StateOffsets(cpu, area)),
      counts_(options.count),
      perf_map_(perf_map) {
  bump_ = const_cast<uint8_t*>(stubs_.end);
  area_.translator = this;
  if (counts_) interpreted_.resize(ZYDIS_MNEMONIC_MAX_VALUE + 1);
  restart_perf_map();
  install_signal_handlers();
}

Translator::~Translator() {
  area_.translator = nullptr;
}

// --- the life of translations

Translation* Translator::translation_of(Block& block, Boundary boundary) noexcept {
  std::unique_ptr<Translation>& place = block.code[boundary.index()];
  if (place) return place.get();
  if (block.untranslatable || block.runs < options_.translate_after || full_) return nullptr;
  return translate(block, boundary);
}

Translation* Translator::translate(Block& block, Boundary boundary) noexcept {
  if (static_cast<size_t>(code_.data() + code_.size() - bump_) < largest_translation) {
    full_ = true;
    return nullptr;
  }
  auto translation = std::make_unique<Translation>(*this, block, boundary);
  UnitEmitter unit(*this, *translation, bump_, bump_ + largest_translation);
  if (!unit.emit()) {
    block.untranslatable = true;
    return nullptr;
  }
  bump_ = const_cast<uint8_t*>(translation->end);
  by_address_.emplace(translation->begin, translation.get());
  for (const uint64_t page : block.host_page)
    if (page != 0) by_page_[page].push_back(translation.get());
  if (perf_map_ != nullptr) name_for_perf(*translation);
  ++statistics_.translations;
  statistics_.guest_instructions += block.instructions;
  statistics_.host_bytes += static_cast<uint64_t>(translation->end - translation->begin);
  std::unique_ptr<Translation>& place = block.code[boundary.index()];
  place = std::move(translation);
  return place.get();
}

void Translator::restart_perf_map() noexcept {
  if (perf_map_ == nullptr) return;
  perf_map_->forget(this);
  perf_map_->add(this, code_.data(), stubs_.end, fmt::format("lodge_stubs_cpu{}", cpu_.id()));
}

// By where the guest is: its address, mode and privilege.
void Translator::name_for_perf(const Translation& t) noexcept {
  perf_map_->add(this, t.begin, t.end,
                 fmt::format("guest_{}{}_{:#x}", is_user(cpu_) ? "user" : "kernel",
                             cpu_.mode() == Mode::bits64 ? 64 : 32, cpu_.rip));
}

void Translator::remove(Translation& t) noexcept {
  ++removals_;
  if (retranslate_ == &t.block) retranslate_ = nullptr;  // the block may be going, too
  while (!t.incoming.empty()) unlink(*t.incoming.back());
  std::erase(user_crossing_, &t);
  std::erase(supervisor_crossing_, &t);
  for (DirectExit& exit : t.exits) {
    if (exit.target != nullptr) unlink(exit);
    if (exit.has_slot) {
      slot_exit_[exit.slot] = nullptr;
      free_slots_.push_back(exit.slot);
    }
  }
  for (const uint32_t i : t.jump_entries)
    if (area_.jump_code[t.boundary.level][i] == t.begin) area_.jump_tag[t.boundary.level][i] = 0;
  if (t.end == nullptr) return;  // never finished
  by_address_.erase(t.begin);
  for (const uint64_t page : t.block.host_page)
    if (const auto it = by_page_.find(page); page != 0 && it != by_page_.end()) {
      std::erase(it->second, &t);
      if (it->second.empty()) by_page_.erase(it);
    }
}

void Translator::drop_stale() noexcept {
  std::vector<Block*> stale;
  for (const auto& [page, translations] : by_page_)
    if (!translations.front()->block.fresh())
      for (Translation* t : translations) stale.push_back(&t->block);
  for (Block* block : stale)
    for (auto& code : block->code)
      if (code) {
        code.reset();
        ++statistics_.dropped;
      }
}

void Translator::rewind() noexcept {
  start_anew();
  ++statistics_.flushes;
}

void Translator::start_anew() noexcept {
  bump_ = const_cast<uint8_t*>(stubs_.end);
  full_ = false;
  restart_perf_map();
}

void Translator::release() noexcept {
  forget_user();
  forget_supervisor();
  start_anew();
  // No translation is left that could own one.
  slot_exit_ = {};
  free_slots_ = {};
  user_links_ = {};
  supervisor_links_ = {};
  by_page_ = {};
  discard(bump_, code_.data() + code_.size());
  // Empty entries are zero, so those that share a page with something else may stay.
  discard(area_.jump_tag.data(), area_.slot.data() + area_.slot.size());
}

// --- links

void Translator::link(DirectExit& exit, Translation& target) noexcept {
  exit.target = &target;
  exit.index = static_cast<uint32_t>(target.incoming.size());
  target.incoming.push_back(&exit);
  ++statistics_.links;
  if (exit.displacement != nullptr) {
    Emitter::patch(exit.displacement, target.begin);
    // It holds while the page behind is mapped as it is, though the page of both stays.
    auto& crossing = is_user(cpu_) ? user_crossing_ : supervisor_crossing_;
    if (target.block.host_page[1] != 0 &&
        std::find(crossing.begin(), crossing.end(), &target) == crossing.end())
      crossing.push_back(&target);
    return;
  }
  area_.slot[exit.slot] = target.begin;
  (is_user(cpu_) ? user_links_ : supervisor_links_).push_back(exit.slot);
}

void Translator::unlink(DirectExit& exit) noexcept {
  auto& incoming = exit.target->incoming;
  incoming.back()->index = exit.index;
  incoming[exit.index] = incoming.back();
  incoming.pop_back();
  exit.target = nullptr;
  if (exit.displacement != nullptr)
    Emitter::patch(exit.displacement, exit.stub);
  else
    area_.slot[exit.slot] = exit.stub;
}

uint32_t Translator::new_slot(DirectExit& exit) noexcept {
  uint32_t slot = TranslatorArea::slot_count;
  if (!free_slots_.empty()) {
    slot = free_slots_.back();
    free_slots_.pop_back();
  } else if (slot_exit_.size() < TranslatorArea::slot_count) {
    slot = static_cast<uint32_t>(slot_exit_.size());
    slot_exit_.push_back(nullptr);
  } else {
    full_ = true;
    return slot;
  }
  slot_exit_[slot] = &exit;
  return slot;
}

void Translator::reset_slots(std::vector<uint32_t>& slots) noexcept {
  for (const uint32_t slot : slots)
    if (DirectExit* exit = slot_exit_[slot]; exit != nullptr && exit->target != nullptr) unlink(*exit);
  slots.clear();
}

void Translator::unlink_crossing(std::vector<Translation*>& crossing) noexcept {
  for (Translation* t : crossing)
    while (!t->incoming.empty()) unlink(*t->incoming.back());
  crossing.clear();
}

uint32_t Translator::jump_index(uint64_t linear) noexcept {
  return static_cast<uint32_t>(linear) * jump_multiplier >> (32 - TranslatorArea::jump_bits);
}

void Translator::remember_jump(Translation& t, uint64_t linear) noexcept {
  const uint32_t i = jump_index(linear);
  area_.jump_tag[t.boundary.level][i] = linear ^ area_.tag;
  area_.jump_code[t.boundary.level][i] = t.begin;
  if (std::find(t.jump_entries.begin(), t.jump_entries.end(), i) == t.jump_entries.end())
    t.jump_entries.push_back(i);
}

// --- mappings of code

void Translator::forget_user() noexcept {
  user_modes_.clear();
  reset_slots(user_links_);
  unlink_crossing(user_crossing_);
  user_pages_.clear();
  cpu_.user_code_pages.clear();
  cpu_.user_code_flushed = false;
}

void Translator::forget_supervisor() noexcept {
  supervisor_modes_.clear();
  reset_slots(supervisor_links_);
  unlink_crossing(supervisor_crossing_);
  supervisor_pages_.clear();
  cpu_.supervisor_code_pages.clear();
  cpu_.supervisor_code_flushed = false;
  cpu_.supervisor_code_is_local = false;
}

void Translator::sync() noexcept {
  if (cpu_.user_code_flushed) forget_user();
  if (cpu_.supervisor_code_flushed) forget_supervisor();
  auto& modes = is_user(cpu_) ? user_modes_ : supervisor_modes_;
  for (const ModeTag& mode : modes)
    if (mode.key == cpu_.decode_key) {
      area_.tag = uint64_t{mode.id} << 48;
      return;
    }
  if (++last_id_ == 0) {
    last_id_ = 1;
    user_modes_.clear();
    supervisor_modes_.clear();
    for (auto& tags : area_.jump_tag) tags.fill(0);
  }
  modes.push_back({.key = cpu_.decode_key, .id = last_id_});
  area_.tag = uint64_t{last_id_} << 48;
}

void Translator::register_page(const Block& block, uint64_t linear) noexcept {
  const bool user = is_user(cpu_);
  const uint64_t page = linear >> page_shift;
  const auto [it, added] = (user ? user_pages_ : supervisor_pages_).try_emplace(block.host_page[0], page);
  const auto enter = [&](uint64_t entered) {
    (user ? cpu_.user_code_pages : cpu_.supervisor_code_pages).insert(entered);
    if (!user && !cpu_.in_global_page(entered << page_shift)) cpu_.supervisor_code_is_local = true;
  };
  if (added || it->second != page) {
    if (!added) {
      // The same code under a second address: what was linked through slots holds for the first one only.
      forget_user();
      forget_supervisor();
      sync();
      (user ? user_pages_ : supervisor_pages_)[block.host_page[0]] = page;
    }
    enter(page);
  }
  if (block.host_page[1] != 0) enter(page + 1);
}

// --- running

bool Translator::run(Block& block) noexcept {
  sync();
  Translation* t = translation_of(block, {});
  if (t == nullptr) return false;
  register_page(block, cpu_.rip);
  area_.page = cpu_.rip & ~page_mask;
  ++statistics_.entries;
  const CurrentTranslator current(*this);
  const void* restore = resume(t->begin, {});
  stubs_.enter(&cpu_, restore);
  cpu_.block = nullptr;
  if (Block* again = std::exchange(retranslate_, nullptr); again != nullptr) {
    again->runs_are_poor = true;
    for (auto& code : again->code) code.reset();
    if (once_) return false;  // it has left in the middle of the block
  }
  return true;
}

bool Translator::run_once(Block& block) noexcept {
  once_ = true;
  const bool done = run(block);
  once_ = false;
  return done;
}

const void* Translator::leave() noexcept {
  return stubs_.leave;
}

const void* Translator::resume(const uint8_t* code, Boundary boundary) noexcept {
  area_.resume = reinterpret_cast<uint64_t>(code);
  return stubs_.restore[boundary.index()];
}

// Goes on at Cpu::rip, with everything in the Cpu.
const void* Translator::resume_at_rip() noexcept {
  return resume_at_rip(0);
}

const void* Translator::resume_at_rip(uint8_t level) noexcept {
  cpu_.block = nullptr;
  if (cpu_.interrupt_shadow && !leave_shadow()) return leave();
  if (cpu_.stops != 0 || cpu_.pending.valid || source_.wants_attention() || event_waits()) return leave();
  if (once_ || cpu_.mode() == Mode::bits16) return leave();
  sync();
  const Boundary boundary{.native_flags = false, .level = level};
  const uint64_t linear = cpu_.rip;
  const uint32_t i = jump_index(linear);
  if (area_.jump_tag[level][i] == (linear ^ area_.tag) && cpu_.canonical(linear)) {
    area_.page = linear & ~page_mask;
    return resume(static_cast<const uint8_t*>(area_.jump_code[level][i]), boundary);
  }
  Block* block = source_.block_at(linear);
  if (block == nullptr || source_.wants_attention()) return leave();
  Translation* t = translation_of(*block, boundary);
  if (t == nullptr) return leave();
  register_page(*block, linear);
  remember_jump(*t, linear);
  area_.page = linear & ~page_mask;
  return resume(t->begin, boundary);
}

// The instruction behind STI or MOV SS, while nobody waits to interrupt: by the interpreter, and on.
bool Translator::leave_shadow() noexcept {
  constexpr uint64_t shadow_only = 1;  // it comes first in `stops`
  if (cpu_.stops != shadow_only || once_ || cpu_.pending.valid || source_.wants_attention() || event_waits())
    return false;
  sync();
  Block* block = source_.block_at(cpu_.rip);
  if (block == nullptr || source_.wants_attention()) return false;
  cpu_.gpr[gpr_rip] = cpu_.rip;
  cpu_.block = block;
  cpu_.interrupt_shadow = false;
  interpret(block->ops.front());
  cpu_.block = nullptr;
  return true;
}

// One op by the interpreter; false when it did not end with "next instruction".
bool Translator::interpret(const Op& op) noexcept {
  ++statistics_.interpreted;
  if (op.handler == run_complex) {
    switch (op.complex(cpu_, op)) {
      case Step::next: cpu_.rip = cpu_.next_rip(op); return cpu_.stops == 0;
      case Step::fault: cpu_.rip = cpu_.this_rip(op); return false;
      case Step::exit: cpu_.leave_run = true; return false;
      case Step::branch:
        // In lockstep the interpreter's block has ended here, and so does this one.
        return !once_ && cpu_.stops == 0 && !cpu_.pending.valid && cpu_.rip == cpu_.next_rip(op);
    }
  }
  Op pair[2] = {op, Decoder::end_of_block(op.offset + op.length)};
  pair[0].handler(cpu_, pair);
  return !cpu_.interrupted_access() && cpu_.stops == 0 && cpu_.rip == cpu_.next_rip(op);
}

void Translator::before_interpreting(const Site& site) noexcept {
  cpu_.gpr[rsp] += static_cast<uint64_t>(int64_t{site.rsp_before});
  const Block& block = site.owner->block;
  cpu_.gpr[gpr_rip] = area_.page + (block.host & page_mask);
  cpu_.block = &block;
}

void Translator::note_unfilled() noexcept {
  ++(cpu_.wants_exit ? statistics_.device : cpu_.pending.valid ? statistics_.faults : statistics_.guarded);
}

const void* Translator::on_slow_access(Site& site) noexcept {
  ++statistics_.slow_accesses;
  before_interpreting(site);
  const bool forced = std::exchange(area_.force_interpretation, 0) != 0;
  bool unfilled = false;
  if (forced) {
    ++statistics_.native_faults;
  } else {
    uint64_t linear =
        cpu_.gpr[site.base] + (cpu_.gpr[site.index] << site.scale) + static_cast<uint64_t>(site.disp);
    if (site.narrow) linear = static_cast<uint32_t>(linear);
    if (site.bit_register != gpr_zero) {
      const uint64_t offset = cpu_.gpr[site.bit_register];
      linear += site.span == 8 ? static_cast<uint64_t>(static_cast<int64_t>(offset) >> 6 << 3)
                               : static_cast<uint64_t>(int64_t{static_cast<int32_t>(offset)} >> 5 << 2);
    }
    if (site.segment != seg_none) linear += cpu_.segment[site.segment].base;
    if ((linear & page_mask) + site.span <= page_size) {
      unfilled = !cpu_.fill_tlb(linear, site.write);
      if (!unfilled) ++statistics_.filled;
      if (!unfilled && !source_.wants_attention()) {
        cpu_.gpr[rsp] -= static_cast<uint64_t>(int64_t{site.rsp_before});
        return resume(site.retry, {.native_flags = false, .level = site.before.level});
      }
    } else {
      ++statistics_.crossings;
      // A run of accesses that crosses a page: when that happens often, each is better looked up by itself.
      if (site.run && ++site.owner->block.crossings == 64) retranslate_ = &site.owner->block;
    }
  }
  const uint64_t removals = removals_;
  const std::vector<Op>& ops = site.owner->block.ops;
  uint64_t behind = site.owner->block.instructions - site.first;
  for (unsigned i = site.first; i <= site.last; ++i) {
    const bool goes_on = interpret(ops[i]);
    if (!cpu_.interrupted_access()) --behind;
    if (std::exchange(unfilled, false)) note_unfilled();
    if (goes_on && removals == removals_) continue;
    uncount(behind);
    return goes_on ? leave() : resume_at_rip();
  }
  if (cpu_.pending.valid || source_.wants_attention() || retranslate_ != nullptr) {
    uncount(behind);
    return leave();
  }
  if (site.next == nullptr) return resume_at_rip();
  cpu_.gpr[rsp] -= static_cast<uint64_t>(int64_t{site.rsp_after});
  return resume(site.next, site.after);
}

const void* Translator::on_complex(Site& site) noexcept {
  before_interpreting(site);
  const uint64_t removals = removals_;
  const Block& block = site.owner->block;
  const uint64_t behind = block.instructions - site.first - 1u;
  if (counts_) ++interpreted_[site.mnemonic];
  if (!interpret(block.ops[site.first])) {
    uncount(cpu_.interrupted_access() ? behind + 1 : behind);
    return resume_at_rip();
  }
  if (removals != removals_ || cpu_.pending.valid || source_.wants_attention() || event_waits()) {
    uncount(behind);
    return leave();
  }
  // Another mode or other mappings: what follows is looked up anew.
  if (cpu_.decode_key != block.key || cpu_.user_code_flushed || cpu_.supervisor_code_flushed) {
    uncount(behind);
    return resume_at_rip();
  }
  cpu_.gpr[rsp] -= static_cast<uint64_t>(int64_t{site.rsp_after});
  return resume(site.next, site.after);
}

const void* Translator::on_request(Site& site) noexcept {
  before_interpreting(site);
  const Block& block = site.owner->block;
  cpu_.rip = cpu_.this_rip(block.ops[site.first]);
  uncount(block.instructions - site.first);
  return leave();
}

const void* Translator::on_exit(DirectExit& exit) noexcept {
  cpu_.rip = area_.page + (static_cast<uint32_t>(exit.offset) & page_mask);
  if (once_) return leave();
  if (source_.wants_attention()) return leave();
  const uint64_t removals = removals_;
  sync();
  Block* block = source_.block_at(cpu_.rip);
  if (block == nullptr || removals != removals_ || source_.wants_attention()) return leave();
  Translation* t = translation_of(*block, exit.boundary);
  if (t == nullptr) return leave();
  register_page(*block, cpu_.rip);
  if (exit.target == nullptr) link(exit, *t);
  return resume(t->begin, exit.boundary);
}

const void* Translator::on_indirect(Site& site) noexcept {
  ++statistics_.indirect_misses;
  cpu_.rip = area_.target;
  if (cpu_.mode() == Mode::bits64 && !cpu_.canonical(cpu_.rip)) {
    // The branch itself faults: as before it, then by the interpreter.
    cpu_.gpr[rsp] -= static_cast<uint64_t>(int64_t{site.rsp_after});
    before_interpreting(site);
    interpret(site.owner->block.ops[site.first]);
    return resume_at_rip();
  }
  return resume_at_rip(site.before.level);
}

const uint8_t* Translator::fault_stub(const uint8_t* at) noexcept {
  if (at < code_.data() || at >= bump_) return nullptr;
  auto it = by_address_.upper_bound(at);
  if (it == by_address_.begin()) return nullptr;
  const Translation& t = *std::prev(it)->second;
  for (const Translation::Fault& fault : t.faults)
    if (fault.at == at) {
      area_.force_interpretation = 1;
      return fault.stub;
    }
  return nullptr;
}

}  // namespace lodge::kvm::soft
