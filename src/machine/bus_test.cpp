#include "machine/bus.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <thread>

#include "base/error.hpp"

namespace lodge::machine {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Remembers the accesses it gets; answers with its pattern.
class Recorder : public RegisterWindow {
 public:
  explicit Recorder(uint64_t pattern = 0) : pattern_(pattern) {}
  uint64_t read(uint64_t offset, unsigned size) noexcept override {
    calls.push_back({offset, size, 0});
    return pattern_ >> (offset * 8);
  }
  void write(uint64_t offset, unsigned size, uint64_t value) noexcept override {
    calls.push_back({offset, size, value});
  }
  struct Call {
    uint64_t offset;
    unsigned size;
    uint64_t value;
    bool operator==(const Call&) const = default;
  };
  std::vector<Call> calls;

 private:
  uint64_t pattern_;
};

TEST(Bus, PassesOffsetSizeAndValueToTheOwner) {
  Bus bus("port", 0x10000);
  Recorder window(0x44332211);
  bus.add(0x3f8, 8, window, "serial0");
  EXPECT_EQ(bus.read(0x3f9, 2), 0x3322u);
  bus.write(0x3ff, 1, 0x1ab);
  EXPECT_THAT(window.calls, ElementsAre(Recorder::Call{1, 2, 0}, Recorder::Call{7, 1, 0xab}));
}

TEST(Bus, UnclaimedAddressesReadAsOnesAndSwallowWrites) {
  Bus bus("memory", uint64_t{1} << 52);
  EXPECT_EQ(bus.read(0x1000, 1), 0xffu);
  EXPECT_EQ(bus.read(0x1000, 8), ~uint64_t{0});
  EXPECT_EQ(bus.read(~uint64_t{0} - 1, 4), 0xffffffffu);
  bus.write(0x1000, 4, 1);
}

TEST(Bus, AnAccessThatLeavesAWindowIsSplitIntoBytes) {
  Bus bus("port", 0x10000);
  Recorder low(0x0b0a), high(0x0d0c);
  bus.add(0x10, 2, low, "low");
  bus.add(0x12, 1, high, "high");
  EXPECT_EQ(bus.read(0x11, 4), 0xffff0c0bu);
  bus.write(0x0f, 2, 0x1234);
  EXPECT_THAT(low.calls, ElementsAre(Recorder::Call{1, 1, 0}, Recorder::Call{0, 1, 0x12}));
}

TEST(Bus, ASizeThatIsNoPowerOfTwoIsSplitIntoBytes) {
  Bus bus("memory", 0x10000);
  Recorder window(0x332211);
  bus.add(0, 8, window, "window");
  EXPECT_EQ(bus.read(0, 3), 0x332211u);
  EXPECT_EQ(window.calls.size(), 3u);
}

TEST(Bus, TheLastPortsDoNotWrapAround) {
  Bus bus("port", 0x10000);
  Recorder first;
  bus.add(0, 1, first, "first");
  EXPECT_EQ(bus.read(0xffff, 2), 0xffffu);
  EXPECT_TRUE(first.calls.empty());
}

TEST(Bus, AnOverlapNamesBothOwners) {
  Bus bus("port", 0x10000);
  Recorder window;
  bus.add(0x60, 5, window, "i8042");
  try {
    bus.add(0x64, 1, window, "other");
    FAIL() << "no error";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("i8042"), HasSubstr("other"), HasSubstr("0x64")));
  }
  EXPECT_FALSE(bus.try_add(0x5f, 2, window, "other"));
  EXPECT_TRUE(bus.try_add(0x65, 1, window, "other"));
}

TEST(Bus, ARangeThatLeavesTheBusIsRefused) {
  Bus bus("port", 0x10000);
  Recorder window;
  EXPECT_THROW(bus.add(0xffff, 2, window, "x"), UsageError);
  EXPECT_THROW(bus.add(0x10000, 1, window, "x"), UsageError);
  EXPECT_THROW(bus.add(0, 0, window, "x"), UsageError);
  EXPECT_FALSE(bus.try_add(~uint64_t{0}, 2, window, "x"));
}

// A window that moves another one from inside a write, as a PCI base address register does.
class Mover : public RegisterWindow {
 public:
  Mover(Bus& bus, RegisterWindow& moved) : bus_(bus), moved_(moved) {}
  uint64_t read(uint64_t, unsigned) noexcept override { return 0; }
  void write(uint64_t, unsigned, uint64_t value) noexcept override {
    bus_.remove(0x100);
    bus_.try_add(value, 1, moved_, "moved");
  }

 private:
  Bus& bus_;
  RegisterWindow& moved_;
};

TEST(Bus, AWindowMayMoveAnotherDuringAnAccess) {
  Bus bus("port", 0x10000);
  Recorder moved(0x42);
  Mover mover(bus, moved);
  bus.add(0x100, 1, moved, "moved");
  bus.add(0xcfc, 4, mover, "pci");
  bus.write(0xcfc, 4, 0x200);
  EXPECT_EQ(bus.read(0x100, 1), 0xffu);
  EXPECT_EQ(bus.read(0x200, 1), 0x42u);
  EXPECT_THAT(bus.describe(), ElementsAre("0x200-0x200 moved", "0xcfc-0xcff pci"));
}

TEST(Bus, ARegistrationEndsWithItsObject) {
  Bus bus("port", 0x10000);
  Recorder window(0x42);
  {
    Registration first(bus, 0x10, 1, window, "first");
    Registration moved(std::move(first));
    EXPECT_EQ(bus.read(0x10, 1), 0x42u);
  }
  EXPECT_TRUE(bus.describe().empty());
}

class Gate : public RegisterWindow {
 public:
  uint64_t read(uint64_t, unsigned) noexcept override {
    inside.set_value();
    open.get_future().wait();
    done = true;
    return 0;
  }
  void write(uint64_t, unsigned, uint64_t) noexcept override {}
  std::promise<void> inside, open;
  std::atomic<bool> done{false};
};

TEST(Bus, RemoveWaitsForTheAccessThatIsInside) {
  Bus bus("port", 0x10000);
  Gate gate;
  bus.add(0x80, 1, gate, "gate");
  std::thread reader([&] { bus.read(0x80, 1); });
  gate.inside.get_future().wait();
  std::promise<bool> removed;
  std::thread remover([&] {
    bus.remove(0x80);
    removed.set_value(gate.done);
  });
  while (!bus.describe().empty()) std::this_thread::yield();
  auto result = removed.get_future();
  EXPECT_EQ(result.wait_for(std::chrono::milliseconds(1)), std::future_status::timeout);
  gate.open.set_value();
  EXPECT_TRUE(result.get());
  reader.join();
  remover.join();
}

}  // namespace
}  // namespace lodge::machine
