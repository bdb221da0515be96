// Guest memory through the soft TLB: the slow paths of the interpreter's loads and stores, and everything
// that complex instructions use.
#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/interpret/block.hpp"
#include "kvm/soft/mmu/host_access.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft {

// Before a page may be written: its decoded instructions become stale, its dirty bit is set. False: the
// running block is of this page, so the instruction has to run alone first.
bool Cpu::prepare_write(Slot& slot, uint64_t gpa) noexcept {
  const uint64_t page = slot.page(gpa);
  if ((slot.code(page).load() & Slot::has_code) != 0) {
    const auto host = reinterpret_cast<uint64_t>(slot.host) + (page << page_shift);
    if (!alone && block != nullptr && (block->host_page[0] == host || block->host_page[1] == host)) {
      run_alone = true;
      return false;
    }
    slot.invalidate(page);
  }
  if (slot.log_dirty && !slot.is_dirty(page)) slot.mark_dirty(page);
  return true;
}

uint8_t* Cpu::resolve(uint64_t linear, Access access, unsigned view, uint64_t& gpa, bool& failed) noexcept {
  failed = false;
  TlbSet& set = tlb_sets[view];
  TlbEntry& entry = set.at(linear);
  const uint64_t page = linear & ~page_mask;
  const uint64_t tag = access == Access::read    ? entry.read
                       : access == Access::write ? entry.write
                                                 : entry.fetch;
  if (tag == page) return reinterpret_cast<uint8_t*>(entry.host_of(linear));

  Translation t;
  if (!translate(linear, access, view, t)) {
    failed = true;
    return nullptr;
  }
  gpa = t.gpa | (linear & page_mask);
  Slot* slot = memory->find(gpa);
  if (slot == nullptr || (slot->read_only && access == Access::write)) return nullptr;
  if (access == Access::write && !prepare_write(*slot, gpa)) {
    failed = true;
    return nullptr;
  }
  const unsigned i = TlbSet::index(linear);
  const uint64_t host = reinterpret_cast<uint64_t>(slot->host) + (gpa - slot->gpa);
  if (set.page[i] != page || entry.host != (host & ~page_mask)) set.clear(i);
  set.page[i] = page;
  entry.host = host & ~page_mask;
  if (access == Access::fetch) {
    entry.fetch = page;
  } else {
    // A page that may be fetched but not read does not exist, but one that may be read and not written does.
    // A supervisor fetch from a user page says nothing of SMAP, so it sets no read tag.
    entry.read = page;
    const uint64_t number = slot->page(gpa);
    const bool ready = (slot->code(number).load() & Slot::has_code) == 0 && !slot->read_only &&
                       (!slot->log_dirty || slot->is_dirty(number));
    if (t.writable && ready) entry.write = page;
  }
  set.mark(i, t.global, t.large);
  return reinterpret_cast<uint8_t*>(host);
}

bool Cpu::check_explicit(uint64_t linear, unsigned size, bool write) noexcept {
  if (alignment_checks && size <= 8 && (linear & (size - 1)) != 0) return raise(Exception::ac, 0);
  if (!watchpoints) return true;
  uint64_t hits = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const uint64_t control = active_dr7() >> (16 + 4 * i) & 15;
    if ((active_dr7() >> 2 * i & 3) == 0 || (control & 3) == 0 || (control & 3) == 2) continue;
    if ((control & 3) == 1 && !write) continue;
    constexpr unsigned lengths[4] = {1, 2, 8, 4};
    const unsigned length = lengths[control >> 2];
    const uint64_t start = active_dr(i) & ~uint64_t{length - 1};
    if (linear < start + length && start < linear + size) hits |= uint64_t{1} << i;
  }
  if (hits == 0) return true;
  if (!alone) {
    run_alone = true;
    return false;
  }
  debug_hits |= hits;
  return true;
}

void WriteJournal::note(uint64_t host, unsigned size) noexcept {
  while (size > 0) {
    const unsigned part = std::min(size, 64u);
    Entry& entry = entries.emplace_back();
    entry.host = host;
    entry.size = part;
    host_read(host, entry.before.data(), part);
    host += part;
    size -= part;
  }
}

bool Cpu::access_part(uint64_t linear, void* data, unsigned size, Access access, unsigned view) noexcept {
  uint64_t gpa = 0;
  bool failed = false;
  const uint8_t* host = resolve(linear, access, view, gpa, failed);
  if (host == nullptr) return !failed && platform_.mmio(gpa, data, size, access == Access::write);
  if (access == Access::write) {
    if (journal != nullptr) journal->note(reinterpret_cast<uint64_t>(host), size);
    host_write(reinterpret_cast<uint64_t>(host), data, size);
  } else {
    host_read(reinterpret_cast<uint64_t>(host), data, size);
  }
  return true;
}

bool Cpu::probe(uint64_t linear, unsigned size, Access access, unsigned view) noexcept {
  if (mode_ == Mode::bits64 && !canonical(linear)) return raise(Exception::gp, 0);
  for (uint64_t page = linear & ~page_mask; page <= ((linear + size - 1) & ~page_mask); page += page_size) {
    uint64_t gpa = 0;
    bool failed = false;
    if (resolve(page < linear ? linear : page, access, view, gpa, failed) == nullptr && failed) return false;
  }
  return true;
}

bool Cpu::access_bytes(uint64_t linear, void* data, unsigned size, Access access, unsigned view) noexcept {
  // Compatibility-mode code makes 32-bit addresses, but its interrupts use 64-bit tables and stacks.
  const bool wide = long_mode();
  if (wide) {
    if (!canonical(linear) || !canonical(linear + size - 1)) return raise(Exception::gp, 0);
  } else {
    linear = static_cast<uint32_t>(linear);
  }
  const uint64_t first = page_size - (linear & page_mask);
  if (size <= first) return access_part(linear, data, size, access, view);
  // Both pages must answer before either changes. 32-bit linear addresses wrap.
  uint64_t second = linear + first;
  if (!wide) second = static_cast<uint32_t>(second);
  uint64_t gpa = 0;
  bool failed = false;
  resolve(linear, access, view, gpa, failed);
  if (failed) return false;
  resolve(second, access, view, gpa, failed);
  if (failed) return false;
  const auto split = static_cast<unsigned>(first);
  return access_part(linear, data, split, access, view) &&
         access_part(second, static_cast<uint8_t*>(data) + split, size - split, access, view);
}

bool Cpu::read_bytes(uint64_t linear, void* out, unsigned size) noexcept {
  return check_explicit(linear, size, false) && access_bytes(linear, out, size, Access::read, view());
}

bool Cpu::write_bytes(uint64_t linear, const void* data, unsigned size) noexcept {
  return check_explicit(linear, size, true) &&
         access_bytes(linear, const_cast<void*>(data), size, Access::write, view());
}

bool Cpu::probe_read(uint64_t linear, unsigned size) noexcept {
  return probe(linear, size, Access::read, view());
}
bool Cpu::probe_write(uint64_t linear, unsigned size) noexcept {
  return probe(linear, size, Access::write, view());
}

bool Cpu::probe_write_system(uint64_t linear, unsigned size) noexcept {
  return probe(linear, size, Access::write, system_view());
}

bool Cpu::access_system(uint64_t linear, void* data, unsigned size, bool write) noexcept {
  return access_bytes(linear, data, size, write ? Access::write : Access::read, system_view());
}

bool Cpu::load_slow(uint64_t linear, unsigned size) noexcept {
  scratch = 0;
  return read_bytes(linear, &scratch, size);
}

bool Cpu::store_slow(uint64_t linear, unsigned size, uint64_t value) noexcept {
  scratch = value;
  return write_bytes(linear, &scratch, size);
}

uint8_t* Cpu::host_for_write(uint64_t linear, unsigned size) noexcept {
  if (!check_explicit(linear, size, true)) return nullptr;
  if (mode_ == Mode::bits64 && !canonical(linear)) {
    raise(Exception::gp, 0);
    return nullptr;
  }
  if (page_size - (linear & page_mask) < size) return nullptr;
  uint64_t gpa = 0;
  bool failed = false;
  uint8_t* const host = resolve(linear, Access::write, view(), gpa, failed);
  if (host != nullptr && journal != nullptr) journal->note(reinterpret_cast<uint64_t>(host), size);
  return host;
}

bool Cpu::fill_tlb(uint64_t linear, bool write) noexcept {
  if (alignment_checks || watchpoints) return false;
  if (mode_ == Mode::bits64 && !canonical(linear)) return false;
  uint64_t gpa = 0;
  bool failed = false;
  const bool filled = resolve(linear, write ? Access::write : Access::read, view(), gpa, failed) != nullptr;
  if (failed) {
    pending.valid = false;
    run_alone = false;
  }
  const TlbEntry& entry = tlb->at(linear);
  return filled && (write ? entry.write : entry.read) == (linear & ~page_mask);
}

bool Cpu::in_global_page(uint64_t linear) const noexcept {
  const unsigned i = TlbSet::index(linear);
  const TlbSet& set = tlb_sets[cpl_ == 3 ? 0 : view()];
  return set.page[i] == (linear & ~page_mask) && (set.global[i / 64] >> i % 64 & 1) != 0;
}

bool Cpu::read_physical(uint64_t gpa, void* out, unsigned size) noexcept {
  return memory->read(gpa, out, size);
}

bool Cpu::write_physical(uint64_t gpa, const void* data, unsigned size) noexcept {
  return memory->write(gpa, data, size);
}

}  // namespace lodge::kvm::soft
