// Bad input: one clear line that names the option, exit status 2, nothing left behind.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge {
namespace {

using testing::HasSubstr;
using testing_support::Seconds;

constexpr const char* accelerator = "soft";

class BadInput : public testing::Test {
 protected:
  std::string file(const std::string& name, const std::string& content) {
    std::ofstream(dir_ / name, std::ios::binary) << content;
    return dir_ / name;
  }
  // What every bad input must do, and `part` in the message.
  void refused(std::vector<std::string> arguments, const std::string& part) {
    arguments.insert(arguments.begin(), LODGE_BINARY);
    const auto before = files();
    const auto result = testing_support::run(arguments, Seconds(60));
    EXPECT_EQ(result.status, 2) << result.err;
    EXPECT_EQ(result.out, "");
    EXPECT_THAT(result.err, HasSubstr(part));
    EXPECT_THAT(result.err, testing::StartsWith("lodge: "));
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
    EXPECT_EQ(files(), before);
  }
  std::vector<std::string> files() {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) names.push_back(entry.path());
    std::ranges::sort(names);
    return names;
  }
  // `lodge run` with a good kernel and what is bad.
  void run_refused(std::vector<std::string> more, const std::string& part) {
    std::vector<std::string> arguments = {"run", "--kernel", LODGE_GUEST, "--accel", accelerator};
    arguments.insert(arguments.end(), more.begin(), more.end());
    refused(arguments, part);
  }

  TemporaryDirectory dir_;
};

TEST_F(BadInput, NoCommand) {
  refused({}, "lodge --help");
}
TEST_F(BadInput, AMachineThatThereIsNot) {
  run_refused({"--machine", "nano"}, "choose pc or micro");
}
TEST_F(BadInput, WhatTheMicroMachineLacks) {
  const std::vector<std::string> micro = {"--machine", "micro"};
  const auto micro_refused = [&](std::vector<std::string> more, const std::string& part) {
    more.insert(more.begin(), micro.begin(), micro.end());
    run_refused(std::move(more), part);
  };
  micro_refused({"--device", "virtio-rng,slot=5"}, "slot=5: --machine micro has no PCI");
  micro_refused({"--device", "virtio-rng,legacy=on"}, "legacy=on: --machine micro has no PCI");
  micro_refused({"--device", "virtio-keyboard,bus=a"}, "bus=a: --machine micro has no PCI");
  micro_refused({"--device", "pcie-root-port,id=a"}, "--machine micro has no PCI");
  micro_refused({"--hotplug", "1"}, "--hotplug: --machine micro has no PCI");
  micro_refused({"--serial", "null", "--serial", "null"}, "--machine micro has one serial port");
}
TEST_F(BadInput, SettingsForCloudInit) {
  run_refused({"--hostname", "My Host"}, "--hostname: ");
  run_refused({"--hostname", ""}, "--hostname: the name is empty");
  run_refused({"--user-data", dir_ / "none"}, "--user-data: ");
  run_refused({"--user-data", "/dev/zero"}, "--user-data: ");
  run_refused({"--user-data", file("data", "#!/bin/sh\n"), "--run", "true"}, "--run: ");
  run_refused({"--ssh-key", file("key", "-----BEGIN OPENSSH PRIVATE KEY-----\n")}, "is a private key");
  run_refused({"--ssh-key", file("key", "hello\n")}, "is neither a public key nor a file with one");
}
TEST_F(BadInput, SettingsForASystemWithoutCloudInit) {
  const std::string tree = dir_ / "tree", disk = dir_ / "disk";
  std::filesystem::create_directories(tree + "/boot");
  std::filesystem::copy_file(LODGE_GUEST, tree + "/boot/vmlinuz-1");
  const auto made =
      testing_support::run({"/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "8M"}, Seconds(60));
  ASSERT_EQ(made.status, 0) << made.err;
  refused({"run", "--accel", accelerator, "--hostname", "web", disk}, "has no cloud-init");
}
TEST_F(BadInput, LimitsAreInTheBaseOfTheNumber) {
  run_refused({"--device", "virtio-blk,file=/dev/null,queues=17"}, "from 0 to 16");
  run_refused({"--device", "debugcon,port=0x10000"}, "from 0x0 to 0xffff");
}
TEST_F(BadInput, APciSlotThatIsTaken) {
  run_refused({"--device", "virtio-rng,slot=5", "--device", "virtio-balloon,addr=5"}, "taken by virtio-rng");
}
TEST_F(BadInput, RootPortsThatDoNotFit) {
  const std::vector<std::string> port = {"--device", "pcie-root-port,id=a"};
  const auto with_port = [&](std::vector<std::string> more, const std::string& part) {
    more.insert(more.begin(), port.begin(), port.end());
    run_refused(std::move(more), part);
  };
  run_refused({"--device", "virtio-rng,bus=a"}, "add --device pcie-root-port,id=a");
  run_refused({"--hotplug", "9"}, "--hotplug: 9 are more than the 8");
  run_refused({"--device", "pcie-root-port"}, "for example id=port1");
  with_port({"--device", "pcie-root-port,id=a"}, "the name is given twice");
  with_port({"--device", "virtio-rng,bus=a,slot=3"}, "leave slot=3 out");
  with_port({"--device", "virtio-rng,bus=a,legacy=on"}, "leave legacy=on out");
  with_port({"--device", "virtio-rng,bus=a", "--device", "virtio-keyboard,bus=a"}, "taken by virtio-rng");
  with_port({"--device", "pcie-root-port,id=b,slot=1"}, "choose another");
}
TEST_F(BadInput, UnknownCommand) {
  refused({"fly"}, "fly");
}
TEST_F(BadInput, UnknownOption) {
  run_refused({"--turbo"}, "--turbo");
}
TEST_F(BadInput, OptionWithoutItsValue) {
  run_refused({"--cpus"}, "--cpus");
}
TEST_F(BadInput, Networks) {
  for (const auto& [text, part] : std::vector<std::pair<std::string, std::string>>{
           {"wire", "choose user, tap, stream or none"},
           {"user,color=red", "color"},
           {"user,ifname=tap0", "ifname"},
           {"user,queues=2", "only a tap has several queues"},
           {"user,mtu=20", "mtu=20"},
           {"user,mac=1:2", "mac=1:2"},
           {"user,mac=01:00:00:00:00:00", "mac=01"},
           {"user,rate=fast", "rate=fast"},
           {"user,forward=1", "--forward"},
           {"user,pcap=" + dir_ / "none/file", "pcap="},
           {"tap", "ifname=NAME"},
           {"tap,ifname=a-name-that-is-too-long", "ifname=a-name"},
           {"tap,fd=x", "fd=x"},
           {"tap,fd=333", "fd=333"},
           {"tap,ifname=t,queues=17", "queues"},
           {"stream", "listen=ADDRESS"},
           {"stream,listen=x", "HOST:PORT"},
           {"stream,listen=" + dir_ / "none/socket", "listen="},
           {"stream,listen=127.0.0.1:99999", "'99999' is not a port; give a number from 1 to 65535"},
           {"stream,listen=127.0.0.1:0", "'0' is not a port"},
           {"stream,listen=127.0.0.1:", "'' is not a port"},
           {"stream,connect=127.0.0.1:99999", "'99999' is not a port"},
           {"user,mac=00:00:00:00:00:00", "mac=00:00"},
           {"user,burst=1M", "give rate= with burst="},
           {"stream,connect=1.2.3.4:5,listen=1.2.3.4:5", "one of"},
           {"stream,connect=127.0.0.1:1,reconnect=1", "reconnect"}})
    run_refused({"--net", text}, part);
  run_refused({"--forward", "1:2:3:4"}, "--forward");
}
TEST_F(BadInput, NetworksThatContradictEachOther) {
  run_refused({"--net", "none", "--forward", "2222:22"}, "leave --net none out");
  run_refused({"--net", "none", "--net", "user"}, "'none' and a network exclude each other");
  const std::string card = "user,mac=52:54:00:12:34:56";
  run_refused({"--net", card, "--net", card}, "mac=52:54:00:12:34:56 is given twice");
}
TEST_F(BadInput, DevicesOfOneName) {
  const std::string a = file("a", std::string(4096, '\0')), b = file("b", std::string(4096, '\0'));
  run_refused({"--disk", a + ",id=x", "--disk", b + ",id=x"}, "--disk: id=x is given twice");
  run_refused({"--disk", a, "--disk", b + ",id=disk0"}, "id=disk0 is the name of a disk without one");
  run_refused({"--share", dir_.path() + ":t", "--share", dir_.path() + ":t"}, "the tag 't' is given twice");
  run_refused({"--share", dir_.path() + ":t,owner=-1:0"}, "give UID:GID");
}
TEST_F(BadInput, NumbersThatAreNone) {
  for (const char* text : {"x", "-1", ""}) {
    run_refused({"--numa-node", text}, "is not the number of a memory node; give 0, 1...");
    run_refused({"--hotplug", text}, "is not a number of slots from 0 to 8");
  }
}
TEST_F(BadInput, FilesWithACommaInTheirName) {
  run_refused({"--disk", dir_ / "a,b"}, "a: no option 'b'; there are file, format");
  run_refused({"--disk", dir_ / "a,,b"}, "a,b: cannot be opened for writing: No such file");
}
// What was typed is named, not the device that it stands for.
TEST_F(BadInput, OptionsOfOptions) {
  const std::string disk = file("disk", std::string(4096, '\0'));
  run_refused({"--disk", disk + ",queues=17"}, "--disk " + disk + ",queues=17: give a number from 0 to 16");
  run_refused({"--disk", disk + ",color=red"}, "--disk " + disk + ": no option 'color'; there are file");
  run_refused({"--disk", disk + ",readonly=maybe"}, "--disk " + disk + ",readonly=maybe: give on or off");
  run_refused({"--disk", disk + ",bus=a"}, "--disk " + disk + ",bus=a: no such port");
  run_refused({"--share", dir_.path() + ":t,readonly=1"},
              "--share " + dir_.path() + ":t,readonly=1: give on");
  run_refused({"--share", dir_.path() + ":t,owner=x"}, "--share " + dir_.path() + ":t,owner=x: give UID:GID");
  run_refused({"--net", "user,mtu=9"}, "--net user,mtu=9: give 68 to 65535");
  run_refused({"--net", "user,mac=x"}, "--net user,mac=x: give six bytes");
  run_refused({"--net", "user,ifname=tap0"}, "--net user: 'ifname' means nothing with --net user");
  run_refused({"--watchdog", "bark"}, "--watchdog bark: choose reset, poweroff or none");
  run_refused({"--vsock", "path=" + std::string(200, 'p')}, "--vsock,path=ppp");
  run_refused({"--serial", "null", "--console", "stdio", "--device", "virtio-console"},
              "--device virtio-console,console=stdio: the terminal belongs to another device");
}
TEST_F(BadInput, NoKernel) {
  refused({"run"}, "--kernel");
}
TEST_F(BadInput, DiskWithoutAKernel) {
  refused({"run", "--accel", accelerator, file("disk.raw", std::string(1 << 20, '\0'))},
          "no kernel on this disk");
  refused({"run", "--accel", accelerator, dir_ / "none.qcow2"}, "none.qcow2: cannot be opened");
  refused({"run", "--snapshot", "--kernel", LODGE_GUEST}, "--snapshot");
}
TEST_F(BadInput, MissingKernel) {
  refused({"run", "--kernel", dir_ / "none"}, "No such file");
}
TEST_F(BadInput, DirectoryAsKernel) {
  refused({"run", "--kernel", dir_.path()}, "directory");
}
TEST_F(BadInput, EmptyKernel) {
  refused({"run", "--kernel", file("empty", "")}, "--kernel");
}

TEST_F(BadInput, FileThatIsNoKernel) {
  refused({"run", "--kernel", file("text", "This is not a kernel.\n"), "--accel", accelerator}, "--kernel");
  refused({"run", "--kernel", file("zeros", std::string(1 << 20, '\0')), "--accel", accelerator}, "--kernel");
}

TEST_F(BadInput, TruncatedKernel) {
  std::ifstream good(LODGE_GUEST, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(good)), {});
  ASSERT_GT(whole.size(), 200u);
  for (const size_t size : {size_t{1}, size_t{40}, size_t{100}}) {
    refused({"run", "--kernel", file("cut", whole.substr(0, size)), "--accel", accelerator}, "--kernel");
  }
}

TEST_F(BadInput, MissingInitrd) {
  run_refused({"--initrd", dir_ / "none"}, "--initrd");
}

TEST_F(BadInput, InitrdLargerThanMemory) {
  const std::string initrd = file("initrd", "x");
  std::filesystem::resize_file(initrd, 100 << 20);  // sparse
  run_refused({"--initrd", initrd, "--memory", "64M"}, "--initrd");
}

TEST_F(BadInput, CpusOutOfRange) {
  for (const char* cpus : {"0", "256", "10000", "-1", "two"}) run_refused({"--cpus", cpus}, "--cpus");
}

TEST_F(BadInput, MemoryThatIsNoSize) {
  for (const char* size : {"lots", "0", "-5M", "1.5G", "5000K1"}) run_refused({"--memory", size}, "--memory");
}

TEST_F(BadInput, MemoryAboveTheHosts) {
  run_refused({"--memory", "1024T"}, "this host's");
  run_refused({"--memory", "99999999999999999999G"}, "--memory");
}

TEST_F(BadInput, MemoryBelowWhatAKernelNeeds) {
  run_refused({"--memory", "1M"}, "--memory");
}

TEST_F(BadInput, UnknownAccelerator) {
  refused({"run", "--kernel", LODGE_GUEST, "--accel", "xen"}, "auto, kvm or soft");
}
TEST_F(BadInput, UnknownCpu) {
  run_refused({"--cpu", "pentium"}, "x86-64-v3");
}
TEST_F(BadInput, UnknownSerial) {
  run_refused({"--serial", "tcp:80"}, "stdio, file:PATH, pty or null");
}
TEST_F(BadInput, FiveSerialPorts) {
  run_refused(
      {"--serial", "null", "--serial", "null", "--serial", "null", "--serial", "null", "--serial", "null"},
      "--serial");
}
TEST_F(BadInput, SerialFileThatCannotBeWritten) {
  run_refused({"--serial", "file:" + dir_ / "no/file"}, "--serial");
}
TEST_F(BadInput, FilesOfSerialPortsAreAsBefore) {
  const std::string old = file("old", "precious"), kernel = file("text", "This is not a kernel.\n");
  refused({"run", "--kernel", kernel, "--accel", accelerator, "--serial", "file:" + dir_ / "new", "--serial",
           "file:" + old},
          "--kernel");
  run_refused({"--serial", "file:" + dir_ / "new", "--serial", "file:" + dir_ / "no/file"}, "--serial");
  std::ifstream stream(old);
  EXPECT_EQ(std::string((std::istreambuf_iterator<char>(stream)), {}), "precious");
}
TEST_F(BadInput, UnknownDevice) {
  run_refused({"--device", "warp-drive"}, "warp-drive");
}
TEST_F(BadInput, MalformedDevice) {
  run_refused({"--device", "isa-debug-exit,port"}, "--device");
}
TEST_F(BadInput, UnknownDeviceOption) {
  run_refused({"--device", "isa-debug-exit,color=red"}, "color");
}
TEST_F(BadInput, DeviceOnPortsThatAreTaken) {
  run_refused({"--device", "isa-debug-exit,port=0x3f8"}, "0x3f8");
}
TEST_F(BadInput, BadName) {
  run_refused({"--name", "a b"}, "--name");
}
TEST_F(BadInput, UnknownShell) {
  refused({"completion", "tcsh"}, "bash, zsh or fish");
}

}  // namespace
}  // namespace lodge
