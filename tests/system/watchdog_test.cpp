// Debian's own driver for ACPI's watchdog.
#include "system/guest.hpp"

namespace lodge {
namespace {

class Watchdog : public Boot {};

TEST_F(Watchdog, ExpiresAndCanBeStopped) {
  NEEDS_GUEST("cloud");
  Process process(
      command("cloud", "console=ttyS0 quiet lodge.mode=shell wdat_wdt.timeout=4", {"--watchdog", "reset"}));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();
  // A "V" before the device is closed stops it.
  process.send(
      "cat /sys/class/watchdog/watchdog0/identity; echo -n V >/dev/watchdog0; sleep 6; echo "
      "alive=$((1+1))\n");
  ASSERT_TRUE(process.wait_output("alive=2", answer_patience)) << process.out();
  EXPECT_THAT(process.out(), HasSubstr("wdat_wdt"));
  process.send("echo -n x >/dev/watchdog0; echo started=$((1+2))\n");
  ASSERT_TRUE(process.wait_output("started=3", answer_patience)) << process.out();
  EXPECT_EQ(process.wait_exit(answer_patience), 4)
      << process.out() << process.err();  // a reset, with --no-reboot
}

}  // namespace
}  // namespace lodge
