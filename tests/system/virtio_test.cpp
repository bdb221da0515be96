// Debian's kernel with VirtIO devices: its own drivers use each of them.
#include <fmt/format.h>

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

}  // namespace
}  // namespace lodge
