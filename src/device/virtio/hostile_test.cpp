// Every device under a driver that breaks the rules one by one, through the registers of every transport and
// with every layout of queues. (The random attacks beside each device break them in combination.) Whatever
// the driver does: the call returns, a request is completed or refused, and after a reset the device works.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "device/virtio/testing.hpp"
#include "device/virtio/testing_doors.hpp"
#include "device/virtio/testing_rigs.hpp"

namespace lodge::device::virtio {
namespace {

namespace layout = machine::layout;
using testing::Buffer;
using testing::Door;
using testing::DriverQueue;
using testing::MmioDoor;
using testing::PciDoor;
using testing::Rig;
using testing::Rings;

constexpr uint64_t ram_size = 4 * layout::MiB;
constexpr uint64_t rings_at = 0x20'0000, buffers_at = 0x10'0000;  // what attacks aim at lies below

template <class Made>
std::unique_ptr<Rig> make_rig() {
  return std::make_unique<Made>();
}

struct Subject {
  const char* name;
  std::unique_ptr<Rig> (*make)();
  bool has_legacy;
};
const std::vector<Subject> subjects = {
    {"Entropy", make_rig<testing::EntropyRig>, true},        {"Block", make_rig<testing::BlockRig>, true},
    {"Console", make_rig<testing::ConsoleRig>, true},        {"Network", make_rig<testing::NetworkRig>, true},
    {"Balloon", make_rig<testing::BalloonRig>, true},        {"Vsock", make_rig<testing::VsockRig>, false},
    {"FileSystem", make_rig<testing::FileSystemRig>, false}, {"Input", make_rig<testing::InputRig>, false},
};

// --- The test

enum class Way { mmio, pci, pci_legacy };
struct Parameter {
  Subject subject;
  Way way;
  Rings rings;
};

template <class Wanted>
std::vector<Parameter> parameters(Wanted wanted) {
  std::vector<Parameter> all;
  for (const Subject& subject : subjects)
    for (const Rings& rings : testing::all_rings()) {
      all.push_back({subject, Way::mmio, rings});
      all.push_back({subject, Way::pci, rings});
      // What a legacy driver can negotiate: bits below 32.
      if (subject.has_legacy && rings.features >> 32 == 0) all.push_back({subject, Way::pci_legacy, rings});
    }
  std::erase_if(all, [&](const Parameter& one) { return !wanted(one); });
  return all;
}

// What a failed test prints of it.
void PrintTo(const Parameter& parameter, std::ostream* out) {
  *out << parameter.subject.name << ", " << parameter.rings.name;
}

struct Raw {
  uint64_t address;
  uint32_t length;
  uint16_t flags, next = 0;
};

class Hostile : public ::testing::TestWithParam<Parameter> {
 protected:
  void SetUp() override {
    auto device = rig->make(memory);
    door = GetParam().way == Way::mmio
               ? std::unique_ptr<Door>(std::make_unique<MmioDoor>(std::move(device)))
               : std::make_unique<PciDoor>(std::move(device), GetParam().way == Way::pci_legacy);
  }
  void TearDown() override { door->set_status(0); }
  Device& device() { return door->device(); }

  // 3.1.1 for all that the device offers of the rings in question.
  void negotiate() {
    door->set_status(0);
    door->set_status(ACKNOWLEDGE);
    door->set_status(ACKNOWLEDGE | DRIVER);
    features =
        (GetParam().rings.features | (door->legacy() ? 0 : F_RING_RESET)) & device().features(door->legacy());
    if (!door->legacy()) features |= F_VERSION_1;
    door->negotiate(features);
    if (!door->legacy()) door->set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
  }
  void make_queue(unsigned index) {
    const uint16_t size = door->legacy() ? device().queue_max_size(index)
                                         : std::min<uint16_t>(8, device().queue_max_size(index));
    queues[index] =
        std::make_unique<DriverQueue>(memory, rings_at + uint64_t{index} * 0x2'0000, size, features);
    door->arrange(*queues[index]);
    door->set_up(index, queues[index]->setup);
  }
  void start() {
    negotiate();
    queues.clear();
    queues.resize(device().queues());
    for (unsigned i = 0; i < queues.size(); i++) make_queue(i);
    driver_ok();
  }
  void driver_ok() {
    const uint8_t ready = ACKNOWLEDGE | DRIVER | DRIVER_OK | (door->legacy() ? 0 : FEATURES_OK);
    door->set_status(ready);
    door->pump();
  }
  bool refused() { return door->status() & DEVICE_NEEDS_RESET; }

  void kick(unsigned queue) {
    door->notify(queue);
    door->pump();
    rig->provoke(device());
    door->pump();
  }
  bool wait_used(unsigned queue) {
    for (int i = 0; i < 200'000; i++) {
      if (queues[queue]->used()) return true;
      if (refused()) return false;
      door->pump();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return false;
  }
  unsigned submit(bool indirect) {
    std::vector<Buffer> buffers;
    const unsigned queue = rig->request(memory, buffers_at + next_buffer++ % 16 * 4096, buffers);
    queues[queue]->submit(buffers, indirect && features & F_INDIRECT_DESC);
    return queue;
  }
  bool answers() {
    const unsigned queue = submit(GetParam().rings.indirect);
    kick(queue);
    return wait_used(queue);
  }
  // After whatever has happened.
  void expect_whole() {
    start();
    EXPECT_FALSE(refused());
    EXPECT_TRUE(answers());
  }

  // Writes descriptors and makes the first of them available, in a queue that nothing was put into.
  void publish(unsigned index, const std::vector<Raw>& chain) {
    DriverQueue& queue = *queues[index];
    const uint64_t table = queue.setup.descriptors;
    for (size_t i = chain.size(); i-- > 0;) {  // the first one last
      const Raw& raw = chain[i];
      const auto flags = static_cast<uint16_t>(raw.flags | (queue.packed() ? DESC_AVAIL : 0));
      queue.put_descriptor(table + 16 * i, raw.address, raw.length, flags, queue.packed() ? 0 : raw.next);
    }
    if (queue.packed()) return;
    queue.put16(queue.setup.driver + 4, 0);
    queue.put16(queue.setup.driver + 2, 1);
  }
  // Each queue of a device that was just started gets this chain and a kick.
  void attack(const char* what, const std::vector<Raw>& chain, bool must_be_refused) {
    for (unsigned queue = 0; queue < device().queues(); queue++) {
      SCOPED_TRACE(what);
      SCOPED_TRACE(queue);
      start();
      publish(queue, chain);
      kick(queue);
      if (rig->takes(queue)) {
        if (must_be_refused)
          EXPECT_TRUE(refused());
        else
          EXPECT_TRUE(refused() || wait_used(queue) || refused());
      }
      kick(queue);
      expect_whole();
    }
  }
  // Memory that nobody writes to.
  void mark(uint64_t gpa, uint64_t size) { memory.write(gpa, std::vector<uint8_t>(size, 0xee)); }
  bool untouched(uint64_t gpa, uint64_t size) {
    std::vector<uint8_t> bytes(size);
    memory.read(gpa, bytes);
    return bytes == std::vector<uint8_t>(size, 0xee);
  }
  // A table of descriptors in RAM, for indirect ones.
  uint64_t put_table(const std::vector<Raw>& entries) {
    const uint64_t at = buffers_at + 0x20000;
    for (size_t i = 0; i < entries.size(); i++)
      queues[0]->put_descriptor(at + 16 * i, entries[i].address, entries[i].length, entries[i].flags,
                                entries[i].next);
    return at;
  }

  std::unique_ptr<Rig> rig = GetParam().subject.make();
  machine::GuestMemory memory{ram_size};
  std::unique_ptr<Door> door;
  uint64_t features = 0;
  std::vector<std::unique_ptr<DriverQueue>> queues;
  unsigned next_buffer = 0;
};

std::string name_of(const ::testing::TestParamInfo<Parameter>& test) {
  constexpr std::array ways = {"Mmio", "Pci", "PciLegacy"};
  return std::string(test.param.subject.name) + ways[static_cast<size_t>(test.param.way)] +
         test.param.rings.name;
}
class HostileModern : public Hostile {};
class HostileLegacy : public Hostile {};
class HostileSplit : public Hostile {};
bool is_legacy(const Parameter& one) {
  return one.way == Way::pci_legacy;
}
INSTANTIATE_TEST_SUITE_P(Devices, Hostile,
                         ::testing::ValuesIn(parameters([](const Parameter&) { return true; })), name_of);
INSTANTIATE_TEST_SUITE_P(Devices, HostileModern, ::testing::ValuesIn(parameters([](const Parameter& one) {
                           return !is_legacy(one);
                         })),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Devices, HostileLegacy, ::testing::ValuesIn(parameters(is_legacy)), name_of);
INSTANTIATE_TEST_SUITE_P(Devices, HostileSplit, ::testing::ValuesIn(parameters([](const Parameter& one) {
                           return !(one.rings.features & F_RING_PACKED);
                         })),
                         name_of);

// All rules of 2.7 and 2.8 about one chain. A cycle: in a split ring a descriptor that leads to itself or to
// an earlier one, in a packed ring, which has no links, chains without an end.
TEST_P(Hostile, ChainsThatBreakTheRulesAreRefused) {
  const bool packed = GetParam().rings.features & F_RING_PACKED;
  constexpr uint16_t next = DESC_NEXT, write = DESC_WRITE;
  const uint64_t at = buffers_at;
  const std::vector<Raw> endless(packed ? 8 : 1, Raw{at, 16, next, 0});
  attack("a cycle of what is read", endless, true);
  const std::vector<Raw> endless_writable(packed ? 8 : 1, Raw{at, 16, uint16_t(next | write), 0});
  attack("a cycle of what is written", endless_writable, true);
  const std::vector<Raw> endless_nothing(packed ? 8 : 1, Raw{at, 0, next, 0});
  attack("a cycle of nothing", endless_nothing, true);
  if (!packed) {
    attack("a cycle of two", {{at, 16, next, 1}, {at, 16, next, 0}}, true);
    attack("a link out of the table", {{at, 16, next, 0xffff}}, true);
  }
  for (const uint16_t flags : {uint16_t{0}, write}) {
    attack("above RAM", {{ram_size, 16, flags}}, true);
    attack("over the end of RAM", {{ram_size - 8, 16, flags}}, true);
    attack("far above RAM", {{uint64_t{1} << 45, 16, flags}}, true);
    attack("round the end of all addresses", {{~uint64_t{7}, 16, flags}}, true);
    attack("four gigabytes less one byte", {{at, 0xffff'ffff, flags}}, true);
  }
  attack("what is read behind what is written", {{at, 16, uint16_t(write | next), 1}, {at, 16, 0}}, true);
}

TEST_P(Hostile, ChainsOfNothingAndOfTooMuchAreAnswered) {
  constexpr uint16_t next = DESC_NEXT, write = DESC_WRITE;
  const uint64_t at = buffers_at;
  for (const uint16_t flags : {uint16_t{0}, write}) {
    attack("no bytes", {{at, 0, flags}}, false);
    attack("no bytes, nowhere", {{~uint64_t{0}, 0, flags}}, false);
    attack("one byte", {{at, 1, flags}}, false);
    attack("no bytes three times",
           {{at, 0, uint16_t(flags | next), 1}, {at, 0, uint16_t(flags | next), 2}, {at, 0, flags}}, false);
    attack("all of RAM", {{0, ram_size, flags}}, false);
  }
  attack("all of RAM both ways", {{0, uint32_t(rings_at), next, 1}, {0, uint32_t(rings_at), write}}, false);
}

TEST_P(Hostile, IndirectTablesThatBreakTheRulesAreRefused) {
  start();
  constexpr uint16_t next = DESC_NEXT, indirect = DESC_INDIRECT, write = DESC_WRITE;
  const uint64_t at = buffers_at;
  if (!(features & F_INDIRECT_DESC)) {
    attack("not negotiated", {{put_table({{at, 16, 0}}), 16, indirect}}, true);
    return;
  }
  attack("no entry", {{put_table({{at, 16, 0}}), 0, indirect}}, true);
  attack("half an entry", {{put_table({{at, 16, 0}}), 24, indirect}}, true);
  attack("four gigabytes of entries", {{put_table({{at, 16, 0}}), 0xffff'fff0, indirect}}, true);
  attack("a table outside RAM", {{ram_size, 16, indirect}}, true);
  attack("a table with a next one",
         {{put_table({{at, 16, 0}}), 16, uint16_t(indirect | next), 1}, {at, 16, 0}}, true);
  attack("an entry outside RAM", {{put_table({{ram_size, 16, write}}), 16, indirect}}, true);
  // More entries than any device takes: each leads on, of which packed tables have no need.
  const uint64_t table = put_table(std::vector<Raw>(2000, Raw{at, 16, next, 0}));
  attack("a table without an end", {{table, 2000 * 16, indirect}}, true);
  if (GetParam().rings.features & F_RING_PACKED) return;
  attack("a table in a table", {{put_table({{at, 16, indirect}}), 16, indirect}}, true);
  attack("an entry that leads out", {{put_table({{at, 16, next, 7}}), 16, indirect}}, true);
}

// Indexes that no driver could have, and rings that lie over each other.
TEST_P(Hostile, CountersAndRingsOfNonsenseDoNoHarm) {
  std::mt19937 random(GetParam().rings.features & 0xffff);
  for (unsigned queue = 0; queue < device().queues(); queue++) {
    SCOPED_TRACE(queue);
    if (!(GetParam().rings.features & F_RING_PACKED)) {
      for (const uint16_t ahead :
           {uint16_t{1025}, uint16_t{0x8000}, uint16_t{0xffff}}) {  // than any queue has places
        start();
        queues[queue]->put16(queues[queue]->setup.driver + 2, ahead);
        kick(queue);
        EXPECT_TRUE(refused() || !rig->takes(queue)) << ahead;
      }
      start();
      queues[queue]->put16(queues[queue]->setup.driver + 4, 0xffff);  // a head outside the table
      queues[queue]->put16(queues[queue]->setup.driver + 2, 1);
      kick(queue);
      EXPECT_TRUE(refused() || !rig->takes(queue));
    }
    start();
    for (int i = 0; i < 20; i++) {
      const DriverQueue& ring = *queues[queue];
      for (const uint64_t part : {ring.setup.descriptors, ring.setup.driver, ring.setup.device})
        for (unsigned word = 0; word < 64; word++)
          queues[queue]->put16(part + 2 * word, static_cast<uint16_t>(random()));
      kick(queue);
    }
    // All three parts of all queues in one place.
    negotiate();
    for (unsigned i = 0; i < device().queues(); i++) door->set_up(i, {8, rings_at, rings_at, rings_at});
    driver_ok();
    for (int i = 0; i < 20; i++) {
      memory.write(rings_at, std::vector<uint8_t>(128, static_cast<uint8_t>(random())));
      kick(queue);
    }
    expect_whole();
  }
}

// The same head twice, and more requests than places: a driver that gives away what it does not own.
TEST_P(HostileSplit, AHeadThatIsAvailableTwiceIsAnsweredOrRefused) {
  start();
  std::vector<Buffer> buffers;
  const unsigned queue = rig->request(memory, buffers_at, buffers);
  DriverQueue& ring = *queues[queue];
  ring.submit(buffers);
  for (unsigned place = 0; place < 4; place++) ring.put16(ring.setup.driver + 4 + 2 * place, 0);
  ring.put16(ring.setup.driver + 2, 4);
  kick(queue);
  for (unsigned answer = 0; answer < 4 && !refused(); answer++) EXPECT_TRUE(wait_used(queue) || refused());
  expect_whole();
}

// What a queue is cannot change under the device (CVE-2026-5747).
TEST_P(Hostile, AQueueIsFrozenAtDriverOk) {
  start();
  mark(0x8000, 0x8000);
  for (unsigned queue = 0; queue < device().queues(); queue++) {
    const QueueSetup before = device().queue_setup(queue);
    if (door->legacy()) continue;  // a legacy driver has one register, which takes the queue back
    for (const uint16_t size : {uint16_t{0}, uint16_t{2}, uint16_t{0xffff}}) {
      door->set_up(queue, {size, 0x8000, 0xa000, 0xc000});
      door->set_up(queue, {size, ~uint64_t{15}, ram_size, uint64_t{1} << 60});
    }
    EXPECT_EQ(device().queue_setup(queue), before);
    kick(queue);
  }
  door->negotiate(~uint64_t{0});
  EXPECT_EQ(device().driver_features(), features);
  for (int i = 0; i < 20; i++) EXPECT_TRUE(answers());
  EXPECT_TRUE(untouched(0x8000, 0x8000));
}

TEST_P(HostileLegacy, ALegacyDriverMayTakeItsQueueAwayWhileItWorks) {
  for (const uint64_t page : {uint64_t{0}, ram_size / 4096, uint64_t{0xffff'ffff}}) {
    start();
    const unsigned queue = submit(false);
    kick(queue);
    for (unsigned i = 0; i < device().queues(); i++) {
      door->set_up(i, {0, page * 4096, 0, 0});
      kick(i);
    }
    expect_whole();
  }
}

TEST_P(Hostile, AResetInMidRequestEndsIt) {
  for (int round = 0; round < 5; round++) {
    start();
    unsigned queue = 0;
    const unsigned requests = GetParam().rings.indirect ? 4 : 2;
    for (unsigned i = 0; i < requests; i++) queue = submit(GetParam().rings.indirect);
    door->notify(queue);
    if (round % 2) door->pump();
    door->set_status(0);
    EXPECT_EQ(door->status(), 0);
    // Complete when the write returns: nothing of the guest's memory is touched any more.
    const uint64_t rings_size = 0x2'0000 * queues.size();
    mark(rings_at, rings_size);
    mark(buffers_at, 0x10000);
    door->pump();
    rig->provoke(device());
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_TRUE(untouched(rings_at, rings_size));
    EXPECT_TRUE(untouched(buffers_at, 0x10000));
    expect_whole();
  }
}

TEST_P(HostileModern, ARingResetInMidRequestEndsIt) {
  for (int round = 0; round < 5; round++) {
    start();
    const unsigned queue = submit(GetParam().rings.indirect);
    door->notify(queue);
    if (round % 2) door->pump();
    ASSERT_TRUE(door->reset_queue(queue));
    EXPECT_FALSE(device().queue_enabled(queue));
    mark(rings_at + uint64_t{queue} * 0x2'0000, 0x2'0000);
    mark(buffers_at, 0x10000);
    kick(queue);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_TRUE(untouched(rings_at + uint64_t{queue} * 0x2'0000, 0x2'0000));
    EXPECT_TRUE(untouched(buffers_at, 0x10000));
    EXPECT_FALSE(refused());
    make_queue(queue);  // again, at the same place
    EXPECT_TRUE(answers());
    for (unsigned all = 0; all < device().queues(); all++) {
      door->reset_queue(all);
      door->reset_queue(all);
      kick(all);
    }
    expect_whole();
  }
}

// Registers in any order with any value, between requests that are out.
TEST_P(Hostile, RegistersInAnyOrderDoNoHarm) {
  std::mt19937 random(static_cast<unsigned>(GetParam().way) + 7);
  for (int round = 0; round < 10; round++) {
    start();
    const unsigned queue = submit(GetParam().rings.indirect);
    door->notify(queue);
    for (int i = 0; i < 100; i++) {
      const unsigned size = 1u << random() % 4;
      switch (random() % 6) {
        case 0: door->write_config(random() % 300, std::min(size, 4u), random()); break;
        case 1: door->notify(random() % 70000); break;
        case 2: door->set_status(static_cast<uint8_t>(random())); break;
        case 3:
          door->set_up(random() % 20, {static_cast<uint16_t>(random()), random() & ~15u, random(), random()});
          break;
        default: door->write_any(random() % 0x4000, size, random()); break;
      }
      if (random() % 8 == 0) door->pump(), rig->provoke(device());
    }
    expect_whole();
  }
}

}  // namespace
}  // namespace lodge::device::virtio
