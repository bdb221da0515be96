#include <gtest/gtest.h>

#include "kvm/soft/irqchip/irqchip.hpp"
#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/irqchip/test_support.hpp"

namespace lodge::kvm::soft {
namespace {

class LapicTimer : public testing::Test {
 protected:
  LapicTimer() {
    chip.create_full();
    lapic = &chip.add_vcpu(0, port);
    lapic->mmio_write(0xf0, 0x1ff);
    lapic->mmio_write(0x3e0, 0xb);  // divide by 1: a count is a nanosecond
  }
  void mode(uint32_t lvt) { lapic->mmio_write(0x320, lvt); }
  void start(uint32_t count) { lapic->mmio_write(0x380, count); }
  uint32_t count() { return lapic->mmio_read(0x390); }
  // Interrupts since the last call, each completed.
  int take() {
    int n = 0;
    for (; lapic->acknowledge() == 0x41; ++n) lapic->mmio_write(0xb0, 0);
    return n;
  }

  FakeClock clock;
  FakePort port{clock};
  Irqchip chip{clock};
  Lapic* lapic = nullptr;
};

TEST_F(LapicTimer, OneShotCountsDownFiresOnceAndStaysAtZero) {
  mode(0x41);
  start(1'000'000);
  EXPECT_EQ(count(), 1'000'000u);
  clock.advance(400'000);
  EXPECT_EQ(count(), 600'000u);
  clock.advance(599'999);
  EXPECT_EQ(take(), 0);
  clock.advance(1);
  EXPECT_EQ(take(), 1);
  EXPECT_EQ(count(), 0u);
  clock.advance(10'000'000);
  EXPECT_EQ(take(), 0);
}

TEST_F(LapicTimer, PeriodicKeepsItsPhase) {
  mode(0x20041);
  start(1'000'000);
  clock.advance(1'000'000);
  EXPECT_EQ(take(), 1);
  clock.advance(250'000);
  EXPECT_EQ(count(), 750'000u);
  clock.advance(750'000);
  EXPECT_EQ(take(), 1);
}

TEST_F(LapicTimer, DividerScalesTheCount) {
  for (const auto& [code, divider] :
       {std::pair{0u, 2u}, {1u, 4u}, {3u, 16u}, {8u, 32u}, {10u, 128u}, {11u, 1u}}) {
    lapic->mmio_write(0x3e0, code);
    mode(0x41);
    start(100'000);
    clock.advance(divider * 100'000 - 1);
    EXPECT_EQ(take(), 0) << divider;
    clock.advance(1);
    EXPECT_EQ(take(), 1) << divider;
  }
}

TEST_F(LapicTimer, ZeroInitialCountStops) {
  mode(0x20041);
  start(1'000'000);
  start(0);
  clock.advance(5'000'000);
  EXPECT_EQ(take(), 0);
}

TEST_F(LapicTimer, AMaskedTimerCountsSilently) {
  mode(0x10041);
  start(1'000'000);
  clock.advance(500'000);
  EXPECT_EQ(count(), 500'000u);
  clock.advance(500'000);
  mode(0x41);
  EXPECT_EQ(take(), 0);
}

TEST_F(LapicTimer, TinyPeriodsAreStretched) {
  mode(0x20041);
  start(1);
  int fired = 0;
  for (int i = 0; i < 100; ++i) {
    clock.advance(10'000);
    fired += take();
  }
  EXPECT_EQ(fired, 5);  // 1 ms of 200 us
}

TEST_F(LapicTimer, TscDeadlineFiresAtTheGuestsTime) {
  mode(0x40041);
  const uint64_t target = port.guest_tsc() + 2'000'000;  // 1 ms at 2 GHz
  lapic->set_tsc_deadline(target);
  EXPECT_EQ(lapic->tsc_deadline(), target);
  EXPECT_EQ(count(), 0u);
  clock.advance(999'999);
  EXPECT_EQ(take(), 0);
  clock.advance(1);
  EXPECT_EQ(take(), 1);
  EXPECT_EQ(lapic->tsc_deadline(), 0u);
}

TEST_F(LapicTimer, ATscDeadlineInThePastFiresAtOnceAndZeroDisarms) {
  mode(0x40041);
  clock.advance(1000);
  lapic->set_tsc_deadline(1);
  EXPECT_EQ(take(), 1);
  lapic->set_tsc_deadline(port.guest_tsc() + 1000);
  lapic->set_tsc_deadline(0);
  clock.advance(1'000'000);
  EXPECT_EQ(take(), 0);
}

TEST_F(LapicTimer, TheTscDeadlineMsrIsDeadInOtherModes) {
  mode(0x41);
  lapic->set_tsc_deadline(port.guest_tsc() + 1000);
  EXPECT_EQ(lapic->tsc_deadline(), 0u);
  clock.advance(1'000'000);
  EXPECT_EQ(take(), 0);
}

TEST_F(LapicTimer, ChangingToOrFromTscDeadlineModeDisarms) {
  mode(0x41);
  start(1'000'000);
  mode(0x40041);
  clock.advance(2'000'000);
  EXPECT_EQ(take(), 0);
  start(1'000'000);  // ignored in this mode
  clock.advance(2'000'000);
  EXPECT_EQ(take(), 0);
  lapic->set_tsc_deadline(port.guest_tsc() + 2'000'000);
  mode(0x41);
  clock.advance(2'000'000);
  EXPECT_EQ(take(), 0);
}

TEST_F(LapicTimer, ChangingTheTscMovesADeadline) {
  mode(0x40041);
  lapic->set_tsc_deadline(port.guest_tsc() + 2'000'000);
  port.tsc_offset += 1'000'000;
  lapic->tsc_changed();
  clock.advance(500'000);
  EXPECT_EQ(take(), 1);
}

TEST_F(LapicTimer, ChangingTheDividerKeepsTheCount) {
  mode(0x41);
  start(1'000'000);
  clock.advance(500'000);
  lapic->mmio_write(0x3e0, 0);  // by 2
  EXPECT_EQ(count(), 500'000u);
  clock.advance(999'999);
  EXPECT_EQ(take(), 0);
  clock.advance(1);
  EXPECT_EQ(take(), 1);
}

}  // namespace
}  // namespace lodge::kvm::soft
