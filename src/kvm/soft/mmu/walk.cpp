// Guest page tables: 32-bit, PAE, 4- and 5-level paging (SDM volume 3 chapter 4), with the rights of a
// privilege view.
#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/mmu/host_access.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft {
namespace {

// Bits of paging-structure entries.
constexpr uint64_t present = 1, writable = 2, user = 4, accessed = 0x20, dirty = 0x40, large = 0x80,
                   global = 0x100, no_execute = uint64_t{1} << 63;
// Bits of the #PF error code.
constexpr uint32_t pf_present = 1, pf_write = 2, pf_user = 4, pf_reserved = 8, pf_fetch = 0x10, pf_key = 0x20;

constexpr uint64_t bits(unsigned from, unsigned to) {
  return (~uint64_t{0} >> (63 - to)) & (~uint64_t{0} << from);
}

}  // namespace

struct Cpu::Leaf {
  uint64_t rights;  // writable and user: and-ed over the levels; no_execute: or-ed
  uint64_t entry;   // the last level's
  uint64_t address;
  uint64_t gpa;
  unsigned size;  // of the entry: 4 or 8 bytes
};

bool Cpu::page_fault(uint64_t linear, Access access, unsigned view, uint32_t flags) noexcept {
  if (access == Access::write) flags |= pf_write;
  if (view == 0) flags |= pf_user;
  const bool nx = (efer & efer::nxe) != 0 && (cr4 & cr4::pae) != 0;
  if (access == Access::fetch && (nx || (cr4 & cr4::smep) != 0)) flags |= pf_fetch;
  return raise_page_fault(linear, flags);
}

bool Cpu::read_entry(uint64_t gpa, unsigned size, uint64_t& entry) noexcept {
  const Slot* slot = memory->find(gpa);
  entry = 0;
  if (slot == nullptr) return false;
  const auto host = reinterpret_cast<uint64_t>(slot->host) + (gpa - slot->gpa);
  entry = size == 8 ? host_load<uint64_t>(host) : host_load<uint32_t>(host);
  return true;
}

bool Cpu::update_entry(uint64_t gpa, unsigned size, uint64_t old_entry, uint64_t set) noexcept {
  Slot* slot = memory->find(gpa);
  if (slot == nullptr || slot->read_only) return true;  // ROM keeps its bits
  const auto host = reinterpret_cast<uint64_t>(slot->host) + (gpa - slot->gpa);
  const bool done = size == 8 ? host_compare_exchange<uint64_t>(host, old_entry, old_entry | set)
                              : host_compare_exchange<uint32_t>(host, static_cast<uint32_t>(old_entry),
                                                                static_cast<uint32_t>(old_entry | set));
  if (slot->log_dirty) slot->mark_dirty(slot->page(gpa));
  slot->invalidate(slot->page(gpa));
  return done;
}

bool Cpu::check_leaf(uint64_t linear, Access access, unsigned view, const Leaf& leaf) noexcept {
  const bool user_page = (leaf.rights & user) != 0;
  const bool may_write = (leaf.rights & writable) != 0;
  if (view == 0 && !user_page) return page_fault(linear, access, view, pf_present);
  if (access == Access::fetch) {
    const bool smep_violation = view != 0 && user_page && (cr4 & cr4::smep) != 0;
    if (smep_violation || ((leaf.rights & no_execute) != 0 && (efer & efer::nxe) != 0))
      return page_fault(linear, access, view, pf_present);
    return true;
  }
  if (view == 1 && user_page) return page_fault(linear, access, view, pf_present);
  if (access == Access::write && !may_write && (view == 0 || (cr0 & cr0::wp) != 0))
    return page_fault(linear, access, view, pf_present);
  if (user_page && long_mode() && (cr4 & cr4::pke) != 0) {
    const unsigned key = leaf.entry >> 59 & 15;
    const unsigned denied = vector.pkru >> 2 * key & 3;
    const bool write_denied =
        (denied & 2) != 0 && access == Access::write && (view == 0 || (cr0 & cr0::wp) != 0);
    if ((denied & 1) != 0 || write_denied) return page_fault(linear, access, view, pf_present | pf_key);
  }
  return true;
}

// PAE (3 levels, entered at 2 with the PDPTEs in registers), 4 and 5 levels.
bool Cpu::walk_long(uint64_t linear, Access access, unsigned view, Translation& out) noexcept {
  const bool pae32 = !long_mode();
  const unsigned levels = pae32 ? 2 : (cr4 & cr4::la57) != 0 ? 5 : 4;
  const uint64_t address_bits = bits(12, features.physical_bits - 1);
  uint64_t reserved = features.physical_bits < 52 ? bits(features.physical_bits, 51) : 0;
  if ((efer & efer::nxe) == 0) reserved |= no_execute;
  if (pae32) reserved |= bits(52, 62);

  for (;;) {
    Leaf leaf{.rights = writable | user, .entry = 0, .address = 0, .gpa = 0, .size = 8};
    uint64_t table = cr3 & address_bits;
    if (pae32) {
      const uint64_t pdpte = pdptr[linear >> 30 & 3];
      if ((pdpte & present) == 0) return page_fault(linear, access, view, 0);
      table = pdpte & address_bits;
    }
    bool again = false;
    for (unsigned level = levels;; --level) {
      const unsigned shift = 12 + 9 * (level - 1);
      leaf.address = table + (linear >> shift & 511) * 8;
      read_entry(leaf.address, 8, leaf.entry);
      const uint64_t entry = leaf.entry;
      if ((entry & present) == 0) return page_fault(linear, access, view, 0);
      const bool may_be_large = level == 2 || (level == 3 && (features.ext1_edx & 1u << 26) != 0);
      const bool last = level == 1 || ((entry & large) != 0 && may_be_large);
      uint64_t bad = reserved;
      if (level > 1 && (entry & large) != 0) bad |= last ? bits(13, shift - 1) : large;
      if ((entry & bad) != 0) return page_fault(linear, access, view, pf_present | pf_reserved);
      leaf.rights = (leaf.rights & (entry | no_execute)) | (entry & no_execute);
      if (last) {
        const uint64_t offset = (uint64_t{1} << shift) - 1;
        leaf.gpa = (entry & address_bits & ~offset) | (linear & offset & ~page_mask);
        out.large = level > 1;
        break;
      }
      if ((entry & accessed) == 0 && !update_entry(leaf.address, 8, entry, accessed)) {
        again = true;
        break;
      }
      table = entry & address_bits;
    }
    if (again) continue;
    if (!check_leaf(linear, access, view, leaf)) return false;
    const uint64_t wanted = accessed | (access == Access::write ? dirty : 0);
    if ((leaf.entry & wanted) != wanted && !update_entry(leaf.address, 8, leaf.entry, wanted)) continue;
    const bool writable_now = (leaf.rights & writable) != 0 || (view != 0 && (cr0 & cr0::wp) == 0);
    out.gpa = leaf.gpa;
    out.writable = writable_now && ((leaf.entry | wanted) & dirty) != 0 && (cr4 & cr4::pke) == 0;
    out.executable = access == Access::fetch;
    out.global = (leaf.entry & global) != 0 && (cr4 & cr4::pge) != 0;
    return true;
  }
}

// 32-bit paging, with 4 MiB pages (PSE, PSE-36).
bool Cpu::walk_legacy(uint64_t linear, Access access, unsigned view, Translation& out) noexcept {
  for (;;) {
    Leaf leaf{.rights = writable | user, .entry = 0, .address = 0, .gpa = 0, .size = 4};
    const uint64_t directory = (cr3 & 0xfffff000) + (linear >> 22 & 1023) * 4;
    uint64_t entry = 0;
    read_entry(directory, 4, entry);
    if ((entry & present) == 0) return page_fault(linear, access, view, 0);
    leaf.rights &= entry;
    if ((entry & large) != 0 && (cr4 & cr4::pse) != 0) {
      const unsigned extra = features.physical_bits < 40 ? features.physical_bits - 32 : 8;
      const uint64_t bad = bits(13 + extra, 21);
      if ((entry & bad) != 0) return page_fault(linear, access, view, pf_present | pf_reserved);
      leaf.entry = entry;
      leaf.address = directory;
      out.large = true;
      leaf.gpa = (entry & 0xffc00000) | (entry >> 13 & ((1u << extra) - 1)) << 32 | (linear & 0x3ff000);
    } else {
      if ((entry & accessed) == 0 && !update_entry(directory, 4, entry, accessed)) continue;
      leaf.address = (entry & 0xfffff000) + (linear >> 12 & 1023) * 4;
      read_entry(leaf.address, 4, leaf.entry);
      if ((leaf.entry & present) == 0) return page_fault(linear, access, view, 0);
      leaf.rights &= leaf.entry;
      leaf.gpa = leaf.entry & 0xfffff000;
      out.large = false;
    }
    if (!check_leaf(linear, access, view, leaf)) return false;
    const uint64_t wanted = accessed | (access == Access::write ? dirty : 0);
    if ((leaf.entry & wanted) != wanted && !update_entry(leaf.address, 4, leaf.entry, wanted)) continue;
    const bool writable_now = (leaf.rights & writable) != 0 || (view != 0 && (cr0 & cr0::wp) == 0);
    out.gpa = leaf.gpa;
    out.writable = writable_now && ((leaf.entry | wanted) & dirty) != 0;
    out.executable = access == Access::fetch;
    out.global = (leaf.entry & global) != 0 && (cr4 & cr4::pge) != 0;
    return true;
  }
}

bool Cpu::translate(uint64_t linear, Access access, unsigned view, Translation& out) noexcept {
  if ((cr0 & cr0::pg) == 0) {
    out = {.gpa = linear & ~page_mask, .writable = true, .executable = true, .global = false, .large = false};
    return true;
  }
  return (cr4 & cr4::pae) != 0 ? walk_long(linear, access, view, out)
                               : walk_legacy(linear, access, view, out);
}

bool Cpu::load_pdptrs(uint64_t new_cr3) noexcept {
  std::array<uint64_t, 4> loaded{};
  const uint64_t reserved = bits(features.physical_bits, 63) | 0x1e6;
  for (unsigned i = 0; i < 4; ++i) {
    read_entry((new_cr3 & 0xffffffe0) + 8 * i, 8, loaded[i]);
    if ((loaded[i] & present) != 0 && (loaded[i] & reserved) != 0) return raise(Exception::gp, 0);
  }
  pdptr = loaded;
  return true;
}

bool Cpu::translate_debug(uint64_t linear, uint64_t& gpa, bool& is_writable, bool& is_user) noexcept {
  gpa = linear;
  is_writable = is_user = true;
  if ((cr0 & cr0::pg) == 0) return true;
  const uint64_t address_bits = bits(12, features.physical_bits - 1);
  uint64_t entry = 0;
  const bool long_tables = (cr4 & cr4::pae) != 0;
  unsigned level = !long_tables ? 2 : !long_mode() ? 2 : (cr4 & cr4::la57) != 0 ? 5 : 4;
  uint64_t table = cr3 & (long_tables ? address_bits : 0xfffff000);
  if (long_tables && !long_mode()) {
    if ((pdptr[linear >> 30 & 3] & present) == 0) return false;
    table = pdptr[linear >> 30 & 3] & address_bits;
  }
  for (;; --level) {
    const unsigned index_bits = long_tables ? 9 : 10;
    const unsigned shift = 12 + index_bits * (level - 1);
    const unsigned size = long_tables ? 8 : 4;
    if (!read_entry(table + (linear >> shift & ((1u << index_bits) - 1)) * size, size, entry)) return false;
    if ((entry & present) == 0) return false;
    is_writable &= (entry & writable) != 0;
    is_user &= (entry & user) != 0;
    const bool large_ok = long_tables || (cr4 & cr4::pse) != 0;
    if (level == 1 || ((entry & large) != 0 && large_ok && level <= 3)) {
      gpa = (entry & address_bits & ~bits(0, shift - 1)) | (linear & bits(0, shift - 1));
      return true;
    }
    table = entry & address_bits;
  }
}

void Cpu::flush_tlb(bool keep_global) noexcept {
  const bool keep = keep_global && (cr4 & cr4::pge) != 0;
  for (TlbSet& set : tlb_sets) set.flush(keep);
  ++flushes;
  user_code_flushed = true;
  if (!keep || supervisor_code_is_local) supervisor_code_flushed = true;
}

void Cpu::flush_page(uint64_t linear) noexcept {
  bool was_large = false;
  for (TlbSet& set : tlb_sets) {
    set.clear(TlbSet::index(linear));
    // A large page is entered 4 KiB at a time, and INVLPG of any address in it drops it whole. Its size is
    // not kept: the biggest, 1 GiB, is assumed.
    for (unsigned word = 0; word < set.large.size(); ++word)
      for (uint64_t left = set.large[word]; left != 0; left &= left - 1) {
        const unsigned i = word * 64 + static_cast<unsigned>(__builtin_ctzll(left));
        if ((set.page[i] ^ linear) >> 30 == 0) {
          was_large = true;
          set.clear(i);
        }
      }
  }
  ++flushes;
  if (was_large || user_code_pages.contains(linear >> page_shift) ||
      supervisor_code_pages.contains(linear >> page_shift))
    user_code_flushed = supervisor_code_flushed = true;
}

}  // namespace lodge::kvm::soft
