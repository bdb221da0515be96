#include "device/virtio/console.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "base/error.hpp"
#include "device/testing.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using device::testing::FakeBackend;
using testing::FakeDriver;
using testing::Rings;

constexpr uint64_t F_SIZE = feature(0), F_MULTIPORT = feature(1), F_EMERG_WRITE = feature(2);

// A back end that remembers the chip.
class Host final : public FakeBackend {
 public:
  void connect(CharPort& chip) override { port = &chip; }
  void disconnect() noexcept override { port = nullptr; }
  size_t type(std::string_view text) {
    return port->receive({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
  }
  CharPort* port = nullptr;
};

class ConsoleTest : public ::testing::TestWithParam<Rings> {
 protected:
  ConsoleTest() { console.connect_backends(); }
  void start(uint64_t features) {
    ASSERT_TRUE(driver.start(GetParam().features | features));
    for (auto& at : control) {
      at = driver.allocate(64);
      driver.submit(2, {{at, 64, true}});
    }
  }
  void tell(uint32_t id, uint16_t event, uint16_t value) {
    struct {
      uint32_t id;
      uint16_t event, value;
    } message{id, event, value};
    driver.submit(3, {{driver.put_struct(message), 8, false}}, GetParam().indirect);
    EXPECT_TRUE(driver.used(3));
  }
  // The control messages that have arrived: "id event value text".
  std::vector<std::string> told() {
    std::vector<std::string> all;
    while (const auto used = driver.used(2)) {
      const auto bytes = driver.get(control[next++], used->written);
      all.push_back(fmt::format("{} {} {}", bytes[0], bytes[4], bytes[6]));
      if (bytes[4] == 7) all.back() += " " + std::string(bytes.begin() + 8, bytes.end());
      if (bytes[4] == 5) all.back() += fmt::format(" {}x{}", bytes[8], bytes[10]);
    }
    return all;
  }
  void print(unsigned queue, const std::string& text) {
    driver.submit(queue,
                  {{driver.put({text.begin(), text.end()}), static_cast<uint32_t>(text.size()), false}},
                  GetParam().indirect);
  }

  machine::GuestMemory memory{8 * machine::layout::MiB};
  std::shared_ptr<Host> terminal = std::make_shared<Host>(), agent = std::make_shared<Host>();
  Console console{memory, {{"", terminal}, {"org.lodge.agent", agent}}};
  FakeDriver driver{console, memory};
  std::array<uint64_t, 12> control{};
  size_t next = 0;
};

INSTANTIATE_TEST_SUITE_P(Rings, ConsoleTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(ConsoleTest, ASimpleDriverHasOnePort) {
  start(0);
  print(1, "hello");
  EXPECT_EQ(terminal->output, "hello");
  EXPECT_EQ(driver.used(1)->written, 0u);
  const uint64_t at = driver.allocate(4);
  EXPECT_EQ(terminal->type("input"), 0u);  // no buffer yet
  driver.submit(0, {{at, 4, true}}, GetParam().indirect);
  EXPECT_GE(terminal->ready_calls, 1u);
  EXPECT_EQ(terminal->type("input"), 4u);
  EXPECT_EQ(driver.used(0)->written, 4u);
  EXPECT_THAT(driver.get(at, 4), ::testing::ElementsAre('i', 'n', 'p', 'u'));
}

TEST_P(ConsoleTest, OutputWaitsForASlowBackEnd) {
  start(0);
  terminal->room = 3;
  print(1, "abcdefgh");
  EXPECT_EQ(terminal->output, "abc");
  EXPECT_FALSE(driver.used(1));
  nlohmann::json middle;
  console.save(middle);
  terminal->room = 2;
  terminal->port->transmit_ready();
  terminal->room = 100;
  terminal->port->transmit_ready();
  EXPECT_EQ(terminal->output, "abcdefgh");
  EXPECT_TRUE(driver.used(1));
  // The same again from the state that was saved on the way.
  auto other = std::make_shared<Host>();
  Console twin(memory, {{"", other}, {"org.lodge.agent", agent}});
  twin.load(middle);
  nlohmann::json again;
  twin.save(again);
  EXPECT_EQ(middle, again);
}

TEST_P(ConsoleTest, PortsAreAnnouncedNamedAndOpened) {
  start(F_MULTIPORT | F_SIZE);
  std::array<uint8_t, 12> config{};
  console.read_config(0, config);
  EXPECT_THAT(config, ::testing::ElementsAre(80, 0, 25, 0, 2, 0, 0, 0, 0, 0, 0, 0));
  tell(0, 0, 1);
  EXPECT_THAT(told(), ::testing::ElementsAre("0 1 0", "1 1 0"));
  tell(0, 3, 1);
  tell(1, 3, 1);
  EXPECT_THAT(told(),
              ::testing::ElementsAre("0 4 1", "0 5 0 80x25", "0 6 1", "1 7 0 org.lodge.agent", "1 6 1"));
  // Closed: input waits.
  driver.submit(4, {{driver.allocate(16), 16, true}});
  EXPECT_EQ(agent->type("x"), 0u);
  tell(1, 6, 1);
  EXPECT_EQ(agent->type("x"), 1u);
  print(5, "answer");
  EXPECT_EQ(agent->output, "answer");
  EXPECT_EQ(terminal->output, "");
  tell(0, 6, 1);
  terminal->port->resized(100, 40);
  EXPECT_THAT(told(), ::testing::ElementsAre("0 5 0 100x40"));
}

TEST_P(ConsoleTest, AskingAgainAndAgainFillsNoMemory) {
  ASSERT_TRUE(driver.start(GetParam().features | F_MULTIPORT));  // and no buffers for the answers
  for (int i = 0; i < 1000; i++) {
    tell(0, 0, 1);
    tell(1, 3, 1);
    tell(77, 3, 1);
  }
  nlohmann::json json;
  console.save(json);
  EXPECT_LE(json["model"]["waiting"].get<std::string>().size(), 16u * 16);
}

TEST_P(ConsoleTest, EmergencyWrite) {
  start(F_EMERG_WRITE);
  console.write_config(8, std::array<uint8_t, 4>{'!', 0, 0, 0});
  EXPECT_EQ(terminal->output, "!");
}

TEST_P(ConsoleTest, StateThatDoesNotFitIsRefused) {
  start(F_MULTIPORT);
  nlohmann::json json;
  console.save(json);
  json["model"]["open"] = "00";
  EXPECT_THROW(console.load(json), UsageError);
}

TEST(HostileDriver, NothingItDoesHurtsTheConsole) {
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    auto host = std::make_shared<Host>();
    Console console(memory, {{"", host}, {"p", std::make_shared<Host>()}});
    console.connect_backends();
    FakeDriver driver(console, memory);
    std::mt19937 random(seed);
    testing::attack(console, memory, 300, [&](uint32_t below) {
      if (random() % 16 == 0) host->type("some input");
      return random() % below;
    });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    host->output.clear();
    driver.submit(1, {{driver.put({'o', 'k'}), 2, false}});
    EXPECT_EQ(host->output, "ok") << seed;
  }
}

}  // namespace
}  // namespace lodge::device::virtio
