#include "kvm/soft/translate/translator.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/translate/host_signal.hpp"

namespace lodge::kvm::soft {
namespace {

bool is_user(const Cpu& cpu) noexcept {
  return cpu.cpl() == 3;
}

}  // namespace

// Dekker's handshake with CodeCache: either the cache sees that this vCPU is inside and leaves what it has
// removed to it, or the vCPU sees here that something was removed.
class Translator::Inside {
 public:
  explicit Inside(Translator& translator) noexcept : translator_(translator) {
    translator_.inside_.store(true);
    if (!translator_.has_gone_.load()) return;
    const std::lock_guard lock(translator_.cache_.mutex());
    translator_.forget_gone();
  }
  ~Inside() { translator_.inside_.store(false, std::memory_order_release); }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  Translator& translator_;
};

Translator::Translator(Cpu& cpu, TranslatorArea& area, BlockSource& source, const Options& options,
                       CodeCache& cache)
    : cpu_(cpu),
      area_(area),
      source_(source),
      options_(options),
      cache_((cache.attach(*this, StateOffsets(cpu, area)), cache)),
      stubs_(cache.stubs()),
      counts_(options.count),
      heat_(options.engine == Engine::lockstep || options.superblock_after == 0
                ? 0
                : TranslatorArea::heat_limit / options.superblock_after),
      mapped_(cpu, area) {
  area_.translator = this;
  features_changed();
  if (counts_) interpreted_.resize(ZYDIS_MNEMONIC_MAX_VALUE + 1);
  install_signal_handlers();
}

Translator::~Translator() {
  cache_.detach(*this);
  area_.translator = nullptr;
}

void Translator::features_changed() {
  profile_ = cache_.profile(cpu_.features);
}

std::string Translator::guest_name() const {
  return fmt::format("guest_{}{}_{:#x}", is_user(cpu_) ? "user" : "kernel",
                     cpu_.mode() == Mode::bits64 ? 64 : 32, cpu_.rip);
}

bool Translator::set_idle(bool idle) noexcept {
  return cache_.set_idle(*this, idle);
}

void Translator::give_back() noexcept {
  mapped_.give_back();
}

// --- translations, and what was removed

bool Translator::may_be_ready(const Block& block) const noexcept {
  if (block.untranslatable) return false;
  // Another vCPU may have made it: asked when the block is new.
  return block.runs == 0 || block.runs >= options_.translate_after ||
         (block.code[0] != nullptr && block.code_seen == seen_.load(std::memory_order_relaxed));
}

Translation* Translator::translation_of(Block& block, Boundary boundary) noexcept {
  const uint64_t seen = seen_.load(std::memory_order_relaxed);
  if (block.code_seen != seen) {
    block.code = {};
    block.code_seen = seen;
  }
  Translation*& place = block.code[boundary.index()];
  if (place != nullptr && !place->dead.load(std::memory_order_relaxed)) return place;
  place = nullptr;
  if (!may_be_ready(block)) return nullptr;
  const std::lock_guard lock(cache_.mutex());
  place = cache_.find(block, profile_, boundary);
  if (place != nullptr || block.runs < options_.translate_after) return place;
  bool refused = false;
  place = cache_.make(*this, block, profile_, boundary, refused);
  block.untranslatable = refused;
  if (place == nullptr) return nullptr;
  ++statistics_.translations;
  statistics_.guest_instructions += block.instructions;
  statistics_.host_bytes += static_cast<uint64_t>(place->end - place->begin);
  return place;
}

bool Translator::adopt(Block& block) noexcept {
  if (!cache_.is_shared()) return false;
  const std::lock_guard lock(cache_.mutex());
  const DecodedBlock* known = cache_.known(block, profile_);
  if (known == nullptr) return false;
  block.instructions = known->instructions;
  block.bytes = known->bytes;
  block.ops = known->ops;
  return true;
}

void Translator::note_gone(Translation* translation) noexcept {
  gone_.push_back(translation);
  has_gone_.store(true);
}

void Translator::forget_gone_if_outside() noexcept {
  if (has_gone_.load() && !inside_.load()) forget_gone();
}

void Translator::forget_gone() noexcept {
  bool expired = false;
  for (const Translation* t : gone_)
    if (t != nullptr)
      mapped_.forget(*t);
    else
      expired = true;
  if (expired) seen_.fetch_add(1, std::memory_order_relaxed);  // blocks name the dead ones until then
  gone_.clear();
  passed_ = cache_.removals();
  has_gone_.store(false);
}

void Translator::link(DirectExit& exit, Translation& target) noexcept {
  bool linked = false;
  if (exit.displacement != nullptr) {
    const std::lock_guard lock(cache_.mutex());
    linked = cache_.link(exit, target);
  } else {
    linked = mapped_.link(exit, target);
  }
  if (linked) ++statistics_.links;
}

// --- running

bool Translator::ready(Block& block) noexcept {
  const Inside inside(*this);
  mapped_.sync();
  return translation_of(block, {}) != nullptr;
}

bool Translator::run(Block& block) noexcept {
  if (!may_be_ready(block)) return false;
  const Inside inside(*this);
  mapped_.sync();
  Translation* t = translation_of(block, {});
  if (t == nullptr) return false;
  mapped_.enter(block, cpu_.rip);
  area_.page = cpu_.rip & ~page_mask;
  ++statistics_.entries;
  const CurrentTranslator current(*this);
  const void* restore = resume(t->begin, {});
  stubs_.enter(&cpu_, restore);
  cpu_.block = nullptr;
  if (Translation* again = std::exchange(retranslate_, nullptr); again != nullptr) {
    const std::lock_guard lock(cache_.mutex());
    Hints hints = again->hints;
    hints.no_runs = true;
    if (!again->dead) cache_.improve(again->block, again->profile, std::move(hints));
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
  mapped_.sync();
  const Boundary boundary{.native_flags = false, .level = level};
  const uint64_t linear = cpu_.rip;
  if (const void* known = mapped_.jump(linear, level); known != nullptr) {
    area_.page = linear & ~page_mask;
    return resume(static_cast<const uint8_t*>(known), boundary);
  }
  Block* block = source_.block_at(linear);
  if (block == nullptr || source_.wants_attention()) return leave();
  Translation* t = translation_of(*block, boundary);
  if (t == nullptr) return leave();
  mapped_.enter(*block, linear);
  mapped_.remember_jump(*t, linear);
  area_.page = linear & ~page_mask;
  return resume(t->begin, boundary);
}

// The instruction behind STI or MOV SS, while nobody waits to interrupt: by the interpreter, and on.
bool Translator::leave_shadow() noexcept {
  constexpr uint64_t shadow_only = 1;  // it comes first in `stops`
  if (cpu_.stops != shadow_only || once_ || cpu_.pending.valid || source_.wants_attention() || event_waits())
    return false;
  mapped_.sync();
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
  const DecodedBlock& block = site.owner->code();
  cpu_.gpr[gpr_rip] = area_.page + (block.host & page_mask);
  cpu_.block = &block;
}

bool Translator::still_fits(const DecodedBlock& block) const noexcept {
  return cpu_.decode_key == block.key && !cpu_.user_code_flushed && !cpu_.supervisor_code_flushed;
}

void Translator::note_unfilled() noexcept {
  ++(cpu_.wants_exit ? statistics_.device : cpu_.pending.valid ? statistics_.faults : statistics_.guarded);
}

const void* Translator::on_slow_access(Site& site) noexcept {
  cache_.observe();
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
    if (cpu_.mode() != Mode::bits64) linear = static_cast<uint32_t>(linear);
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
      if (site.run && site.owner->crossings.fetch_add(1, std::memory_order_relaxed) == 63)
        retranslate_ = site.owner;
    }
  }
  const Ops& ops = site.owner->code().ops;
  uint64_t behind = uint64_t{site.counted} - site.first;
  for (unsigned i = site.first; i <= site.last; ++i) {
    const bool goes_on = interpret(ops[i]);
    if (!cpu_.interrupted_access()) --behind;
    if (std::exchange(unfilled, false)) note_unfilled();
    // On a path the next instruction may be elsewhere, and FLDCW may have ended what the code was made for.
    if (goes_on && still_fits(site.owner->code()) &&
        (i == site.last || cpu_.rip == cpu_.this_rip(ops[i + 1u])))
      continue;
    uncount(behind);
    return resume_at_rip();
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
  cache_.observe();
  before_interpreting(site);
  const DecodedBlock& block = site.owner->code();
  const uint64_t behind = uint64_t{site.counted} - site.first - 1u;
  if (counts_) ++interpreted_[site.mnemonic];
  if (!interpret(block.ops[site.first])) {
    uncount(cpu_.interrupted_access() ? behind + 1 : behind);
    return resume_at_rip();
  }
  if (cpu_.pending.valid || source_.wants_attention() || event_waits()) {
    uncount(behind);
    return leave();
  }
  // Another mode or other mappings: what follows is looked up anew.
  if (!still_fits(block)) {
    uncount(behind);
    return resume_at_rip();
  }
  cpu_.gpr[rsp] -= static_cast<uint64_t>(int64_t{site.rsp_after});
  return resume(site.next, site.after);
}

const void* Translator::on_request(Site& site) noexcept {
  cache_.observe();
  before_interpreting(site);
  const DecodedBlock& block = site.owner->code();
  cpu_.rip = cpu_.this_rip(block.ops[site.first]);
  uncount(uint64_t{site.counted} - site.first);
  return leave();
}

const void* Translator::on_exit(DirectExit& exit) noexcept {
  cache_.observe();
  cpu_.rip = area_.page + (static_cast<uint32_t>(exit.offset) & page_mask);
  if (once_ && !exit.is_entry) return leave();
  if (source_.wants_attention()) return leave();
  mapped_.sync();
  Block* block = source_.block_at(cpu_.rip);
  if (block == nullptr || source_.wants_attention()) return leave();
  Translation* t = translation_of(*block, exit.boundary);
  if (t == nullptr) return leave();
  mapped_.enter(*block, cpu_.rip);
  link(exit, *t);
  // Behind the check of its entry, which has just been made.
  return resume(exit.owner == t ? t->body : t->begin, exit.boundary);
}

const void* Translator::on_indirect(Site& site) noexcept {
  cache_.observe();
  ++statistics_.indirect_misses;
  cpu_.rip = area_.target;
  if (cpu_.mode() == Mode::bits64 && !cpu_.canonical(cpu_.rip)) {
    // The branch itself faults: as before it, then by the interpreter.
    cpu_.gpr[rsp] -= static_cast<uint64_t>(int64_t{site.rsp_after});
    before_interpreting(site);
    interpret(site.owner->code().ops[site.first]);
    return resume_at_rip();
  }
  return resume_at_rip(site.before.level);
}

// --- superblocks

// The loop has run often. Its path is recorded from the next time on that the guest is at its head.
const void* Translator::on_hot(Site& site) noexcept {
  area_.heat[heat_index(site.owner->block)] = 0;
  record_ = Record{.head = site.owner->block, .pieces = {}};
  return on_request(site);
}

uint32_t Translator::heat_index(const DecodedBlock& block) noexcept {
  return static_cast<uint32_t>(block.host * 0x9e37'79b9'7f4a'7c15 >> (64 - TranslatorArea::heat_bits));
}

bool Translator::record(const Block& block) noexcept {
  constexpr unsigned longest_wait = 64, most_pieces = 16, most_instructions = 96;
  Record& r = *record_;
  const auto offset = static_cast<uint32_t>(block.host & page_mask);
  const bool at_head = block.host == r.head.host && block.key == r.head.key;
  if (r.pieces.empty()) {
    if (!at_head || !block.same_code(r.head)) {
      if (++r.waited < longest_wait) return true;
      finish_record();  // no loop
      return false;
    }
    r.linear = cpu_.rip;
  } else {
    const auto same = [&](const BlockSource::Piece& piece) { return piece.offset == offset; };
    if (std::any_of(r.pieces.begin(), r.pieces.end(), same) || block.key != r.head.key ||
        !block.same_page(r.head) || block.host_page[1] != 0 || r.pieces.size() == most_pieces ||
        r.instructions + block.instructions > most_instructions) {
      finish_record();
      return false;
    }
  }
  r.pieces.push_back({.offset = offset, .end = offset + block.bytes});
  r.instructions += block.instructions;
  return true;
}

void Translator::finish_record() noexcept {
  const Record record = std::move(*record_);
  record_.reset();
  Hints hints;
  {
    const std::lock_guard lock(cache_.mutex());
    hints = cache_.hints(record.head, profile_);
  }
  hints.settled = true;
  if (record.pieces.size() > 1) {
    hints.path = source_.decode_pieces(record.head, record.linear, record.pieces);
    if (hints.path != nullptr) ++statistics_.superblocks;
  }
  const std::lock_guard lock(cache_.mutex());
  cache_.improve(record.head, profile_, std::move(hints));
}

const uint8_t* Translator::fault_stub(const uint8_t* at) noexcept {
  const uint8_t* const stub = cache_.fault_stub(at);
  if (stub != nullptr) area_.force_interpretation = 1;
  return stub;
}

}  // namespace lodge::kvm::soft
