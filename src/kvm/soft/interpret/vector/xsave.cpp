// FXSAVE, FXRSTOR and the XSAVE family, by hand. Areas have the host's layout, which the guest's CPUID shows.
// No "modified" optimisation: XSAVEOPT and XSAVES store every component in use, which the architecture
// allows. SDM volume 1, sections 10.5 and 13.6 to 13.13.
#include <algorithm>

#include "kvm/soft/interpret/vector/access.hpp"
#include "kvm/soft/interpret/vector/exchange.hpp"
#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/interpret/vector/layout.hpp"
#include "kvm/soft/interpret/vector/run.hpp"
#include "kvm/soft/interpret/vector/x87.hpp"

namespace lodge::kvm::soft::simd {
namespace {

// Whole pages of an XSAVE area are probed at once; no host layout known comes near.
constexpr unsigned largest_area = 4096;

unsigned registers_of(const Cpu& cpu) {
  return cpu.mode() == Mode::bits64 ? 16 : 8;
}

Pointers pointers_of(const Cpu& cpu, const Op& op) {
  if (cpu.mode() != Mode::bits64) return Pointers::selectors;
  return op.dst != 0 ? Pointers::wide : Pointers::narrow;
}

bool fx_ready(Cpu& cpu) {
  return (cpu.cr0 & (cr0::em | cr0::ts)) == 0 || cpu.raise(Exception::nm);
}

// AMD's FFXSR: ring 0 in 64-bit mode leaves the XMM registers out.
bool skips_xmm(const Cpu& cpu) {
  return (cpu.efer & efer::ffxsr) != 0 && cpu.mode() == Mode::bits64 && cpu.cpl() == 0;
}

}  // namespace

Step run_fxsave(Cpu& cpu, const Op& op) noexcept {
  uint64_t linear = 0;
  if (!fx_ready(cpu) || !cpu.linear(op, 512, true, linear)) return Step::fault;
  if ((linear & 15) != 0) {
    cpu.raise(Exception::gp, 0);
    return Step::fault;
  }
  std::array<uint8_t, 416> region{};
  save_x87(cpu.vector, pointers_of(cpu, op), region.data());
  const std::array<uint32_t, 2> control = {mxcsr(cpu.vector), host().mxcsr_mask};
  std::memcpy(&region[image::mxcsr], control.data(), 8);
  // What is not stored stays as it is in memory: XMM8-15 outside 64-bit mode, all XMM with FFXSR.
  const unsigned registers = skips_xmm(cpu) ? 0 : registers_of(cpu);
  save_xmm(cpu.vector, registers, region.data());
  if (!cpu.probe_write(linear, 512) || !cpu.write_bytes(linear, region.data(), 160 + 16 * registers))
    return Step::fault;
  return Step::next;
}

Step run_fxrstor(Cpu& cpu, const Op& op) noexcept {
  uint64_t linear = 0;
  if (!fx_ready(cpu) || !cpu.linear(op, 512, false, linear)) return Step::fault;
  if ((linear & 15) != 0) {
    cpu.raise(Exception::gp, 0);
    return Step::fault;
  }
  std::array<uint8_t, 512> region;
  if (!cpu.read_bytes(linear, region.data(), 512)) return Step::fault;
  // Without CR4.OSFXSR the SSE part may be left alone: Intel and AMD restore it all the same.
  uint32_t new_mxcsr = 0;
  std::memcpy(&new_mxcsr, &region[image::mxcsr], 4);
  if ((new_mxcsr & ~host().mxcsr_mask) != 0) {
    cpu.raise(Exception::gp, 0);
    return Step::fault;
  }
  load_x87(cpu.vector, pointers_of(cpu, op), region.data());
  set_mxcsr(cpu.vector, new_mxcsr);
  if (!skips_xmm(cpu)) load_xmm(cpu.vector, registers_of(cpu), region.data());
  cpu.fp_control_changed();
  return Step::next;
}

namespace {

enum class Variant : uint8_t { plain, optimised, compacted, supervisor };

// The checks common to all, and the requested features. `linear` is aligned.
bool begin(Cpu& cpu, const Op& op, bool supervisor, bool write, uint64_t& linear, uint64_t& requested) {
  if ((cpu.cr4 & cr4::osxsave) == 0) return cpu.raise(Exception::ud);
  if ((cpu.cr0 & cr0::ts) != 0) return cpu.raise(Exception::nm);
  if (supervisor && cpu.cpl() != 0) return cpu.raise(Exception::gp, 0);
  const uint64_t mask = cpu.gpr[rdx] << 32 | (cpu.gpr[rax] & 0xffff'ffff);
  requested = mask & (cpu.xcr0 | (supervisor ? cpu.msr.xss : 0)) & host().components;
  // Only the legacy region and the header are certain to be touched.
  if (!cpu.linear(op, header_end, write, linear)) return false;
  return (linear & 63) == 0 || cpu.raise(Exception::gp, 0);
}

Step save(Cpu& cpu, const Op& op, Variant variant) {
  uint64_t linear = 0, requested = 0;
  if (!begin(cpu, op, variant == Variant::supervisor, true, linear, requested)) return Step::fault;
  const bool compact = variant == Variant::compacted || variant == Variant::supervisor;
  const unsigned size = area_size(requested, compact);
  if (size > largest_area || !cpu.linear(op, size, true, linear) || !cpu.probe_write(linear, size))
    return Step::fault;

  const VectorState& v = cpu.vector;
  uint64_t used = xinuse(v);
  if (compact && mxcsr(v) != 0x1f80) used |= 1u << component::sse;
  std::array<uint64_t, 2> header{};
  if (!compact && !cpu.read(linear + legacy_size, header[0])) return Step::fault;
  header[0] = (header[0] & ~requested) | (used & requested);
  header[1] = requested | compacted_bit;
  // XSAVE stores initial state, too; the others leave it out.
  const uint64_t stored = variant == Variant::plain ? requested : requested & used;
  const auto has = [&](unsigned i) { return (stored >> i & 1) != 0; };

  std::array<uint8_t, 1024> bytes{};
  const unsigned registers = registers_of(cpu);
  bool ok = true;
  if (has(component::x87)) {
    save_x87(v, pointers_of(cpu, op), bytes.data());
    ok = cpu.write_bytes(linear, bytes.data(), 24) && cpu.write_bytes(linear + 32, &bytes[32], 128);
  }
  // MXCSR goes with SSE, and in the standard format with AVX, also where registers are left out.
  const bool with_mxcsr = compact ? has(component::sse) : (requested & 6) != 0;
  const std::array<uint32_t, 2> control = {mxcsr(v), host().mxcsr_mask};
  if (with_mxcsr) ok = ok && cpu.write_bytes(linear + image::mxcsr, control.data(), 8);
  if (has(component::sse)) {
    save_xmm(v, registers, bytes.data());
    ok = ok && cpu.write_bytes(linear + 160, &bytes[160], 16 * registers);
  }
  for (unsigned i = 2; i < component::count && ok; ++i) {
    if (!has(i)) continue;
    const uint32_t part = i == component::avx                          ? 16 * registers
                          : i == component::zmm_hi256                  ? 32 * registers
                          : i == component::hi16_zmm && registers < 16 ? 0
                                                                       : host().size[i];
    save_component(v, i, registers, bytes.data());
    if (part != 0) ok = cpu.write_bytes(linear + offset_of(i, requested, compact), bytes.data(), part);
  }
  ok = ok && cpu.write_bytes(linear + legacy_size, header.data(), compact ? 16 : 8);
  return ok ? Step::next : Step::fault;
}

// The header's rules; false with #GP(0) raised.
bool valid_header(Cpu& cpu, const std::array<uint64_t, 8>& header, bool supervisor) {
  const uint64_t present = header[0], layout = header[1];
  const uint64_t enabled = cpu.xcr0 | (supervisor ? cpu.msr.xss : 0);
  bool good = false;
  if ((layout & compacted_bit) == 0) {
    good = !supervisor && layout == 0 && header[2] == 0 && (present & ~enabled) == 0;
  } else {
    good = (layout & ~compacted_bit & ~enabled) == 0 && (present & ~layout) == 0 &&
           std::all_of(header.begin() + 2, header.end(), [](uint64_t word) { return word == 0; });
  }
  return good || cpu.raise(Exception::gp, 0);
}

Step restore(Cpu& cpu, const Op& op, bool supervisor) {
  uint64_t linear = 0, requested = 0;
  if (!begin(cpu, op, supervisor, false, linear, requested)) return Step::fault;
  std::array<uint8_t, largest_area> area;
  if (!cpu.read_bytes(linear, area.data(), header_end)) return Step::fault;
  std::array<uint64_t, 8> header;
  std::memcpy(header.data(), &area[legacy_size], sizeof(header));
  if (!valid_header(cpu, header, supervisor)) return Step::fault;
  const bool compact = (header[1] & compacted_bit) != 0;
  const uint64_t layout = header[1] & ~compacted_bit, loaded = requested & header[0];

  // All memory is read before any register changes.
  const unsigned registers = registers_of(cpu);
  for (unsigned i = 2; i < component::count; ++i) {
    if ((loaded >> i & 1) == 0) continue;
    const uint32_t at = offset_of(i, layout, compact);
    uint64_t part = 0;
    if (at + host().size[i] > largest_area || !cpu.linear(op, at + host().size[i], false, part) ||
        !cpu.read_bytes(linear + at, &area[at], host().size[i]))
      return Step::fault;
  }
  uint32_t new_mxcsr = 0x1f80;
  // Standard format: MXCSR comes from memory whenever SSE or AVX is asked for, whatever XSTATE_BV says.
  const bool with_mxcsr = (requested & (compact ? 2 : 6)) != 0;
  if (!compact || (loaded & 2) != 0) std::memcpy(&new_mxcsr, &area[image::mxcsr], 4);
  if (with_mxcsr && (new_mxcsr & ~host().mxcsr_mask) != 0) {
    cpu.raise(Exception::gp, 0);
    return Step::fault;
  }
  VectorState& v = cpu.vector;
  if (with_mxcsr) set_mxcsr(v, new_mxcsr);
  for (unsigned i = 0; i < component::count; ++i) {
    if ((requested >> i & 1) == 0) continue;
    if ((loaded >> i & 1) == 0) {
      init_component(v, i, registers);
    } else if (i == component::x87) {
      load_x87(v, pointers_of(cpu, op), area.data());
    } else if (i == component::sse) {
      load_xmm(v, registers, area.data());
    } else {
      load_component(v, i, registers, &area[offset_of(i, layout, compact)]);
    }
  }
  cpu.fp_control_changed();
  return Step::next;
}

}  // namespace

Step run_xsave(Cpu& cpu, const Op& op) noexcept {
  return save(cpu, op, Variant::plain);
}
Step run_xsaveopt(Cpu& cpu, const Op& op) noexcept {
  return save(cpu, op, Variant::optimised);
}
Step run_xsavec(Cpu& cpu, const Op& op) noexcept {
  return save(cpu, op, Variant::compacted);
}
Step run_xsaves(Cpu& cpu, const Op& op) noexcept {
  return save(cpu, op, Variant::supervisor);
}
Step run_xrstor(Cpu& cpu, const Op& op) noexcept {
  return restore(cpu, op, false);
}
Step run_xrstors(Cpu& cpu, const Op& op) noexcept {
  return restore(cpu, op, true);
}

}  // namespace lodge::kvm::soft::simd
