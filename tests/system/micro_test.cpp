// Debian's kernel on --machine micro: no PCI, VirtIO over MMIO found through ACPI, hardware-reduced power
// management.
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <nlohmann/json.hpp>

#include "system/guest.hpp"

namespace lodge {
namespace {

using testing::ContainsRegex;
using testing::Not;

class Micro : public Boot {
 protected:
  static std::vector<std::string> micro(const std::string& append, std::vector<std::string> more = {}) {
    more.insert(more.begin(), {"--machine", "micro"});
    return command("cloud", append, std::move(more));
  }
};

TEST_F(Micro, EveryDeviceWorksAndPowersOff) {
  NEEDS_GUEST("cloud");
  const TemporaryDirectory directory;
  const std::string disk = directory / "disk", port = directory / "port";
  {
    std::ofstream file(disk, std::ios::binary);
    for (uint32_t i = 0; i < 2u << 20; i++) file.put(static_cast<char>(i * 2654435761u >> 24));
  }
  const std::string sum = testing_support::run({"/usr/bin/sha256sum", disk}, Seconds(60)).out.substr(0, 64);
  Process process(micro(
      "console=ttyS0 quiet lodge.mode=shell",
      {"--cpus", "2", "--disk", disk + ",queues=2", "--net", "user", "--device", "virtio-rng", "--device",
       "virtio-balloon", "--device", "virtio-console,console=null,port1=org.lodge.test:file:" + port}));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();
  process.send(
      "sha256sum /dev/vda; dd if=/dev/hwrng bs=4096 count=4 | wc -c; echo through >/dev/$(grep -l org.lodge "
      "/sys/class/virtio-ports/*/name | cut -d/ -f5); "
      "ip link set eth0 up; udhcpc -q -n -i eth0 -s /bin/guest-dhcp; ping -c 1 10.0.2.2; "
      "cat /sys/bus/virtio/devices/*/features | cut -c35 | sort | uniq -c; grep virtio /proc/interrupts; "
      "ls /sys/bus/pci/devices | wc -l; echo script=$((40+2)); poweroff -f\n");
  ASSERT_TRUE(process.wait_output("script=42", boot_patience)) << process.out() << process.err();
  EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
  const std::string out = process.out();
  EXPECT_THAT(out, HasSubstr(sum + "  /dev/vda"));
  EXPECT_THAT(out, HasSubstr("16384"));
  EXPECT_THAT(out, HasSubstr("eth0 has 10.0.2.15"));
  EXPECT_THAT(out, HasSubstr("1 packets received"));
  EXPECT_THAT(out, ContainsRegex("5 1\r")) << "all five drivers have taken packed rings";
  EXPECT_THAT(out, ContainsRegex("IO-APIC +1[6-9]-fasteoi +virtio"));
  std::ifstream file(port);
  std::string text;
  std::getline(file, text);
  EXPECT_EQ(text, "through");
}

// Every machine has a balloon: behind MMIO it is steered and gives memory back, too.
TEST_F(Micro, TheBalloonTakesMemoryFromTheGuest) {
  NEEDS_GUEST("cloud");
  const TemporaryDirectory directory;
  const std::string path = directory / "socket";
  Process process(micro("console=ttyS0 quiet lodge.mode=shell", {"--control", path}));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();
  const auto balloon = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {LODGE_BINARY, "ctl", path, "balloon"});
    const auto result = testing_support::run(more, answer_patience);
    EXPECT_EQ(result.status, 0) << result.err;
    return nlohmann::json::parse(result.out, nullptr, false);
  };
  balloon({"200M"});
  nlohmann::json told;
  for (int i = 0; i < 600; i++, ::usleep(100'000)) {
    told = balloon({"--json"})["balloon"];
    if (told["actual"] == 200 << 20 && told["released"] >= 200 << 20) break;
  }
  EXPECT_EQ(told["actual"], 200 << 20) << told;
  EXPECT_GE(told["released"], 200 << 20) << told;
  process.send("poweroff -f\n");
  EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
}

// The guest has no driver for the button, but its event device takes the event; then it resets.
TEST_F(Micro, ThePowerButtonReachesTheGuestAndAResetTheMachine) {
  NEEDS_GUEST("cloud");
  Process process(micro("console=ttyS0 quiet lodge.mode=shell"));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();
  process.signal(SIGTERM);
  process.send(
      "until grep Ged /proc/interrupts | grep ' 1 '; do sleep 0.1; done; echo taken=$((1+1)); reboot -f\n");
  ASSERT_TRUE(process.wait_output("taken=2", answer_patience)) << process.out() << process.err();
  EXPECT_EQ(process.wait_exit(answer_patience), 4) << process.out() << process.err();
}

}  // namespace
}  // namespace lodge
