// Debian's kernel with VirtIO devices: its own drivers use each of them.
#include <fmt/format.h>
#include <unistd.h>

#include <fstream>
#include <regex>

#include "system/guest.hpp"

namespace lodge {
namespace {

using testing::ContainsRegex;

class Virtio : public Boot {
 protected:
  // Boots to a shell, types `script` (one line), and returns all that was printed until the guest has powered
  // off.
  static std::string shell(const std::string& script, std::vector<std::string> options,
                           const std::string& append = "") {
    Process process(command("cloud", "console=ttyS0 quiet lodge.mode=shell " + append, std::move(options)));
    EXPECT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
        << process.out() << process.err();
    process.send(script + "; echo script=$((40+2)); poweroff -f\n");
    EXPECT_TRUE(process.wait_output("script=42", boot_patience)) << process.out() << process.err();
    EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
    return process.out();
  }
};

// All that differs on the way: layout of the queues, kind of interrupt, age of the interface.
struct Way {
  const char* option;
  const char* append;
  const char* interrupt;  // in /proc/interrupts
};

TEST_F(Virtio, EntropyByEveryInterface) {
  NEEDS_GUEST("cloud");
  for (const Way& way :
       {Way{"virtio-rng", "", "PCI-MSI"}, Way{"virtio-rng,packed=off,legacy=off,slot=7", "", "PCI-MSI"},
        Way{"virtio-rng", "pci=nomsi", "IO-APIC"}, Way{"virtio-rng", "virtio_pci.force_legacy=1", ""}}) {
    const std::string out = shell(
        "cat /sys/class/misc/hw_random/rng_available; dd if=/dev/hwrng bs=4096 count=4 | wc -c; grep virtio "
        "/proc/interrupts; "
        "ls /sys/bus/pci/devices; echo features=$(cut -c33 /sys/bus/virtio/devices/virtio0/features)",
        {"--device", way.option}, way.append);
    EXPECT_THAT(out, HasSubstr("virtio_rng.0")) << way.option;
    EXPECT_THAT(out, HasSubstr("16384")) << way.option;
    EXPECT_THAT(out, ContainsRegex(fmt::format("{}.*virtio0", way.interrupt))) << way.option;
    const bool legacy = std::string(way.append).find("legacy") != std::string::npos;
    EXPECT_THAT(out, HasSubstr(legacy ? "features=0" : "features=1"));  // VERSION_1
    if (std::string(way.option).find("slot=7") != std::string::npos) {
      EXPECT_THAT(out, HasSubstr("0000:00:07.0"));
    }
  }
}

TEST_F(Virtio, ConsoleAndNamedPort) {
  NEEDS_GUEST("cloud");
  const std::string path = testing::TempDir() + "lodge-port-" + std::to_string(::getpid());
  Process process(command(
      "cloud", "console=hvc0 quiet lodge.mode=shell",
      {"--serial", "null", "--device", "virtio-console,console=stdio,port1=org.lodge.test:file:" + path}));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();
  process.send("tty; stty size; cat /sys/class/virtio-ports/*p1/name; echo through > /dev/vport0p1\n");
  process.send("seq 1 20000 | md5sum; seq 1 20000\n");
  process.send("echo script=$((40+2)); poweroff -f\n");
  ASSERT_TRUE(process.wait_output("script=42", boot_patience)) << process.out() << process.err();
  EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
  EXPECT_THAT(process.out(), HasSubstr("/dev/hvc0"));
  EXPECT_THAT(process.out(), HasSubstr("25 80"));
  EXPECT_THAT(process.out(), HasSubstr("org.lodge.test"));
  EXPECT_THAT(process.out(), HasSubstr("19999\r\n20000\r\n"));
  // Nothing of the 20,000 lines is lost or out of order.
  size_t at = process.out().find("\r\n1\r\n2\r\n");
  ASSERT_NE(at, std::string::npos);
  at += 2;
  for (int i = 1; i <= 20000; i++) {
    const std::string line = std::to_string(i) + "\r\n";
    ASSERT_EQ(process.out().compare(at, line.size(), line), 0) << i;
    at += line.size();
  }
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  EXPECT_EQ(text, "through");
  std::filesystem::remove(path);
}

// A file of `size` bytes that no two tests share; gone with the object.
class DiskFile {
 public:
  explicit DiskFile(uint64_t size) : path(testing::TempDir() + "lodge-disk-" + std::to_string(::getpid())) {
    std::ofstream file(path, std::ios::binary);
    uint32_t value = 1;
    for (uint64_t i = 0; i < size / 4; i++) {
      value = value * 1664525 + 1013904223;
      file.write(reinterpret_cast<const char*>(&value), sizeof value);
    }
  }
  ~DiskFile() { std::filesystem::remove(path); }
  // As the tool of this name on the host prints it.
  std::string sha256() const {
    return testing_support::run({"/usr/bin/sha256sum", path}, Seconds(60)).out.substr(0, 64);
  }
  std::string path;
};

TEST_F(Virtio, DiskIsReadAndWritten) {
  NEEDS_GUEST("cloud");
  const DiskFile disk(16 << 20);
  const std::string before = disk.sha256();
  const std::string out = shell(
      "sha256sum /dev/vda; cat /sys/block/vda/serial; dd if=/dev/vda of=/tmp/a bs=1M count=4; "
      "dd if=/tmp/a of=/dev/vda bs=64k seek=64 conv=fsync; sync; echo 3 >/proc/sys/vm/drop_caches; "
      "sha256sum /dev/vda; ls /sys/block/vda/mq",
      {"--disk", disk.path + ",serial=LODGE-1,queues=2", "--cpus", "2"});
  EXPECT_THAT(out, HasSubstr(before + "  /dev/vda"));
  EXPECT_THAT(out, HasSubstr("LODGE-1"));
  const std::string after = disk.sha256();
  EXPECT_NE(before, after);
  EXPECT_THAT(out, HasSubstr(after + "  /dev/vda"));
  EXPECT_THAT(out, ContainsRegex("0 +1"));
}

TEST_F(Virtio, ReadOnlyAndSnapshotDisksKeepTheirFile) {
  NEEDS_GUEST("cloud");
  const DiskFile disk(4 << 20);
  const std::string before = disk.sha256();
  std::string out =
      shell("cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=4k count=1 || echo refused=$((1+1))",
            {"--disk", disk.path + ",readonly"});
  EXPECT_THAT(out, HasSubstr("refused=2"));
  EXPECT_EQ(disk.sha256(), before);
  out = shell(
      "dd if=/dev/zero of=/dev/vda bs=4k conv=fsync; echo 3 >/proc/sys/vm/drop_caches; "
      "echo zeroes=$(tr -d '\\000' </dev/vda | wc -c)",
      {"--disk", disk.path + ",snapshot"});
  EXPECT_THAT(out, HasSubstr("zeroes=0"));
  EXPECT_EQ(disk.sha256(), before);
}

}  // namespace
}  // namespace lodge
