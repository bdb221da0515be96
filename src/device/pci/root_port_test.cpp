// PCI Express root ports: the bus behind them, their windows, hot-plug events.
#include "device/pci/root_port.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "device/debug_ports.hpp"
#include "device/pci/allocate.hpp"
#include "device/pci/root.hpp"
#include "device/reset.hpp"
#include "device/testing.hpp"
#include "machine/layout.hpp"

namespace lodge::device::pci {
namespace {

namespace layout = machine::layout;

class Card final : public Function {
 public:
  explicit Card(bool ports = false) : Function("card", {0x1234, 0x5678, 9, 0xff0001}) {
    if (ports) add_bar(0, BarKind::io, 0x20, window_);
    add_bar(1, BarKind::memory32, 0x1000, window_);
    add_bar(2, BarKind::memory64_prefetchable, 0x4000, window_);
    use_interrupt_pin(2);
  }
  unsigned resets = 0;
  void reset() noexcept override {
    resets++;
    Function::reset();
  }

 private:
  class Constant final : public machine::RegisterWindow {
   public:
    uint64_t read(uint64_t, unsigned) noexcept override { return 0x42; }
    void write(uint64_t, unsigned, uint64_t) noexcept override {}
  };
  Constant window_;
};

class RootPortTest : public ::testing::Test {
 protected:
  RootPortTest() {
    ports.add(Root::ports_base, Root::ports_size, root.port_window(), "pci");
    memory.add(layout::ecam_base, layout::ecam_size, root.ecam_window(), "ecam");
    root.add_port(slot, port);
    for (express = get(0, slot, 0x34, 1); express && get(0, slot, express, 1) != 0x10;)
      express = get(0, slot, express + 1, 1);
  }
  ~RootPortTest() override {
    root.unplug(card, false);
    root.remove(slot, 0);
  }
  static uint64_t at(unsigned bus, unsigned device, unsigned offset) {
    return layout::ecam_base + (bus << 20) + (device << 15) + offset;
  }
  uint32_t get(unsigned bus, unsigned device, unsigned offset, unsigned size) {
    return static_cast<uint32_t>(memory.read(at(bus, device, offset), size));
  }
  void put(unsigned bus, unsigned device, unsigned offset, unsigned size, uint32_t value) {
    memory.write(at(bus, device, offset), size, value);
  }
  uint32_t slot_status() { return get(0, slot, express + 0x1a, 2); }

  static constexpr unsigned slot = 4;
  machine::Bus ports{"port", 0x10000}, memory{"memory", uint64_t{1} << 52};
  std::deque<device::testing::FakeInterrupt> lines{24};
  device::testing::FakePower power;
  ResetControl reset{power};
  Root root{ports, memory, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); }, reset};
  RootPort port{"port1", 1};
  Card card;
  unsigned express = 0;
};

TEST_F(RootPortTest, IsABridgeWithASlotThatCanBeHotPlugged) {
  EXPECT_EQ(get(0, slot, 0x0a, 2), 0x0604u);
  EXPECT_EQ(get(0, slot, 0x0e, 1), 1u);
  ASSERT_NE(express, 0u);
  EXPECT_EQ(get(0, slot, express + 2, 2), 0x0142u) << "version 2, root port, slot implemented";
  EXPECT_EQ(get(0, slot, express + 0x14, 4) & 0x60, 0x60u) << "hot-plug, also by surprise";
  EXPECT_EQ(get(0, slot, express + 0x14, 4) >> 19, 1u) << "physical slot number";
  EXPECT_EQ(slot_status() & 0x40, 0u) << "empty";
  EXPECT_EQ(get(0, slot, 0x100, 4), 0u) << "no extended capability";
}

TEST_F(RootPortTest, TheBusBehindItIsWhereTheGuestPutsIt) {
  port.plug(card, false);
  EXPECT_EQ(get(1, 0, 0, 4), 0xffff'ffffu);
  put(0, slot, 0x18, 4, 0x0001'0100);
  EXPECT_EQ(get(1, 0, 0, 4), 0x5678'1234u);
  EXPECT_EQ(get(1, 1, 0, 4), 0xffff'ffffu) << "one slot";
  EXPECT_EQ(get(1, 0, 0x1000, 4), 0xffff'ffffu) << "one function";
  ports.write(0xcf8, 4, 0x8001'0000);
  EXPECT_EQ(ports.read(0xcfc, 4), 0x5678'1234u) << "mechanism #1 reaches it too";
  put(0, slot, 0x18, 4, 0x0007'0700);
  EXPECT_EQ(get(1, 0, 0, 4), 0xffff'ffffu);
  EXPECT_EQ(get(7, 0, 0, 4), 0x5678'1234u);
}

TEST_F(RootPortTest, FirmwareGivesItABusWindowsAndTheCardItsAddresses) {
  port.plug(card, false);
  assign_resources(root);
  ASSERT_EQ(get(0, slot, 0x18, 4) & 0xff'ff00, 0x0001'0100u);
  const uint64_t base = (get(0, slot, 0x20, 2) & 0xfff0) << 16;
  const uint64_t limit = (get(0, slot, 0x22, 2) & 0xfff0) << 16 | 0xfffff;
  EXPECT_GE(base, layout::pci_mmio_base);
  EXPECT_LT(limit, layout::pci_mmio_end);
  const uint64_t bar = get(1, 0, 0x14, 4) & ~15u;
  EXPECT_GE(bar, base);
  EXPECT_LE(bar + 0xfff, limit);
  EXPECT_EQ(memory.read(bar, 4), 0x42u);
  const uint64_t wide_base = (get(0, slot, 0x24, 2) & 0xfff0) << 16 | uint64_t{get(0, slot, 0x28, 4)} << 32;
  const uint64_t wide_limit =
      (get(0, slot, 0x26, 2) & 0xfff0) << 16 | 0xfffff | uint64_t{get(0, slot, 0x2c, 4)} << 32;
  const uint64_t wide = (get(1, 0, 0x18, 4) & ~15u) | uint64_t{get(1, 0, 0x1c, 4)} << 32;
  EXPECT_GE(wide, wide_base);
  EXPECT_LE(wide + 0x3fff, wide_limit);
  EXPECT_TRUE(wide_base > limit || wide_limit < base) << "the windows do not overlap";
  EXPECT_EQ(get(1, 0, 0x3c, 1), layout::pci_gsi(slot, 1));
  put(1, 0, 0x14, 4, static_cast<uint32_t>(base + 0x8000));  // the guest moves it
  EXPECT_EQ(memory.read(base + 0x8000, 4), 0x42u);
  EXPECT_EQ(memory.read(bar, 4), 0xffff'ffffu);
}

// Two processors: one moves the bus and the card's registers, plugs and unplugs as the machine's owner would;
// the other looks for the card everywhere.
TEST_F(RootPortTest, TheCardIsFoundWhereItIsWhateverMoves) {
  port.plug(card, false);
  assign_resources(root);
  const uint32_t bar = get(1, 0, 0x14, 4) & ~15u;
  std::jthread other([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      for (const unsigned bus : {1u, 7u}) {
        const uint32_t id = get(bus, 0, 0, 4);
        EXPECT_TRUE(id == 0x5678'1234 || id == 0xffff'ffff) << id;
        put(bus, 0, 0x3c, 1, bus);
      }
      for (const uint64_t place : {bar, bar + 0x1'0000}) {
        const uint64_t value = memory.read(place, 1);
        EXPECT_TRUE(value == 0x42 || value == 0xff) << value;
      }
      put(0, slot, express + 0x18, 2, 0x1028);
      put(0, slot, express + 0x1a, 2, 0x11f);
    }
  });
  for (unsigned i = 0; i < 500; i++) {
    const unsigned bus = i % 2 ? 7 : 1;
    put(0, slot, 0x18, 4, bus << 8 | bus << 16);
    put(bus, 0, 0x14, 4, bar + i % 2 * 0x1'0000);
    EXPECT_EQ(get(bus, 0, 0, 4), 0x5678'1234u);
    EXPECT_EQ(memory.read(bar + i % 2 * 0x1'0000, 1), 0x42u);
    if (i % 10 != 0) continue;
    root.unplug(card, true);
    EXPECT_EQ(get(bus, 0, 0, 4), 0xffff'ffffu);
    EXPECT_EQ(memory.read(bar + i % 2 * 0x1'0000, 1), 0xffu);
    port.plug(card, true);
    put(bus, 0, 4, 2, 2);
  }
  other.request_stop();
  other.join();
  put(0, slot, express + 0x1a, 2, 0x11f);
  EXPECT_FALSE(lines[layout::pci_gsi(slot, 0)].level) << "acknowledged";
}

// A guest that writes everywhere: the port stays a port, and what it may write reads back.
TEST_F(RootPortTest, HostileWritesChangeNoIdentity) {
  port.plug(card, false);
  std::vector<uint32_t> fixed;
  const auto identity = [&] {
    fixed.clear();
    for (const unsigned at : {0x00u, 0x08u, 0x34u, express, express + 4, express + 0xc, express + 0x14})
      fixed.push_back(get(0, slot, at, 4));
    return fixed;
  };
  const auto before = identity();
  std::mt19937 random(1);
  for (int i = 0; i < 20'000; i++) {
    const unsigned size = 1u << random() % 4;
    memory.write(at(random() % 4 ? 0 : random() % 256, random() % 3 ? slot : random() % 32,
                    random() % 0x1000 & ~(size - 1)),
                 size, random());
    if (random() % 64 == 0) card.set_intx(random() % 2);
  }
  EXPECT_EQ(identity(), before);
  EXPECT_TRUE(slot_status() & 0x40) << "still plugged in";
  root.unplug(card, false);  // what is plugged in is not state
  RootPort twin("port1", 1);
  EXPECT_TRUE(device::testing::round_trip(port, twin));
  root.reset();
  EXPECT_EQ(get(0, slot, 0x18, 4), 0u);
  EXPECT_FALSE(lines[layout::pci_gsi(slot, 0)].level);
}

TEST_F(RootPortTest, AnEmptyPortHasRoomForWhatMayCome) {
  assign_resources(root);
  const uint64_t base = (get(0, slot, 0x20, 2) & 0xfff0) << 16;
  const uint64_t limit = (get(0, slot, 0x22, 2) & 0xfff0) << 16 | 0xfffff;
  EXPECT_GE(limit - base + 1, 2 * layout::MiB);
}

TEST_F(RootPortTest, PinsOfTheCardArriveAtThePortsSlot) {
  port.plug(card, false);
  card.set_intx(true);
  EXPECT_TRUE(lines[layout::pci_gsi(slot, 1)].level);
  root.unplug(card, false);
  EXPECT_FALSE(lines[layout::pci_gsi(slot, 1)].level);
}

TEST_F(RootPortTest, PluggingAndUnpluggingAreEvents) {
  auto& line = lines[layout::pci_gsi(slot, 0)];
  put(0, slot, express + 0x18, 2, 1 << 3 | 1 << 5);  // presence, interrupt
  port.plug(card, true);
  EXPECT_TRUE(line.level);
  EXPECT_EQ(slot_status() & 0x49, 0x49u) << "present, that is new, and somebody has pressed the button";
  EXPECT_TRUE(get(0, slot, express + 0x12, 2) & 1 << 13) << "link active";
  put(0, slot, express + 0x1a, 2, 0x108);
  EXPECT_FALSE(line.level);
  root.unplug(card, true);
  EXPECT_TRUE(line.level);
  EXPECT_EQ(slot_status() & 0x48, 0x08u);
  put(0, slot, express + 0x18, 2, 0);
  EXPECT_FALSE(line.level) << "nobody listens any more";
}

// What a guest's driver does that was asked by the slot's button: it takes its hands off the card, and
// switches the power off.
TEST_F(RootPortTest, TheGuestLetsGoWhatItIsAskedFor) {
  auto& line = lines[layout::pci_gsi(slot, 0)];
  unsigned released = 0;
  port.on_release([&] { released++; });
  EXPECT_FALSE(port.ask_to_let_go()) << "nothing is there";
  port.plug(card, false);
  put(0, slot, 0x18, 4, 0x0001'0100);
  put(0, slot, express + 0x18, 2, 1 << 0 | 1 << 5);  // button, interrupt
  EXPECT_TRUE(port.ask_to_let_go());
  EXPECT_TRUE(line.level);
  EXPECT_EQ(slot_status(), 0x41u) << "pressed, and still there";
  put(0, slot, express + 0x1a, 2, 1);
  EXPECT_FALSE(line.level);
  EXPECT_TRUE(port.leaving());
  EXPECT_EQ(get(1, 0, 0, 4), 0x5678'1234u);
  put(0, slot, express + 0x18, 2, 1 << 0 | 1 << 5 | 1 << 10);
  EXPECT_EQ(released, 1u);
  EXPECT_FALSE(port.occupied());
  EXPECT_FALSE(port.leaving());
  EXPECT_EQ(slot_status() & 0x48, 0x08u) << "gone, and that is new";
  // The next one: powered when the guest says so.
  port.plug(card, true);
  EXPECT_EQ(get(1, 0, 0, 4), 0xffff'ffffu);
  EXPECT_FALSE(get(0, slot, express + 0x12, 2) & 1 << 13);
  put(0, slot, express + 0x18, 2, 1 << 5);
  EXPECT_EQ(get(1, 0, 0, 4), 0x5678'1234u);
  EXPECT_TRUE(get(0, slot, express + 0x12, 2) & 1 << 13) << "link active";
  EXPECT_EQ(released, 1u);
}

TEST_F(RootPortTest, ACardThatNobodyWantsOutStaysWhenTheSlotIsSwitchedOffAndOn) {
  port.on_release([] { FAIL() << "nobody has asked"; });
  port.plug(card, false);
  put(0, slot, 0x18, 4, 0x0001'0100);
  put(0, slot, express + 0x18, 2, 1 << 10);
  EXPECT_EQ(card.resets, 1u) << "without power it forgets";
  EXPECT_EQ(get(1, 0, 0, 4), 0xffff'ffffu);
  EXPECT_EQ(slot_status() & 0x140, 0x140u) << "there, and the link has changed";
  put(0, slot, express + 0x18, 2, 1 << 10 | 1);
  EXPECT_EQ(card.resets, 1u) << "switched off once";
  put(0, slot, express + 0x18, 2, 0);
  EXPECT_EQ(get(1, 0, 0, 4), 0x5678'1234u);
  EXPECT_TRUE(port.ask_to_let_go());
  root.reset();
  EXPECT_FALSE(port.leaving()) << "whoever was asked is gone";
}

TEST_F(RootPortTest, WhatWasThereFromTheStartIsNoEvent) {
  put(0, slot, express + 0x18, 2, 0x1028);
  port.plug(card, false);
  EXPECT_EQ(slot_status(), 0x40u);
  EXPECT_FALSE(lines[layout::pci_gsi(slot, 0)].level);
}

TEST_F(RootPortTest, AFullSlotIsRefused) {
  port.plug(card, false);
  Card other;
  EXPECT_THROW(port.plug(other, false), UsageError);
}

TEST_F(RootPortTest, ASecondaryBusResetResetsTheCard) {
  port.plug(card, false);
  put(0, slot, 0x3e, 2, 0x40);
  EXPECT_EQ(card.resets, 1u);
  root.reset();
  EXPECT_EQ(card.resets, 2u);
  EXPECT_EQ(slot_status() & 0x40, 0x40u) << "a reset unplugs nothing";
}

TEST_F(RootPortTest, APortThatGoesLetsItsCardGo) {
  {
    RootPort other("port2", 2);
    root.add_port(5, other);
    other.plug(card, false);
    card.set_intx(true);
    root.remove(5, 0);
  }
  EXPECT_FALSE(lines[layout::pci_gsi(5, 1)].level);
  root.unplug(card, false);  // is nowhere: nothing happens
}

TEST_F(RootPortTest, ARootThatGoesLetsThePortsCardsGo) {
  machine::Bus other_ports("port", 0x10000), other_memory("memory", uint64_t{1} << 52);
  std::deque<device::testing::FakeInterrupt> other_lines(24);
  RootPort other("port2", 2);
  {
    Root goes{other_ports, other_memory,
              [&](unsigned gsi) -> machine::Interrupt& { return other_lines.at(gsi); }, reset};
    goes.add_port(5, other);
    other.plug(card, false);
    card.set_intx(true);
  }
  EXPECT_FALSE(other.occupied());
  EXPECT_FALSE(other_lines[layout::pci_gsi(5, 1)].level);
}

TEST_F(RootPortTest, CardsWithPortsDoNotFitBehindIt) {
  Card legacy(true);
  port.plug(legacy, false);
  EXPECT_THROW(assign_resources(root), UsageError);
  root.unplug(legacy, false);
}

TEST_F(RootPortTest, SavedStateRoundTrips) {
  put(0, slot, 0x18, 4, 0x0003'0300);
  put(0, slot, express + 0x18, 2, 0x28);
  RootPort other("port1", 1);
  EXPECT_TRUE(device::testing::round_trip(port, other));
}

// A slot that is switched off, with a card whose leave was asked for: nothing happens to the card when such a
// state is loaded, and it leaves as if it had been asked here.
TEST_F(RootPortTest, SavedStateKnowsOfPowerAndLeave) {
  port.plug(card, false);
  put(0, slot, express + 0x18, 2, 1 << 10);
  port.ask_to_let_go();
  nlohmann::json saved;
  port.save(saved);
  RootPort twin("port1", 1);
  Card other;
  Root twin_root{ports, memory, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); }, reset};
  twin_root.add_port(5, twin);
  unsigned released = 0;
  twin.on_release([&] { released++; });
  twin.plug(other, false);
  twin.load(saved);
  nlohmann::json again;
  twin.save(again);
  EXPECT_EQ(again, saved);
  EXPECT_EQ(other.resets, 0u);
  EXPECT_FALSE(twin.powered());
  EXPECT_TRUE(twin.leaving());
  twin.config_write(express + 0x18, 2, 0);
  twin.config_write(express + 0x18, 2, 1 << 10);
  EXPECT_EQ(released, 1u);
  EXPECT_FALSE(twin.occupied());
}

}  // namespace
}  // namespace lodge::device::pci
