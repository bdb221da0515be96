#include "device/virtio/input.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/input.h>

#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "device/key_names.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::FakeDriver;
using testing::Rings;

class InputTest : public ::testing::TestWithParam<Rings> {
 protected:
  // 5.8.5: what the device has to say about a selection.
  std::vector<uint8_t> ask(Input& device, uint8_t select, uint8_t subselect = 0) {
    device.write_config(0, std::array{select});
    device.write_config(1, std::array{subselect});
    std::array<uint8_t, 136> bytes{};
    device.read_config(0, bytes);
    EXPECT_LE(bytes[2], 128);
    return {bytes.begin() + 8, bytes.begin() + 8 + bytes[2]};
  }
  static bool has_bit(const std::vector<uint8_t>& bits, unsigned bit) {
    return bit / 8 < bits.size() && bits[bit / 8] >> bit % 8 & 1;
  }
  void offer(unsigned count, uint32_t size = 8) {
    for (unsigned i = 0; i < count; i++) {
      const uint64_t at = driver.allocate(16, 16);
      buffers[driver.submit(0, {{at, size, true}}, GetParam().indirect)] = at;
    }
  }
  // All events that have arrived.
  std::vector<InputEvent> arrived() {
    std::vector<InputEvent> events;
    while (const auto used = driver.used(0)) {
      EXPECT_EQ(used->written, 8u);
      InputEvent event;
      std::memcpy(&event, driver.get(buffers[used->id], 8).data(), 8);
      events.push_back(event);
    }
    return events;
  }
  void tell(const std::vector<uint8_t>& bytes) {
    driver.submit(1, {{driver.put(bytes), static_cast<uint32_t>(bytes.size()), false}}, GetParam().indirect);
    const auto used = driver.used(1);
    ASSERT_TRUE(used);
    EXPECT_EQ(used->written, 0u);
  }

  machine::GuestMemory memory{8 * machine::layout::MiB};
  Input keyboard{memory, Input::Kind::keyboard};
  FakeDriver driver{keyboard, memory};
  std::map<uint16_t, uint64_t> buffers;
  const InputEvent press{EV_KEY, KEY_A, 1}, release{EV_KEY, KEY_A, 0}, end{EV_SYN, SYN_REPORT, 0};
};

INSTANTIATE_TEST_SUITE_P(Rings, InputTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(InputTest, AKeyboardSaysWhatItHas) {
  const auto name = ask(keyboard, 1);
  EXPECT_EQ(std::string(name.begin(), name.end()), "Lodge VirtIO Keyboard");
  EXPECT_THAT(ask(keyboard, 3), ::testing::ElementsAre(BUS_VIRTUAL, 0, 0xf4, 0x1a, 1, 0, 1, 0));
  const auto keys = ask(keyboard, 0x11, EV_KEY);
  for (const unsigned key : {KEY_A, KEY_ENTER, KEY_RIGHTCTRL, KEY_KPENTER, KEY_F12})
    EXPECT_TRUE(has_bit(keys, key)) << key;
  EXPECT_FALSE(has_bit(keys, BTN_LEFT));
  EXPECT_THAT(ask(keyboard, 0x11, EV_LED), ::testing::ElementsAre(7));
  EXPECT_THAT(ask(keyboard, 0x11, EV_REP), ::testing::ElementsAre(3));
  for (const auto& [select, subselect] :
       {std::pair{0, 0}, {1, 1}, {2, 0}, {0x10, 0}, {0x11, EV_ABS}, {0x12, ABS_X}, {0xff, 0xff}})
    EXPECT_THAT(ask(keyboard, uint8_t(select), uint8_t(subselect)), ::testing::IsEmpty()) << select;
}

TEST_P(InputTest, ATabletSaysWhatItHas) {
  Input tablet(memory, Input::Kind::tablet);
  EXPECT_THAT(ask(tablet, 0x11, EV_ABS), ::testing::ElementsAre(3));
  EXPECT_TRUE(has_bit(ask(tablet, 0x11, EV_KEY), BTN_EXTRA));
  EXPECT_TRUE(has_bit(ask(tablet, 0x11, EV_REL), REL_WHEEL));
  for (const uint8_t axis : {ABS_X, ABS_Y})
    EXPECT_THAT(ask(tablet, 0x12, axis),
                ::testing::ElementsAre(0, 0, 0, 0, 0xff, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
  EXPECT_THAT(ask(tablet, 0x12, ABS_Z), ::testing::IsEmpty());
  EXPECT_THAT(ask(tablet, 0x11, EV_LED), ::testing::IsEmpty());
  EXPECT_NE(ask(tablet, 3), ask(keyboard, 3));
}

TEST_P(InputTest, OnlyTheSelectionIsWritable) {
  keyboard.write_config(0, std::array<uint8_t, 8>{1, 0, 99, 99, 99, 99, 99, 99});
  keyboard.write_config(8, std::array<uint8_t, 4>{99, 99, 99, 99});
  std::array<uint8_t, 16> bytes{};
  keyboard.read_config(0, bytes);
  EXPECT_THAT(bytes, ::testing::ElementsAre(1, 0, 21, 0, 0, 0, 0, 0, 'L', 'o', 'd', 'g', 'e', ' ', 'V', 'i'));
}

TEST_P(InputTest, AReportArrivesWithItsEnd) {
  EXPECT_FALSE(keyboard.send({&press, 1})) << "nobody is there";
  ASSERT_TRUE(driver.start(GetParam().features));
  EXPECT_TRUE(keyboard.listened_to());
  offer(8);
  EXPECT_TRUE(keyboard.send({&press, 1}));
  EXPECT_THAT(arrived(), ::testing::ElementsAre(press, end));
  EXPECT_GE(driver.transport.queue_interrupts[0], 1u);
  EXPECT_TRUE(keyboard.send({&release, 1}));
  EXPECT_THAT(arrived(), ::testing::ElementsAre(release, end));
}

TEST_P(InputTest, ReportsWaitForBuffersAndAreRefusedAsAWhole) {
  ASSERT_TRUE(driver.start(GetParam().features));
  size_t sent = 0;
  while (keyboard.send(std::array{sent % 2 ? release : press})) sent++;
  EXPECT_EQ(sent, Input::max_waiting / 2);
  std::vector<InputEvent> events;
  for (int i = 0; i < 400 && events.size() < 2 * sent; i++) {
    offer(3);
    const auto more = arrived();
    events.insert(events.end(), more.begin(), more.end());
  }
  ASSERT_EQ(events.size(), 2 * sent);
  for (size_t i = 0; i < events.size(); i++)
    ASSERT_EQ(events[i], i % 2 ? end : i / 2 % 2 ? release : press) << i;
  EXPECT_TRUE(keyboard.send({&press, 1}));
}

TEST_P(InputTest, TheDriverSwitchesTheLights) {
  ASSERT_TRUE(driver.start(GetParam().features));
  tell({EV_LED, 0, LED_CAPSL, 0, 1, 0, 0, 0});
  EXPECT_EQ(keyboard.lights(), 1u << LED_CAPSL);
  tell({EV_LED, 0, LED_NUML, 0, 1, 0, 0, 0});
  tell({EV_LED, 0, LED_CAPSL, 0, 0, 0, 0, 0});
  EXPECT_EQ(keyboard.lights(), 1u << LED_NUML);
  tell({EV_LED, 0, 77, 1, 1, 0, 0, 0});  // lights, sounds and sizes that are not known
  tell({EV_SND, 0, LED_CAPSL, 0, 1, 0, 0, 0});
  tell({EV_LED, 0, LED_CAPSL, 0, 1});
  EXPECT_EQ(keyboard.lights(), 1u << LED_NUML);
  keyboard.reset();
  EXPECT_EQ(keyboard.lights(), 0u);
}

TEST_P(InputTest, ABufferTooSmallForAnEventStopsTheDevice) {
  ASSERT_TRUE(driver.start(GetParam().features));
  offer(1, 7);
  EXPECT_TRUE(keyboard.send({&press, 1}));
  EXPECT_TRUE(driver.needs_reset());
  EXPECT_FALSE(keyboard.send({&press, 1}));
  ASSERT_TRUE(driver.start(GetParam().features));
  offer(4);
  EXPECT_THAT(arrived(), ::testing::IsEmpty()) << "a reset forgets what waited";
  EXPECT_TRUE(keyboard.send({&press, 1}));
  EXPECT_THAT(arrived(), ::testing::ElementsAre(press, end));
}

TEST_P(InputTest, SavedStateGoesOnWhereItWas) {
  ASSERT_TRUE(driver.start(GetParam().features));
  tell({EV_LED, 0, LED_CAPSL, 0, 1, 0, 0, 0});
  keyboard.write_config(0, std::array<uint8_t, 2>{0x11, EV_LED});
  EXPECT_TRUE(keyboard.send({&press, 1}));
  nlohmann::json first, second;
  keyboard.save(first);
  Input other(memory, Input::Kind::keyboard);
  testing::FakeTransport transport;
  other.connect(transport);
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  EXPECT_EQ(other.lights(), 1u << LED_CAPSL);
  for (int i = 0; i < 2; i++) {
    const uint64_t at = driver.allocate(16, 16);
    buffers[driver.queues[0].submit({{at, 8, true}})] = at;
  }
  other.kick(0);
  EXPECT_THAT(arrived(), ::testing::ElementsAre(press, end));
  const auto refused = [&](const char* name, const nlohmann::json& value) {
    nlohmann::json bad = first;
    bad["model"][name] = value;
    EXPECT_THROW(other.load(bad), UsageError) << name;
  };
  refused("waiting", "01020304050607");
  refused("waiting", std::string(size_t{2} * 8 * (Input::max_waiting + 1), '0'));
  refused("lights", 0x8000'0000u);
}

TEST(KeyNames, AreFoundAndHaveABitEach) {
  EXPECT_EQ(key_code("a"), KEY_A);
  EXPECT_EQ(key_code("z"), KEY_Z);
  EXPECT_EQ(key_code("0"), KEY_0);
  EXPECT_EQ(key_code("kp_enter"), KEY_KPENTER);
  EXPECT_FALSE(key_code(""));
  EXPECT_FALSE(key_code("any"));
  for (const KeyName& key : key_names()) EXPECT_LT(key.code, 128 * 8);
}

TEST(HostileDriver, NothingItDoesHurtsTheKeyboard) {
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    Input keyboard(memory, Input::Kind::keyboard);
    FakeDriver driver(keyboard, memory);
    std::mt19937 random(seed);
    testing::attack(keyboard, memory, 300, [&](uint32_t below) {
      if (random() % 8 == 0)
        keyboard.send(std::array{InputEvent{EV_KEY, KEY_A, 1}, InputEvent{EV_KEY, KEY_A, 0}});
      return random() % below;
    });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    for (int i = 0; i < 2; i++) driver.submit(0, {{driver.allocate(8), 8, true}});
    EXPECT_TRUE(keyboard.send(std::array{InputEvent{EV_KEY, KEY_A, 1}}));
    EXPECT_TRUE(driver.used(0)) << seed;
  }
}

}  // namespace
}  // namespace lodge::device::virtio
