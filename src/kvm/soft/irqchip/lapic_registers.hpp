// The LAPIC's register numbers (page offset >> 4, which is also the x2APIC MSR minus 0x800) and their bits.
// SDM vol. 3, tables 11-1 and 11-6. Shared by the two files that implement Lapic.
#pragma once

#include <cstdint>

namespace lodge::kvm::soft::apic {

enum Register : unsigned {
  reg_id = 0x02,
  reg_version = 0x03,
  reg_tpr = 0x08,
  reg_apr = 0x09,
  reg_ppr = 0x0a,
  reg_eoi = 0x0b,
  reg_ldr = 0x0d,
  reg_dfr = 0x0e,
  reg_svr = 0x0f,
  reg_isr = 0x10,
  reg_tmr = 0x18,
  reg_irr = 0x20,
  reg_esr = 0x28,
  reg_lvt_cmci = 0x2f,  // only where there are corrected machine-check interrupts
  reg_icr = 0x30,
  reg_icr_high = 0x31,
  reg_lvt_timer = 0x32,
  reg_lvt_thermal = 0x33,
  reg_lvt_performance = 0x34,
  reg_lvt_lint0 = 0x35,
  reg_lvt_lint1 = 0x36,
  reg_lvt_error = 0x37,
  reg_initial_count = 0x38,
  reg_current_count = 0x39,
  reg_divide = 0x3e,
  reg_self_ipi = 0x3f,
};

constexpr uint32_t lvt_masked = 1u << 16;
constexpr uint32_t lvt_vector = 0xff;
constexpr uint32_t lvt_mode = 7u << 8;
constexpr uint32_t lvt_pin = 0xa000;  // polarity (stored only) and trigger mode
constexpr uint32_t lvt_level = 1u << 15;
constexpr uint32_t lvt_timer_mode = 3u << 17;

constexpr uint32_t svr_enable = 1u << 8;
constexpr uint32_t svr_no_broadcast = 1u << 12;

constexpr uint32_t icr_busy = 1u << 12;  // delivery status
constexpr uint32_t icr_assert = 1u << 14;
constexpr uint32_t icr_level = 1u << 15;
constexpr uint32_t icr_logical = 1u << 11;

constexpr uint32_t esr_send_illegal = 1u << 5;
constexpr uint32_t esr_receive_illegal = 1u << 6;
constexpr uint32_t esr_illegal_register = 1u << 7;

enum TimerMode : unsigned { one_shot = 0, periodic = 1, tsc_deadline_mode = 2 };

// Which registers can be read.
constexpr bool reg_readable(unsigned reg, bool x2apic) noexcept {
  if (reg >= reg_isr && reg < reg_irr + 8) return true;
  if (reg >= reg_icr && reg <= reg_current_count) return reg != reg_icr_high || !x2apic;
  switch (reg) {
    case reg_id:
    case reg_version:
    case reg_tpr:
    case reg_ppr:
    case reg_ldr:
    case reg_svr:
    case reg_esr:
    case reg_divide: return true;
    case reg_apr:
    case reg_eoi:
    case reg_dfr: return !x2apic;
    default: return false;
  }
}

// Which bits of an LVT entry can be written.
constexpr uint32_t lvt_writable(unsigned reg) noexcept {
  switch (reg) {
    case reg_lvt_timer: return lvt_masked | lvt_vector | lvt_timer_mode;
    case reg_lvt_lint0:
    case reg_lvt_lint1: return lvt_masked | lvt_vector | lvt_mode | lvt_pin;
    case reg_lvt_error: return lvt_masked | lvt_vector;
    default: return lvt_masked | lvt_vector | lvt_mode;
  }
}

}  // namespace lodge::kvm::soft::apic
