#include "device/virtio/file_system.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "base/temporary_directory.hpp"
#include "device/virtio/testing.hpp"
#include "share/testing.hpp"

namespace lodge::device::virtio {
namespace {

using share::testing::bytes_of;
using share::testing::name;
using testing::FakeDriver;
using testing::Rings;

struct TemporaryFolder : TemporaryDirectory {
  TemporaryFolder() { std::ofstream(*this / "file") << "contents"; }
};

share::FuseServer::Config config() {
  return {false, share::owners_of_process("", "0:0"), 16};
}

class FileSystemTest : public ::testing::TestWithParam<Rings> {
 protected:
  // Through the request queue, the answer's room in two pieces; the answer without its header.
  std::vector<uint8_t> ask(uint32_t opcode, uint64_t node, const std::string& body, int error = 0) {
    fuse_in_header header{};
    header.len = static_cast<uint32_t>(sizeof header + body.size());
    header.opcode = opcode, header.unique = 77, header.nodeid = node;
    const uint64_t head = driver.put_struct(header), rest = driver.put({body.begin(), body.end()}),
                   out = driver.allocate(sizeof(fuse_out_header)), answer = driver.allocate(4096);
    driver.submit(1,
                  {{head, sizeof header, false},
                   {rest, static_cast<uint32_t>(body.size()), false},
                   {out, sizeof(fuse_out_header), true},
                   {answer, 4096, true}},
                  GetParam().indirect);
    const auto used = driver.used(1);
    if (!used) return {};
    fuse_out_header reply{};
    std::memcpy(&reply, driver.get(out, sizeof reply).data(), sizeof reply);
    EXPECT_EQ(reply.unique, 77u);
    EXPECT_EQ(reply.error, -error);
    EXPECT_EQ(reply.len, used->written);
    return driver.get(answer, used->written - sizeof reply);
  }
  bool start() {
    if (!driver.start(GetParam().features)) return false;
    fuse_init_in in{};
    in.major = 7, in.minor = 38;
    return !ask(FUSE_INIT, 0, bytes_of(in)).empty();
  }

  TemporaryFolder folder;
  machine::GuestMemory memory{8 * machine::layout::MiB};
  FileSystem device{memory, std::make_shared<share::Folder>(folder.path()), "tag", config()};
  FakeDriver driver{device, memory};
};

INSTANTIATE_TEST_SUITE_P(Rings, FileSystemTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(FileSystemTest, CarriesRequestsAndAnswers) {
  ASSERT_TRUE(start());
  fuse_entry_out entry{};
  std::memcpy(&entry, ask(FUSE_LOOKUP, 1, name("file")).data(), sizeof entry);
  EXPECT_EQ(entry.attr.size, 8u);
  fuse_open_out open{};
  std::memcpy(&open, ask(FUSE_OPEN, entry.nodeid, bytes_of(fuse_open_in{O_RDWR, 0})).data(), sizeof open);
  fuse_write_in write{};
  write.fh = open.fh, write.offset = 8, write.size = 5;
  ask(FUSE_WRITE, entry.nodeid, bytes_of(write) + " more");
  fuse_read_in read{};
  read.fh = open.fh, read.size = 4096;
  const auto text = ask(FUSE_READ, entry.nodeid, bytes_of(read));
  EXPECT_EQ(std::string(text.begin(), text.end()), "contents more");
  ask(FUSE_LOOKUP, 1, name("nothing"), ENOENT);
  // A forget has no answer; its descriptor comes back empty.
  fuse_in_header forget{};
  forget.len = sizeof forget + sizeof(fuse_forget_in), forget.opcode = FUSE_FORGET,
  forget.nodeid = entry.nodeid;
  const std::string bytes = bytes_of(forget) + bytes_of(fuse_forget_in{1});
  driver.submit(0, {{driver.put({bytes.begin(), bytes.end()}), uint32_t(bytes.size()), false}});
  const auto used = driver.used(0);
  ASSERT_TRUE(used);
  EXPECT_EQ(used->written, 0u);
  // State, with a file open; then the reset closes it.
  nlohmann::json first, second;
  device.save(first);
  FileSystem twin(memory, std::make_shared<share::Folder>(folder.path()), "tag", config());
  twin.load(first);
  twin.save(second);
  EXPECT_EQ(first, second);
  EXPECT_EQ(first["model"]["files"].size(), 1u);
  device.reset();
  nlohmann::json after;
  device.save(after);
  EXPECT_EQ(after["model"]["files"].size(), 0u);
}

TEST_P(FileSystemTest, TellsItsTag) {
  std::array<uint8_t, 41> bytes{};
  device.read_config(0, bytes);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data())), "tag");
  EXPECT_EQ(bytes[36], 1);
  EXPECT_EQ(bytes[40], 0);
}

TEST(HostileDriver, NothingItDoesHurtsTheFileSystem) {
  const TemporaryFolder folder;
  const auto shared = std::make_shared<share::Folder>(folder.path());
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    FileSystem device(memory, shared, "tag", config());
    FakeDriver driver(device, memory);
    std::mt19937 random(seed);
    testing::attack(device, memory, 300, [&](uint32_t below) { return random() % below; });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    driver.submit(1, {{driver.put(std::vector<uint8_t>(40)), 40, false}, {driver.allocate(64), 64, true}});
    EXPECT_TRUE(driver.used(1)) << seed;
  }
}

}  // namespace
}  // namespace lodge::device::virtio
