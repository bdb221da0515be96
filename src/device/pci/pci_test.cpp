#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>

#include "base/error.hpp"
#include "device/pci/chipset.hpp"
#include "device/pci/root.hpp"
#include "device/reset.hpp"
#include "device/testing.hpp"
#include "machine/layout.hpp"

namespace lodge::device::pci {
namespace {

namespace layout = machine::layout;

// A card with one BAR of each kind and INTB.
class Card final : public Function {
 public:
  explicit Card(unsigned pin = 2) : Function("card", {0x1234, 0x5678, 9, 0xff0001, 0xaaaa, 0xbbbb}) {
    add_bar(0, BarKind::io, 0x20, io_);
    add_bar(1, BarKind::memory32, 0x1000, memory_);
    add_bar(2, BarKind::memory64_prefetchable, 0x10'0000'0000, wide_);
    use_interrupt_pin(pin);
    capability = config().add_capability(0x09, 10);
    config().allow(capability + 4, 4, 0xff);
    config().clear_by_ones(capability + 8, 1, 0x0f);
    config().set(capability + 8, 1, 0x0f);
  }
  unsigned capability = 0;
  std::vector<std::pair<unsigned, unsigned>> written;

 protected:
  void config_written(unsigned offset, unsigned size) noexcept override {
    written.emplace_back(offset, size);
  }

 private:
  class Constant final : public machine::RegisterWindow {
   public:
    explicit Constant(uint64_t value) : value_(value) {}
    uint64_t read(uint64_t, unsigned) noexcept override { return value_; }
    void write(uint64_t, unsigned, uint64_t) noexcept override {}

   private:
    uint64_t value_;
  };
  Constant io_{0x10}, memory_{0x20}, wide_{0x30};
};

class PciTest : public ::testing::Test {
 protected:
  PciTest() {
    ports.add(Root::ports_base, Root::ports_size, root.port_window(), "pci");
    memory.add(layout::ecam_base, layout::ecam_size, root.ecam_window(), "ecam");
    root.add(HostBridge::slot, 0, bridge);
    root.add(LpcBridge::slot, 0, lpc);
    root.add(3, 0, card);
  }
  uint32_t get(unsigned slot, unsigned reg, unsigned size = 4, unsigned function = 0) {
    ports.write(0xcf8, 4, 0x8000'0000u | slot << 11 | function << 8 | (reg & 0xfc));
    return static_cast<uint32_t>(ports.read(0xcfc + (reg & 3), size));
  }
  void put(unsigned slot, unsigned reg, uint32_t value, unsigned size = 4) {
    ports.write(0xcf8, 4, 0x8000'0000u | slot << 11 | (reg & 0xfc));
    ports.write(0xcfc + (reg & 3), size, value);
  }

  machine::Bus ports{"port", 0x10000};
  machine::Bus memory{"memory", uint64_t{1} << 52};
  std::deque<testing::FakeInterrupt> lines{24};
  testing::FakePower power;
  ResetControl reset{power};
  HostBridge bridge;
  LpcBridge lpc;
  Card card;
  Root root{ports, memory, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); }, reset};
};

TEST_F(PciTest, BothMechanismsFindTheSameFunctions) {
  EXPECT_EQ(get(0, 0), 0x29c0'8086u);
  EXPECT_EQ(get(0x1f, 0), 0x2918'8086u);
  EXPECT_EQ(get(3, 8), 0xff0001'09u);
  EXPECT_EQ(memory.read(layout::ecam_base + (0x1f << 15), 4), 0x2918'8086u);
  EXPECT_EQ(memory.read(layout::ecam_base + (3 << 15), 8), 0x0010'0000'5678'1234u);
}

TEST_F(PciTest, AbsentFunctionsReadAsOnes) {
  EXPECT_EQ(get(4, 0), 0xffff'ffffu);
  EXPECT_EQ(get(3, 0, 4, 1), 0xffff'ffffu);
  ports.write(0xcf8, 4, 0x8001'0000);  // bus 1
  EXPECT_EQ(ports.read(0xcfc, 4), 0xffff'ffffu);
  EXPECT_EQ(memory.read(layout::ecam_base + (1 << 20), 4), 0xffff'ffffu);
  EXPECT_EQ(memory.read(layout::ecam_base + 0x100, 4), 0xffff'ffffu)
      << "conventional functions end at 256 bytes";
}

TEST_F(PciTest, WithoutTheEnableBitDataIsNotDecoded) {
  ports.write(0xcf8, 4, 0x0000'0000);
  EXPECT_EQ(ports.read(0xcfc, 4), 0xffff'ffffu);
}

TEST_F(PciTest, ConfigAddressTakesDoubleWordsOnly) {
  ports.write(0xcf8, 4, 0x8000'1800);
  ports.write(0xcfb, 1, 0x01);
  EXPECT_EQ(ports.read(0xcf8, 4), 0x8000'1800u);
  ports.write(0xcf8, 4, 0xffff'ffff);
  EXPECT_EQ(ports.read(0xcf8, 4), 0x80ff'fffcu);
}

TEST_F(PciTest, Port0xCf9IsTheResetControlRegister) {
  ports.write(0xcf9, 1, 0x06);
  ASSERT_EQ(power.requests.size(), 1u);
  EXPECT_EQ(power.requests[0], machine::PowerRequest::reset);
  EXPECT_EQ(ports.read(0xcf9, 1), 0x02u);
}

TEST_F(PciTest, BytesAndWordsOfARegisterAreReachable) {
  EXPECT_EQ(get(3, DEVICE_ID, 2), 0x5678u);
  EXPECT_EQ(get(3, SUBSYSTEM_ID, 2), 0xbbbbu);
  EXPECT_EQ(get(3, INTERRUPT_PIN, 1), 2u);
  put(3, INTERRUPT_LINE, 0x0b, 1);
  EXPECT_EQ(get(3, INTERRUPT_LINE, 1), 0x0bu);
}

TEST_F(PciTest, IdentityIsReadOnly) {
  put(3, VENDOR_ID, 0);
  put(3, CLASS_CODE & 0xfc, 0);
  EXPECT_EQ(get(3, 0), 0x5678'1234u);
  EXPECT_EQ(get(3, 8), 0xff0001'09u);
}

TEST_F(PciTest, WritingOnesToABarTellsItsSizeAndKind) {
  for (unsigned i = 0; i < 6; i++) put(3, BAR0 + i * 4, 0xffff'ffff);
  EXPECT_EQ(get(3, BAR0), 0xffff'ffe1u);
  EXPECT_EQ(get(3, BAR0 + 4), 0xffff'f000u);
  EXPECT_EQ(get(3, BAR0 + 8), 0x0000'000cu);
  EXPECT_EQ(get(3, BAR0 + 12), 0xffff'fff0u);
  EXPECT_EQ(get(3, BAR0 + 16), 0u);
}

TEST_F(PciTest, BarsAnswerWhereTheGuestPutsThemOnceEnabled) {
  put(3, BAR0, 0xc000);
  put(3, BAR0 + 4, 0xc000'0000);
  put(3, BAR0 + 8, 0);
  put(3, BAR0 + 12, 0x80);
  EXPECT_EQ(ports.read(0xc000, 1), 0xffu);
  put(3, COMMAND, COMMAND_IO, 2);
  EXPECT_EQ(ports.read(0xc01f, 1), 0x10u);
  EXPECT_EQ(memory.read(0xc000'0000, 1), 0xffu);
  put(3, COMMAND, COMMAND_IO | COMMAND_MEMORY, 2);
  EXPECT_EQ(memory.read(0xc000'0fff, 1), 0x20u);
  EXPECT_EQ(memory.read(0x80'0000'0000, 1), 0x30u);
  put(3, BAR0 + 4, 0xc010'0000);
  EXPECT_EQ(memory.read(0xc000'0000, 1), 0xffu);
  EXPECT_EQ(memory.read(0xc010'0000, 1), 0x20u);
  put(3, COMMAND, 0, 2);
  EXPECT_EQ(ports.read(0xc000, 1), 0xffu);
  EXPECT_EQ(memory.read(0xc010'0000, 1), 0xffu);
}

TEST_F(PciTest, ABarCanBeMovedThroughEcam) {
  uint64_t config = layout::ecam_base + (3 << 15);
  memory.write(config + COMMAND, 2, COMMAND_MEMORY);
  memory.write(config + BAR0 + 4, 4, 0xc000'0000);
  EXPECT_EQ(memory.read(0xc000'0000, 1), 0x20u);
}

TEST_F(PciTest, ABarOverSomethingElseIsNotDecoded) {
  put(3, COMMAND, COMMAND_IO | COMMAND_MEMORY, 2);
  put(3, BAR0, 0xce0);  // over the configuration ports
  put(3, BAR0 + 4, static_cast<uint32_t>(layout::ecam_base));
  EXPECT_EQ(get(0, 0), 0x29c0'8086u);
  put(3, BAR0, 0xc000);
  EXPECT_EQ(ports.read(0xc000, 1), 0x10u);
}

TEST_F(PciTest, TheInterruptPinReachesItsGsi) {
  unsigned gsi = layout::pci_gsi(3, 1);
  card.set_intx(true);
  EXPECT_TRUE(lines[gsi].level);
  EXPECT_EQ(get(3, STATUS, 2) & STATUS_INTX, STATUS_INTX);
  put(3, COMMAND, COMMAND_INTX_DISABLE, 2);
  EXPECT_FALSE(lines[gsi].level);
  EXPECT_EQ(get(3, STATUS, 2) & STATUS_INTX, STATUS_INTX) << "the status shows the pin, not the wire";
  put(3, COMMAND, 0, 2);
  EXPECT_TRUE(lines[gsi].level);
  card.set_intx(false);
  EXPECT_FALSE(lines[gsi].level);
}

TEST_F(PciTest, FunctionsOnOneGsiShareTheLine) {
  Card other(1);  // slot 4 INTA is where slot 3 INTB is
  ASSERT_EQ(layout::pci_gsi(4, 0), layout::pci_gsi(3, 1));
  root.add(4, 0, other);
  card.set_intx(true);
  other.set_intx(true);
  card.set_intx(false);
  EXPECT_TRUE(lines[layout::pci_gsi(3, 1)].level);
  root.remove(4, 0);
  EXPECT_FALSE(lines[layout::pci_gsi(3, 1)].level) << "a function that leaves lets go of its line";
}

TEST_F(PciTest, CapabilitiesAreListedAndGuarded) {
  EXPECT_EQ(get(3, STATUS, 2) & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
  EXPECT_EQ(get(3, CAPABILITIES, 1), card.capability);
  EXPECT_EQ(get(3, card.capability, 2), 0x0009u);
  put(3, card.capability + 4, 0xffff'ffff);
  EXPECT_EQ(get(3, card.capability + 4), 0xffu);
  put(3, card.capability + 8, 0x05, 1);
  EXPECT_EQ(get(3, card.capability + 8, 1), 0x0au);
  EXPECT_THAT(card.written, ::testing::Contains(std::pair(card.capability + 4, 4u)));
}

TEST_F(PciTest, ASecondFunctionMarksTheSlotAsMultifunction) {
  EXPECT_EQ(get(3, HEADER_TYPE, 1), 0u);
  Card second;
  root.add(3, 1, second);
  EXPECT_EQ(get(3, HEADER_TYPE, 1), 0x80u);
  EXPECT_EQ(get(3, 0, 4, 1), 0x5678'1234u);
  root.remove(3, 1);
  EXPECT_EQ(get(3, 0, 4, 1), 0xffff'ffffu);
}

TEST_F(PciTest, ATakenSlotIsRefusedAndTheNextFreeOneFound) {
  Card second;
  EXPECT_THROW(root.add(3, 0, second), UsageError);
  EXPECT_EQ(root.free_slot(), 1u);
}

TEST_F(PciTest, ResetTakesTheGuestsConfigurationAway) {
  put(3, COMMAND, COMMAND_IO, 2);
  put(3, BAR0, 0xc000);
  card.set_intx(true);
  root.reset();
  EXPECT_EQ(get(3, COMMAND, 2), 0u);
  EXPECT_EQ(get(3, BAR0), 1u);
  EXPECT_EQ(ports.read(0xc000, 1), 0xffu);
  EXPECT_FALSE(lines[layout::pci_gsi(3, 1)].level);
}

TEST_F(PciTest, SavedFunctionRoundTripsWithItsMappingsAndPin) {
  put(3, COMMAND, COMMAND_IO, 2);
  put(3, BAR0, 0xd000);
  card.set_intx(true);
  nlohmann::json saved;
  card.save(saved);
  root.reset();
  card.load(saved);
  EXPECT_EQ(ports.read(0xd000, 1), 0x10u);
  EXPECT_TRUE(lines[layout::pci_gsi(3, 1)].level);
  nlohmann::json again;
  card.save(again);
  EXPECT_EQ(saved, again);
}

TEST_F(PciTest, ASavedFunctionCannotForgeIdentityOrSize) {
  nlohmann::json saved;
  card.save(saved);
  auto forged = saved;
  forged["config"] = std::string(512, 'f');
  card.load(forged);
  EXPECT_EQ(get(3, 0), 0x5678'1234u);
  forged["config"] = "00";
  EXPECT_THROW(card.load(forged), UsageError);
}

TEST_F(PciTest, SavedRootRoundTrips) {
  ports.write(0xcf8, 4, 0x8000'1804);
  nlohmann::json saved;
  root.save(saved);
  root.reset();
  root.load(saved);
  EXPECT_EQ(ports.read(0xcf8, 4), 0x8000'1804u);
}

TEST_F(PciTest, TheChipsetNamesWhereEcamAndAcpiAre) {
  EXPECT_EQ(get(0, 0x60), layout::ecam_base | 1);
  EXPECT_EQ(get(0x1f, 0x40), layout::acpi_pm_base | 1u);
  EXPECT_EQ(get(0x1f, 0x44, 1), 0x80u);
  EXPECT_EQ(get(0x1f, 0x60), 0x8080'8080u);
}

}  // namespace
}  // namespace lodge::device::pci
