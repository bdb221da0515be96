#include "kvm/soft/irqchip/ioapic.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace lodge::kvm::soft {
namespace {

using testing::ElementsAre;

struct Bus final : Ioapic::Client {
  int deliver(const ApicMessage& message) noexcept override {
    sent.push_back(message);
    return answer;
  }
  void ioapic_acked(unsigned pin) noexcept override {
    acked.push_back(pin);
    if (lower_on_ack != nullptr) lower_on_ack->set_irq(pin, 0, false);
  }
  std::vector<ApicMessage> sent;
  std::vector<unsigned> acked;
  int answer = 1;
  Ioapic* lower_on_ack = nullptr;
};

constexpr uint32_t level = 0x8000;
constexpr uint32_t masked = 0x10000;

class IoapicTest : public testing::Test {
 protected:
  void write(uint8_t reg, uint32_t value) {
    const uint32_t select = reg;
    ioapic.write(0x00, &select, 4);
    ioapic.write(0x10, &value, 4);
  }
  uint32_t read(uint8_t reg) {
    const uint32_t select = reg;
    ioapic.write(0x00, &select, 4);
    uint32_t value = 0;
    ioapic.read(0x10, &value, 4);
    return value;
  }
  void entry(unsigned pin, uint32_t low, uint8_t destination = 0) {
    write(static_cast<uint8_t>(0x11 + pin * 2), static_cast<uint32_t>(destination) << 24);
    write(static_cast<uint8_t>(0x10 + pin * 2), low);
  }
  bool remote_irr(unsigned pin) { return (read(static_cast<uint8_t>(0x10 + pin * 2)) & 0x4000) != 0; }

  Bus bus;
  Ioapic ioapic{bus};
};

TEST_F(IoapicTest, HasTheRegistersOfVersion11With24MaskedEntries) {
  EXPECT_EQ(read(1), 0x00170011u);
  EXPECT_EQ(read(0x10), masked);
  EXPECT_EQ(read(0x3e), masked);
  EXPECT_EQ(read(0x40), 0xffffffffu);
  write(0, 0x0f000000);
  EXPECT_EQ(read(0), 0x0f000000u);
  EXPECT_EQ(read(2), 0x0f000000u);
  uint8_t select = 0;
  ioapic.read(0x00, &select, 1);
  EXPECT_EQ(select, 2);
}

TEST_F(IoapicTest, AnEdgeIsSentOnceForEachRise) {
  entry(4, 0x0931, 0x21);  // lowest priority, logical: bits 8 and 11
  EXPECT_EQ(ioapic.set_irq(4, 0, true), 1);
  EXPECT_EQ(ioapic.set_irq(4, 0, true), 0);
  ASSERT_EQ(bus.sent.size(), 1u);
  EXPECT_EQ(bus.sent[0].vector, 0x31);
  EXPECT_EQ(bus.sent[0].mode, DeliveryMode::lowest_priority);
  EXPECT_TRUE(bus.sent[0].logical);
  EXPECT_FALSE(bus.sent[0].level);
  EXPECT_EQ(bus.sent[0].destination, 0x21u);
  ioapic.set_irq(4, 0, false);
  ioapic.set_irq(4, 0, true);
  EXPECT_EQ(bus.sent.size(), 2u);
}

TEST_F(IoapicTest, EdgesOfAMaskedInputAreLost) {
  entry(4, 0x31 | masked);
  EXPECT_EQ(ioapic.set_irq(4, 0, true), -1);
  entry(4, 0x31);
  EXPECT_TRUE(bus.sent.empty());
}

TEST_F(IoapicTest, ALevelIsSentOnceUntilItsEoiAndAgainWhileHigh) {
  entry(10, 0x41 | level);
  EXPECT_EQ(ioapic.set_irq(10, 0, true), 1);
  EXPECT_TRUE(remote_irr(10));
  EXPECT_EQ(ioapic.set_irq(10, 0, true), -1);
  EXPECT_EQ(bus.sent.size(), 1u);
  ioapic.end_of_interrupt(0x41, true);
  EXPECT_EQ(bus.sent.size(), 2u);
  EXPECT_THAT(bus.acked, ElementsAre(10));
  ioapic.set_irq(10, 0, false);
  ioapic.end_of_interrupt(0x41, true);
  EXPECT_FALSE(remote_irr(10));
  EXPECT_EQ(bus.sent.size(), 2u);
}

TEST_F(IoapicTest, ALevelHeldWhileMaskedIsSentWhenUnmasked) {
  entry(10, 0x41 | level | masked);
  EXPECT_EQ(ioapic.set_irq(10, 0, true), -1);
  entry(10, 0x41 | level);
  EXPECT_EQ(bus.sent.size(), 1u);
  entry(11, 0x42 | level | masked);
  ioapic.set_irq(11, 0, true);
  ioapic.set_irq(11, 0, false);
  entry(11, 0x42 | level);
  EXPECT_EQ(bus.sent.size(), 1u);
}

TEST_F(IoapicTest, AListenerThatLowersTheLineOnAckPreventsASecondInterrupt) {
  entry(10, 0x41 | level);
  bus.lower_on_ack = &ioapic;
  ioapic.set_irq(10, 0, true);
  ioapic.end_of_interrupt(0x41, true);
  EXPECT_EQ(bus.sent.size(), 1u);
}

TEST_F(IoapicTest, AnEoiOfAnotherVectorChangesNothing) {
  entry(10, 0x41 | level);
  ioapic.set_irq(10, 0, true);
  ioapic.end_of_interrupt(0x42, true);
  EXPECT_TRUE(remote_irr(10));
  EXPECT_TRUE(bus.acked.empty());
}

TEST_F(IoapicTest, ASuppressedEoiIsSeenByListenersOnly) {
  entry(10, 0x41 | level);
  ioapic.set_irq(10, 0, true);
  ioapic.end_of_interrupt(0x41, false);
  EXPECT_TRUE(remote_irr(10));
  EXPECT_THAT(bus.acked, ElementsAre(10));
}

TEST_F(IoapicTest, RemoteIrrIsReadOnlyAndClearedBySwitchingToEdge) {
  entry(10, 0x41 | level);
  ioapic.set_irq(10, 0, true);
  entry(10, 0x41 | level | masked);
  EXPECT_TRUE(remote_irr(10));
  entry(10, 0x41 | masked);
  EXPECT_FALSE(remote_irr(10));
  entry(10, 0x41 | 0x5000 | masked);  // remote IRR and delivery status
  EXPECT_EQ(read(0x10 + 20), 0x41u | masked);
}

TEST_F(IoapicTest, ALevelThatNobodyTakesWaitsWithoutRemoteIrr) {
  bus.answer = 0;
  entry(10, 0x41 | level);
  EXPECT_EQ(ioapic.set_irq(10, 0, true), 0);
  EXPECT_FALSE(remote_irr(10));
  bus.answer = 1;
  EXPECT_EQ(ioapic.set_irq(10, 0, true), 1);
}

TEST_F(IoapicTest, PolarityHasNoEffect) {
  entry(10, 0x41 | 0x2000);
  ioapic.set_irq(10, 0, true);
  EXPECT_EQ(bus.sent.size(), 1u);
}

TEST_F(IoapicTest, SourcesShareALine) {
  entry(10, 0x41 | level);
  ioapic.set_irq(10, 0, true);
  ioapic.set_irq(10, 1, true);
  ioapic.set_irq(10, 0, false);
  ioapic.end_of_interrupt(0x41, true);
  EXPECT_EQ(bus.sent.size(), 2u);
  ioapic.set_irq(10, 1, false);
  ioapic.end_of_interrupt(0x41, true);
  EXPECT_EQ(bus.sent.size(), 2u);
}

TEST_F(IoapicTest, OddAccessesStayWithinTheRegister) {
  uint8_t bytes[8];
  std::memset(bytes, 0xee, sizeof bytes);
  const uint32_t select = 1;
  ioapic.write(0x00, &select, 4);
  ioapic.read(0x12, bytes, 8);
  EXPECT_EQ(bytes[0], 0x17);
  EXPECT_EQ(bytes[2], 0);
  const uint8_t odd = 5;
  ioapic.write(0x01, &odd, 1);
  ioapic.write(0x00, &odd, 0);
  uint8_t now = 0;
  ioapic.read(0x00, &now, 1);
  EXPECT_EQ(now, 1);
}

TEST_F(IoapicTest, PinsBeyondTheLastAreRefused) {
  EXPECT_EQ(ioapic.set_irq(24, 0, true), -1);
}

TEST_F(IoapicTest, StateRoundTripsAndDeliversWhatIsDue) {
  entry(4, 0x31, 1);
  entry(10, 0x41 | level);
  entry(11, 0x42 | level | masked);
  ioapic.set_irq(4, 0, true);
  ioapic.set_irq(10, 0, true);
  ioapic.set_irq(11, 0, true);
  const kvm_ioapic_state saved = ioapic.state();
  EXPECT_EQ(saved.irr, 1u << 10 | 1u << 11);
  EXPECT_EQ(saved.redirtbl[10].fields.remote_irr, 1);
  Bus other;
  Ioapic copy(other);
  copy.set_state(saved);
  const kvm_ioapic_state again = copy.state();
  EXPECT_EQ(std::memcmp(&saved, &again, sizeof saved), 0);
  EXPECT_TRUE(other.sent.empty());  // pin 10 waits for its EOI, 11 is masked
  copy.end_of_interrupt(0x41, true);
  EXPECT_EQ(other.sent.size(), 1u);
}

}  // namespace
}  // namespace lodge::kvm::soft
