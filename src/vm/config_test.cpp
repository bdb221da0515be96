#include "vm/config.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"

namespace lodge::vm {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(ParseSize, TakesSuffixesInEitherCaseAndMebibytesWithoutOne) {
  EXPECT_EQ(parse_size("--memory", "640K"), 640u << 10);
  EXPECT_EQ(parse_size("--memory", "512M"), 512u << 20);
  EXPECT_EQ(parse_size("--memory", "2g"), 2ull << 30);
  EXPECT_EQ(parse_size("--memory", "1T"), 1ull << 40);
  EXPECT_EQ(parse_size("--memory", "128"), 128u << 20);
}

TEST(ParseShare, TakesTheLastColonForTheTags) {
  const DeviceConfig share = parse_share("--share", "/a:b/c:tag,readonly,owner=7:8");
  EXPECT_EQ(share.name, "virtio-fs");
  EXPECT_EQ(share.options, (std::map<std::string, std::string>{
                               {"path", "/a:b/c"}, {"tag", "tag"}, {"readonly", "on"}, {"owner", "7:8"}}));
  for (const char* text : {"", "path", ":tag", "path:", "path:tag,tag=other", "path:tag,,readonly"}) {
    EXPECT_THAT([&] { parse_share("--share", text); }, ThrowsMessage<UsageError>(HasSubstr("--share: ")))
        << text;
  }
}

TEST(ParseDisk, TakesTwoCommasForOneOfTheFile) {
  using Options = std::map<std::string, std::string>;
  EXPECT_EQ(parse_disk("--disk", "a,,b,,,readonly").options, (Options{{"file", "a,b,"}, {"readonly", "on"}}));
  EXPECT_EQ(parse_disk("--disk", ",,,,,id=x,,y").options, (Options{{"file", ",,"}, {"id", "x,y"}}));
  EXPECT_EQ(parse_share("--share", "/a,,b:tag,readonly").options,
            (Options{{"path", "/a,b"}, {"tag", "tag"}, {"readonly", "on"}}));
  EXPECT_EQ(parse_device("--device", "virtio-blk,file=a,,b,readonly=on").options,
            (Options{{"file", "a,b"}, {"readonly", "on"}}));
  EXPECT_THROW(parse_disk("--disk", ",readonly"), UsageError);
}

TEST(CheckNames, RefusesTwoOfAName) {
  const DeviceConfig plain{"virtio-blk", {}}, named{"virtio-blk", {{"id", "x"}}},
      first{"virtio-blk", {{"id", "disk0"}}}, second{"virtio-blk", {{"id", "disk1"}}},
      share{"virtio-fs", {{"tag", "src"}}}, low{"virtio-net", {{"mac", "52:54:00:12:34:ab"}}},
      high{"virtio-net", {{"mac", "52:54:00:12:34:AB"}}}, automatic{"virtio-net", {{"mac", "auto"}}},
      kept{"virtio-net", {{"mac", "52:54:00:4c:4f:03"}}}, port{"pcie-root-port", {{"id", "x"}}};
  const auto refuse = [](std::vector<DeviceConfig> devices, const std::string& part) {
    EXPECT_THAT([&] { check_names(devices); }, ThrowsMessage<UsageError>(HasSubstr(part)));
  };
  refuse({named, plain, named}, "--disk: id=x is given twice");
  refuse({first, plain}, "--disk: id=disk0 is the name of a disk without one");
  refuse({plain, plain, second}, "--disk: id=disk1 is the name of a disk without one");
  refuse({share, share}, "--share: the tag 'src' is given twice");
  refuse({low, high}, "--net: mac=52:54:00:12:34:ab is given twice");
  refuse({kept, automatic}, "--net: mac=52:54:00:4c:4f:03 may be the address of a card without mac=");
  refuse({port, named}, "--disk: id=x is the name of a PCI Express port");
  check_names(std::vector{plain, named, second, share, low, automatic, automatic});
  check_names(std::vector{kept, low});
}

TEST(ParseSize, RefusesWhatIsNoSize) {
  for (const char* text : {"", "M", "-1", "1.5G", "12X", "0x10", "1 G", "G1"}) {
    EXPECT_THAT([&] { parse_size("--memory", text); }, ThrowsMessage<UsageError>(HasSubstr("--memory: ")))
        << text;
  }
}

TEST(ParseSize, RefusesOverflow) {
  EXPECT_THAT([] { parse_size("--memory", "18446744073709551615T"); },
              ThrowsMessage<UsageError>(HasSubstr("more than")));
  EXPECT_THROW(parse_size("--memory", "99999999999999999999"), UsageError);
}

TEST(ParseCpus, TakesOneTo255) {
  EXPECT_EQ(parse_cpus("--cpus", "1"), 1u);
  EXPECT_EQ(parse_cpus("--cpus", "255"), 255u);
  for (const char* text : {"0", "256", "10000", "two", "", "-1", "1.0"}) {
    EXPECT_THAT([&] { parse_cpus("--cpus", text); }, ThrowsMessage<UsageError>(HasSubstr("1 to 255")))
        << text;
  }
}

TEST(ParseSerial, KnowsFourBackEnds) {
  EXPECT_EQ(parse_serial("--serial", "file:/tmp/a,b"), (SerialConfig{SerialConfig::Kind::file, "/tmp/a,b"}));
  EXPECT_EQ(parse_serial("--serial", "pty").kind, SerialConfig::Kind::pty);
  EXPECT_THROW(parse_serial("--serial", "file:"), UsageError);
  EXPECT_THROW(parse_serial("--serial", "tcp:1"), UsageError);
}

TEST(ParseDevice, SplitsNameAndOptions) {
  const DeviceConfig device = parse_device("--device", "isa-debug-exit,port=0xf4,size=4");
  EXPECT_EQ(device.name, "isa-debug-exit");
  EXPECT_EQ(device.options.at("port"), "0xf4");
  EXPECT_EQ(device.options.at("size"), "4");
  EXPECT_EQ(parse_device("--device", "pc-testdev").options.size(), 0u);
}

TEST(ParseDevice, RefusesMalformedOptions) {
  for (const char* text : {"", ",port=1", "x,port", "x,=1", "x,a=1,a=2", "x,,a=1"}) {
    EXPECT_THROW(parse_device("--device", text), UsageError) << text;
  }
}

class Validate : public testing::Test {
 protected:
  Validate() {
    std::ofstream(kernel_) << "kernel";
    config_.kernel = kernel_;
  }
  auto check() {
    return [this] { validate(config_, {.memory = 4ull << 30}); };
  }

  TemporaryDirectory dir_;
  std::string kernel_ = dir_ / "kernel";
  VmConfig config_;
};

TEST_F(Validate, AcceptsTheDefaults) {
  EXPECT_NO_THROW(check()());
}

TEST_F(Validate, RefusesMoreMemoryThanTheHostHas) {
  config_.memory = 8ull << 30;
  EXPECT_THAT(check(),
              ThrowsMessage<UsageError>(HasSubstr("--memory: 8192 MiB is more than this host's 4096 MiB")));
}

TEST_F(Validate, RefusesTooLittleOrUnalignedMemory) {
  config_.memory = 1 << 20;
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("--memory")));
  config_.memory = (64 << 20) + 1024;
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("multiple of 4K")));
}

TEST_F(Validate, RefusesAnInitrdLargerThanMemory) {
  config_.initrds = {dir_ / "initrd"};
  std::ofstream(config_.initrds[0]) << "x";
  std::filesystem::resize_file(config_.initrds[0], 600 << 20);
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("--initrd")));
}

TEST_F(Validate, AModuleMayHaveArguments) {
  config_.initrds = {kernel_ + " one two"};
  EXPECT_NO_THROW(check()());
}

TEST_F(Validate, NamesTheFileThatCannotBeRead) {
  config_.kernel = dir_ / "none";
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(testing::AllOf(HasSubstr("--kernel"), HasSubstr("/none"))));
  config_.kernel = dir_.path();
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("directory")));
}

TEST_F(Validate, RefusesTheTerminalTwiceAndAFifthPort) {
  config_.serial = {{SerialConfig::Kind::stdio, {}}, {SerialConfig::Kind::stdio, {}}};
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("stdio")));
  config_.serial.assign(5, {});
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("4 serial ports")));
}

TEST_F(Validate, RefusesUnknownCpuAndBadName) {
  config_.cpu = "pentium";
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("x86-64-v3")));
  config_.cpu = "host";
  config_.name = "a b";
  EXPECT_THAT(check(), ThrowsMessage<UsageError>(HasSubstr("--name")));
}

TEST(Networks, AreOptionsOfTheirCard) {
  const DeviceConfig tap = parse_network("--net", "tap,ifname=tap0,queues=2");
  EXPECT_EQ(tap.name, "virtio-net");
  EXPECT_EQ(tap.options,
            (std::map<std::string, std::string>{{"net", "tap"}, {"ifname", "tap0"}, {"queues", "2"}}));
  for (const char* wrong : {"", "wire", "user,x", "user,net=tap"})
    EXPECT_THROW(parse_network("--net", wrong), UsageError) << wrong;
}

}  // namespace
}  // namespace lodge::vm
