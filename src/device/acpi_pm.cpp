// ACPI fixed hardware (ACPI specification 6.4, section 4.8 "ACPI Register Model"), placed as in the Intel
// ICH9 (data sheet 316972, section 13.8 "Power Management I/O Registers").
//
// Modelled: PM1 status, enable and control with SCI_EN, the 32-bit PM timer at 3.579545 MHz with its overflow
// event, the power button, 64 general-purpose events, soft off (S5), and the SMI command port's two values
// that hand the events over to the operating system and back. Not modelled: the processor block (C2 and C3 by
// port read), S1, S3 and S4: the DSDT does not declare them, so a write of their SLP_TYP does nothing; the
// RTC and sleep-button events; real SMIs: there is no firmware in SMM.
#include "device/acpi_pm.hpp"

#include <nlohmann/json.hpp>

namespace lodge::device {

namespace layout = machine::layout;

namespace {

constexpr uint64_t PM1_STS = 0, PM1_EN = 2, PM1_CNT = 4, PM_TMR = 8;
constexpr uint64_t GPE0_STS = layout::acpi_gpe0_offset, GPE0_EN = GPE0_STS + layout::acpi_gpe0_size / 2,
                   GPE0_END = GPE0_STS + layout::acpi_gpe0_size;

constexpr uint16_t TMR_STS = 1u << 0, PWRBTN_STS = 1u << 8, RTC_STS = 1u << 10;
constexpr uint16_t PM1_STS_MASK = 0xcf31;  // TMR, BM, GBL, PWRBTN, SLPBTN, RTC, PCIEXP_WAKE, WAK
constexpr uint16_t PM1_EN_MASK = 0x4721;   // TMR, GBL, PWRBTN, SLPBTN, RTC, PCIEXP_WAKE_DIS
constexpr uint16_t SCI_EN = 1u << 0, BM_RLD = 1u << 1, SLP_EN = 1u << 13, SLP_TYP = 7u << 10;

constexpr uint64_t timer_hz = 3'579'545, second = 1'000'000'000;
constexpr uint64_t half_period = uint64_t{1} << 31;  // the event is the toggling of bit 31

uint8_t part(uint64_t value, uint64_t byte) {
  return static_cast<uint8_t>(value >> (byte * 8));
}

template <class T>
void set_part(T& value, uint64_t byte, uint8_t data) {
  value = static_cast<T>((value & ~(T{0xff} << (byte * 8))) | T{data} << (byte * 8));
}

template <class T>
void clear_bits(T& value, uint64_t byte, uint8_t ones) {
  value = static_cast<T>(value & ~(T{ones} << (byte * 8)));
}

}  // namespace

AcpiPm::AcpiPm(Clock& clock, machine::Interrupt& sci, machine::Power& power)
    : clock_(clock),
      sci_(sci),
      power_(power),
      base_time_(clock.now()),
      timer_(clock.make_timer([this] { on_timer(); })) {}

uint64_t AcpiPm::ticks() const noexcept {
  uint64_t elapsed = clock_.now() - base_time_;
  // Seconds and their rest apart: the product of all nanoseconds would overflow after 86 minutes.
  return state_.timer_ticks + elapsed / second * timer_hz + elapsed % second * timer_hz / second;
}

// Notes timer overflows up to now, drives the SCI, and sleeps until the next overflow if anybody wants to
// know.
void AcpiPm::sync() noexcept {
  uint64_t now = ticks();
  if (now / half_period != seen_ticks_ / half_period) state_.pm1_status |= TMR_STS;
  seen_ticks_ = now;

  bool level = (state_.pm1_control & SCI_EN) &&
               ((state_.pm1_status & state_.pm1_enable) || (state_.gpe_status & state_.gpe_enable));
  if (level != level_) {
    level_ = level;
    sci_.set(level);
  }
  if ((state_.pm1_enable & TMR_STS) && !(state_.pm1_status & TMR_STS)) {
    uint64_t remaining = half_period - now % half_period;
    timer_->arm(clock_.now() + remaining * second / timer_hz + 1);  // at most 2^31 ticks: below 2^61
  } else {
    timer_->cancel();
  }
}

void AcpiPm::on_timer() noexcept {
  std::lock_guard lock(mutex_);
  sync();
}

bool AcpiPm::press_power_button() noexcept {
  std::lock_guard lock(mutex_);
  state_.pm1_status |= PWRBTN_STS;
  sync();
  return (state_.pm1_control & SCI_EN) && (state_.pm1_enable & PWRBTN_STS);
}

void AcpiPm::RtcInput::set(bool level) noexcept {
  std::lock_guard lock(pm_.mutex_);
  if (level && !level_) pm_.state_.pm1_status |= RTC_STS;
  level_ = level;
  pm_.sync();
}

void AcpiPm::raise_gpe(unsigned event) noexcept {
  if (event >= 64) return;
  std::lock_guard lock(mutex_);
  state_.gpe_status |= uint64_t{1} << event;
  sync();
}

void AcpiPm::reset() noexcept {
  std::lock_guard lock(mutex_);
  uint64_t now = ticks();
  state_ = {};
  state_.timer_ticks = now;  // the timer runs from the suspend well: a reset does not stop it
  base_time_ = clock_.now();
  sync();
}

// --- Registers
// -----------------------------------------------------------------------------------------------

uint8_t AcpiPm::register_byte(uint64_t offset, uint32_t timer) const noexcept {
  if (offset < PM1_EN) return part(state_.pm1_status, offset - PM1_STS);
  if (offset < PM1_CNT) return part(state_.pm1_enable, offset - PM1_EN);
  if (offset < PM1_CNT + 2) return part(state_.pm1_control, offset - PM1_CNT);
  if (offset >= PM_TMR && offset < PM_TMR + 4) return part(timer, offset - PM_TMR);
  if (offset >= GPE0_STS && offset < GPE0_EN) return part(state_.gpe_status, offset - GPE0_STS);
  if (offset >= GPE0_EN && offset < GPE0_END) return part(state_.gpe_enable, offset - GPE0_EN);
  return 0;
}

uint64_t AcpiPm::read(uint64_t offset, unsigned size) noexcept {
  std::lock_guard lock(mutex_);
  // The PM timer is a clock source that guests read all the time: no bookkeeping for it.
  if (offset == PM_TMR && size == 4) return static_cast<uint32_t>(ticks());
  sync();
  auto timer = static_cast<uint32_t>(seen_ticks_);  // one value for all bytes of an access
  uint64_t value = 0;
  for (unsigned i = 0; i < size; i++) value |= uint64_t{register_byte(offset + i, timer)} << (i * 8);
  return value;
}

void AcpiPm::set_control(uint16_t value) noexcept {
  state_.pm1_control = value & (SCI_EN | BM_RLD | SLP_TYP);  // GBL_RLS and SLP_EN read as zero
  if ((value & SLP_EN) && (value & SLP_TYP) >> 10 == layout::acpi_s5_type)
    power_.request(machine::PowerRequest::power_off);
}

void AcpiPm::set_register_byte(uint64_t offset, uint8_t value) noexcept {
  if (offset < PM1_EN) {
    clear_bits(state_.pm1_status, offset - PM1_STS, value);
  } else if (offset < PM1_CNT) {
    set_part(state_.pm1_enable, offset - PM1_EN, value);
    state_.pm1_enable &= PM1_EN_MASK;
  } else if (offset < PM1_CNT + 2) {
    uint16_t control = state_.pm1_control;
    set_part(control, offset - PM1_CNT, value);
    set_control(control);
  } else if (offset >= GPE0_STS && offset < GPE0_EN) {
    clear_bits(state_.gpe_status, offset - GPE0_STS, value);
  } else if (offset >= GPE0_EN && offset < GPE0_END) {
    set_part(state_.gpe_enable, offset - GPE0_EN, value);
  }
}

void AcpiPm::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  std::lock_guard lock(mutex_);
  sync();  // an overflow that has happened is not lost to the write that follows
  for (unsigned i = 0; i < size; i++) set_register_byte(offset + i, part(value, i));
  sync();
}

uint8_t AcpiPm::SmiWindow::read_byte(uint64_t offset) noexcept {
  std::lock_guard lock(pm_.mutex_);
  return offset == 0 ? 0 : pm_.state_.smi_data;
}

void AcpiPm::SmiWindow::write_byte(uint64_t offset, uint8_t value) noexcept {
  std::lock_guard lock(pm_.mutex_);
  if (offset != 0) {
    pm_.state_.smi_data = value;
  } else if (value == layout::acpi_enable_value) {
    pm_.state_.pm1_control |= SCI_EN;
  } else if (value == layout::acpi_disable_value) {
    pm_.state_.pm1_control &= static_cast<uint16_t>(~SCI_EN);
  }
  pm_.sync();
}

// --- Saved state
// ---------------------------------------------------------------------------------------------

void AcpiPm::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  AcpiPmState state = state_;
  state.timer_ticks = ticks();
  save_state(state, json);
}

void AcpiPm::load(const nlohmann::json& json) {
  auto state = load_state<AcpiPmState>(json);
  state.pm1_status &= PM1_STS_MASK;
  state.pm1_enable &= PM1_EN_MASK;
  state.pm1_control &= SCI_EN | BM_RLD | SLP_TYP;
  std::lock_guard lock(mutex_);
  state_ = state;
  base_time_ = clock_.now();
  seen_ticks_ = state.timer_ticks;
  level_ = false;
  sci_.set(false);
  sync();
}

}  // namespace lodge::device
