#include "kvm/soft/irqchip/pic.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace lodge::kvm::soft {
namespace {

using testing::ElementsAre;

struct Listener final : Pic::Client {
  void pic_output() noexcept override { ++raised; }
  void pic_acked(unsigned irq) noexcept override { acked.push_back(irq); }
  int raised = 0;
  std::vector<unsigned> acked;
};

// Initialized as a PC's firmware does: vectors 0x08 and 0x70, everything unmasked.
class PicTest : public testing::Test {
 protected:
  PicTest() { initialize(0x01); }
  void initialize(uint8_t icw4) {
    for (const uint16_t base : {0x20, 0xa0}) {
      pic.write(base, 0x11);
      pic.write(base + 1, base == 0x20 ? 0x08 : 0x70);
      pic.write(base + 1, base == 0x20 ? 0x04 : 0x02);
      pic.write(base + 1, icw4);
    }
  }
  int raise(unsigned irq) { return pic.set_irq(irq, 0, true); }
  void lower(unsigned irq) { pic.set_irq(irq, 0, false); }
  void pulse(unsigned irq) {
    raise(irq);
    lower(irq);
  }
  uint8_t isr(uint16_t base) {
    pic.write(base, 0x0b);
    return pic.read(base);
  }
  uint8_t irr(uint16_t base) {
    pic.write(base, 0x0a);
    return pic.read(base);
  }

  Listener listener;
  Pic pic{listener};
};

TEST_F(PicTest, AnEdgeRaisesIntrAndIntaGivesTheVector) {
  EXPECT_FALSE(pic.output());
  EXPECT_EQ(pic.peek(), -1);
  EXPECT_EQ(raise(1), 1);
  EXPECT_TRUE(pic.output());
  EXPECT_GT(listener.raised, 0);
  EXPECT_EQ(irr(0x20), 0x02);
  EXPECT_EQ(pic.peek(), 0x09);
  EXPECT_EQ(pic.acknowledge(), 0x09);
  EXPECT_FALSE(pic.output());
  EXPECT_EQ(irr(0x20), 0);
  EXPECT_EQ(isr(0x20), 0x02);
}

TEST_F(PicTest, AnEdgeNeedsTheLineToFallFirst) {
  EXPECT_EQ(raise(1), 1);
  pic.acknowledge();
  pic.write(0x20, 0x20);
  EXPECT_EQ(raise(1), 1);  // still high: no new edge
  EXPECT_FALSE(pic.output());
  lower(1);
  raise(1);
  EXPECT_TRUE(pic.output());
  lower(1);
  EXPECT_EQ(raise(1), 0);  // coalesced: the last one is pending
}

TEST_F(PicTest, SlaveInterruptsComeThroughTheCascade) {
  raise(8);
  EXPECT_EQ(irr(0x20), 0x04);
  EXPECT_EQ(pic.acknowledge(), 0x70);
  EXPECT_EQ(isr(0x20), 0x04);
  EXPECT_EQ(isr(0xa0), 0x01);
  pic.write(0xa0, 0x20);
  pic.write(0x20, 0x20);
  EXPECT_EQ(isr(0x20) | isr(0xa0), 0);
  EXPECT_THAT(listener.acked, ElementsAre(8, 2));
}

TEST_F(PicTest, PrioritiesNestByInputNumber) {
  raise(5);
  EXPECT_EQ(pic.acknowledge(), 0x0d);
  raise(6);
  EXPECT_FALSE(pic.output());
  raise(3);
  EXPECT_EQ(pic.acknowledge(), 0x0b);
  raise(9);  // the cascade is input 2
  EXPECT_EQ(pic.acknowledge(), 0x71);
  pic.write(0xa0, 0x20);
  pic.write(0x20, 0x20);  // of the cascade
  pic.write(0x20, 0x20);  // of 3
  EXPECT_FALSE(pic.output());
  pic.write(0x20, 0x20);  // of 5
  EXPECT_EQ(pic.acknowledge(), 0x0e);
}

TEST_F(PicTest, MaskedInputsWaitInIrr) {
  pic.write(0x21, 0x02);
  EXPECT_EQ(pic.read(0x21), 0x02);
  EXPECT_EQ(raise(1), -1);
  EXPECT_FALSE(pic.output());
  pic.write(0x21, 0x00);
  EXPECT_EQ(pic.acknowledge(), 0x09);
}

TEST_F(PicTest, SpecificEoiClearsTheNamedInputOnly) {
  raise(5);
  pic.acknowledge();
  raise(3);
  pic.acknowledge();
  pic.write(0x20, 0x65);
  EXPECT_EQ(isr(0x20), 0x08);
  EXPECT_THAT(listener.acked, ElementsAre(5));
}

TEST_F(PicTest, RotationGivesTheServedInputTheLowestPriority) {
  raise(3);
  raise(4);
  EXPECT_EQ(pic.acknowledge(), 0x0b);
  pic.write(0x20, 0xa0);  // rotate on non-specific EOI: 4 is the highest now
  lower(3);
  raise(3);
  EXPECT_EQ(pic.acknowledge(), 0x0c);
  pic.write(0x20, 0x20);
  EXPECT_EQ(pic.acknowledge(), 0x0b);
  pic.write(0x20, 0x20);
  pic.write(0x20, 0xc5);  // set priority: 5 the lowest, 6 the highest
  raise(6);
  pulse(0);
  EXPECT_EQ(pic.acknowledge(), 0x0e);
  pic.write(0x20, 0xe6);  // rotate on specific EOI
  EXPECT_EQ(isr(0x20), 0);
  raise(7);
  EXPECT_EQ(pic.acknowledge(), 0x0f);
}

TEST_F(PicTest, AutoEoiLeavesNothingInServiceAndMayRotate) {
  initialize(0x03);
  pulse(3);
  EXPECT_EQ(pic.acknowledge(), 0x0b);
  EXPECT_EQ(isr(0x20), 0);
  EXPECT_THAT(listener.acked, testing::Contains(3u));
  pic.write(0x20, 0x80);  // rotate in automatic EOI mode
  pulse(3);
  pic.acknowledge();
  pulse(3);
  pulse(4);
  EXPECT_EQ(pic.acknowledge(), 0x0c);
  pic.write(0x20, 0x00);
  pulse(5);
  EXPECT_EQ(pic.acknowledge(), 0x0d);
}

TEST_F(PicTest, SpecialMaskModeLetsLowerInputsThroughAMaskedOne) {
  raise(3);
  pic.acknowledge();
  raise(6);
  pic.write(0x21, 0x08);
  EXPECT_FALSE(pic.output());
  pic.write(0x20, 0x68);  // set special mask
  EXPECT_EQ(pic.acknowledge(), 0x0e);
  pic.write(0x20, 0x66);
  raise(7);
  pic.write(0x20, 0x48);  // reset special mask
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, SpecialFullyNestedModeLetsTheSlaveInterruptItself) {
  raise(12);
  EXPECT_EQ(pic.acknowledge(), 0x74);
  raise(9);
  EXPECT_FALSE(pic.output());
  pic.write(0xa0, 0x20);
  pic.write(0x20, 0x20);
  pic.acknowledge();
  initialize(0x11);
  lower(12);
  lower(9);
  raise(12);
  EXPECT_EQ(pic.acknowledge(), 0x74);
  raise(9);
  EXPECT_EQ(pic.acknowledge(), 0x71);
}

TEST_F(PicTest, PollIsAnIntaCycleByRegister) {
  raise(5);
  pic.write(0x20, 0x0c);
  EXPECT_EQ(pic.read(0x20), 0x85);
  EXPECT_EQ(isr(0x20), 0x20);
  EXPECT_FALSE(pic.output());
  pic.write(0x20, 0x0c);
  EXPECT_EQ(pic.read(0x20), 0);  // nothing more
}

TEST_F(PicTest, LevelInputsFollowTheLine) {
  pic.write(0x4d1, 0xff);
  EXPECT_EQ(pic.read(0x4d1), 0xde);  // not the RTC and the FPU
  pic.write(0x4d0, 0xff);
  EXPECT_EQ(pic.read(0x4d0), 0xf8);
  raise(10);
  EXPECT_EQ(pic.acknowledge(), 0x72);
  pic.write(0xa0, 0x20);
  pic.write(0x20, 0x20);
  EXPECT_EQ(pic.acknowledge(), 0x72);  // still high
  lower(10);
  pic.write(0xa0, 0x20);
  pic.write(0x20, 0x20);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, ALevelIsTheOrOfItsSources) {
  pic.write(0x4d0, 0x20);
  pic.set_irq(5, 0, true);
  pic.set_irq(5, 1, true);
  pic.set_irq(5, 0, false);
  EXPECT_TRUE(pic.output());
  pic.set_irq(5, 1, false);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, ARequestThatHasGoneGivesTheSpuriousVector) {
  pic.write(0x4d0, 0x20);
  raise(5);
  lower(5);
  EXPECT_EQ(pic.acknowledge(), 0x0f);
  EXPECT_EQ(isr(0x20), 0);
}

TEST_F(PicTest, ASlaveRequestThatHasGoneGivesItsSpuriousVector) {
  raise(10);
  pic.write(0xa1, 0x04);  // masked between INTR and INTA
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(pic.acknowledge(), 0x77);
  EXPECT_EQ(isr(0xa0), 0);
  EXPECT_EQ(isr(0x20), 0x04);  // the master has been interrupted
}

TEST_F(PicTest, Icw1ForgetsRequestsAndReportsThemAsCompleted) {
  raise(0);
  pic.write(0x21, 0xff);
  pic.write(0x20, 0x11);
  EXPECT_THAT(listener.acked, ElementsAre(0));
  EXPECT_EQ(pic.read(0x21), 0);  // the mask is cleared
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, SingleByteInitializationSkipsIcw4) {
  pic.write(0x20, 0x10);
  pic.write(0x21, 0x40);
  pic.write(0x21, 0x04);
  pic.write(0x21, 0xfd);  // OCW1 already
  EXPECT_EQ(pic.read(0x21), 0xfd);
  raise(1);
  EXPECT_EQ(pic.acknowledge(), 0x41);
}

TEST_F(PicTest, TheCascadeInputCannotBeDriven) {
  EXPECT_EQ(raise(2), -1);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, StateRoundTrips) {
  pic.write(0x4d0, 0x20);
  pic.write(0x21, 0x10);
  raise(5);
  raise(9);
  pic.acknowledge();
  raise(4);
  pic.write(0x20, 0xc3);
  pic.write(0xa0, 0x11);  // in the middle of initialization
  Listener other;
  Pic copy(other);
  for (unsigned chip : {0u, 1u}) copy.set_state(chip, pic.state(chip));
  for (unsigned chip : {0u, 1u}) {
    const kvm_pic_state a = pic.state(chip), b = copy.state(chip);
    EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0) << chip;
  }
  EXPECT_EQ(copy.output(), pic.output());
  copy.write(0xa1, 0x58);
  EXPECT_EQ(copy.state(1).irq_base, 0x58);
}

TEST_F(PicTest, HostileStateIsBroughtIntoRange) {
  kvm_pic_state state;
  std::memset(&state, 0xff, sizeof state);
  pic.set_state(0, state);
  pic.set_state(1, state);
  for (int i = 0; i < 20; ++i) pic.acknowledge();
  EXPECT_EQ(pic.state(1).elcr, 0xde);
}

}  // namespace
}  // namespace lodge::kvm::soft
