// What boots under QEMU on `lodge kvm`: firmware, boot loaders, memory tests, an installer, and kernels. All
// guests are Debian's, but for one program of ours.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <regex>

#include "preload/qemu.hpp"

namespace lodge {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using testing_support::Qemu;

const std::string firmware = LODGE_GUESTS "/firmware/";

#define NEEDS_FIRMWARE()                  \
  if (!std::filesystem::exists(firmware)) \
  GTEST_SKIP() << "guest 'firmware' is not there: run scripts/fetch-guests"

// --- BIOS: SeaBIOS, in 16-bit and 32-bit code

void reaches_grubs_menu(const std::string& machine) {
  Qemu qemu({"-machine", machine, "-m", "64M", "-nic", "none", "-cdrom", firmware + "grub.iso"});
  ASSERT_TRUE(qemu.wait_screen("Change the colors")) << qemu.screen();
  EXPECT_THAT(qemu.screen(), HasSubstr("GNU GRUB  version"));
  qemu.press({"c"});
  ASSERT_TRUE(qemu.wait_screen("grub>")) << qemu.screen();
  qemu.press({"l", "s", "ret"});
  ASSERT_TRUE(qemu.wait_screen("\\(cd\\)")) << qemu.screen();
  qemu.quit();
}

TEST(QemuFirmware, SeabiosBootsAGrubRescueCd) {
  NEEDS_FIRMWARE();
  reaches_grubs_menu("pc,kernel-irqchip=on");
}
TEST(QemuFirmware, SeabiosBootsAGrubRescueCdWithTheSplitIrqchip) {
  NEEDS_FIRMWARE();
  reaches_grubs_menu("q35,kernel-irqchip=split");
}
TEST(QemuFirmware, SeabiosBootsAGrubRescueCdWithoutAnIrqchip) {
  NEEDS_FIRMWARE();
  reaches_grubs_menu("q35,kernel-irqchip=off");
}

TEST(QemuFirmware, IpxeComesToItsPromptAndTakesAnAddress) {
  NEEDS_FIRMWARE();
  Qemu qemu({"-machine", "pc", "-m", "64M", "-nic", "user", "-cdrom", firmware + "ipxe.iso"});
  ASSERT_TRUE(qemu.wait_screen("Booting from DVD/CD"))
      << qemu.screen();  // the card's ROM asks for Ctrl-B, too
  ASSERT_TRUE(qemu.wait_screen("Press Ctrl-B for the iPXE command line")) << qemu.screen();
  qemu.press({"ctrl-b"});
  ASSERT_TRUE(qemu.wait_screen("iPXE>")) << qemu.screen();
  qemu.press({"d", "h", "c", "p", "ret"});
  ASSERT_TRUE(qemu.wait_screen("Configuring \\(net0[^)]*\\)\\.* ok")) << qemu.screen();
  qemu.quit();
}

// The last test of a pass waits twice 80 seconds for bits to fade, which has nothing to do with us.
constexpr bool without_bit_fade = true;

void completes_a_pass(bool short_pass) {
  Qemu qemu({"-machine", "pc", "-m", "20M", "-nic", "none", "-cdrom", firmware + "memtest.iso"});
  ASSERT_TRUE(qemu.wait_screen("<F1> to configure")) << qemu.screen();
  if (short_pass) {
    qemu.press({"f1"});
    ASSERT_TRUE(qemu.wait_screen("<F1>  Test selection")) << qemu.screen();
    qemu.press({"f1"});
    ASSERT_TRUE(qemu.wait_screen("<F2>  Remove one test")) << qemu.screen();
    qemu.press({"f2", "1", "0", "ret", "f10", "f10"});  // which begins
  } else {
    qemu.press({"ret"});
  }
  ASSERT_TRUE(qemu.wait_screen("Pass:  [1-9]")) << qemu.screen();
  EXPECT_THAT(qemu.screen(), HasSubstr("Errors: 0 "));
  qemu.quit();
}

TEST(QemuFirmware, MemtestCompletesAPassWithoutBitFade) {
  NEEDS_FIRMWARE();
  completes_a_pass(without_bit_fade);
}
TEST(QemuFirmware, MemtestCompletesAWholePass) {
  NEEDS_FIRMWARE();
  completes_a_pass(!without_bit_fade);
}

TEST(QemuFirmware, RealModeProgramUsesTheBios) {
  TemporaryDirectory directory;
  const std::string disk = directory / "floppy";  // written to
  std::filesystem::copy_file(LODGE_REAL_MODE, disk);
  std::filesystem::resize_file(disk, 1440 * 1024);
  Qemu qemu({"-machine", "pc", "-m", "16M", "-nic", "none", "-drive", "if=floppy,format=raw,file=" + disk});
  ASSERT_TRUE(qemu.wait_screen("press a key")) << qemu.screen();
  qemu.press({"k"});
  ASSERT_TRUE(qemu.wait_screen("real mode: ")) << qemu.screen();
  EXPECT_THAT(qemu.screen(), HasSubstr("real mode: done with k")) << qemu.screen();
  qemu.quit();
}

// --- UEFI

void reaches_the_shell(const std::string& machine) {
  TemporaryDirectory directory;
  const std::string variables = directory / "variables";
  std::filesystem::copy_file(firmware + "OVMF_VARS_4M.fd", variables);
  Qemu qemu({"-machine", machine, "-m", "256M", "-nic", "none", "-drive",
             "if=pflash,format=raw,readonly=on,file=" + firmware + "OVMF_CODE_4M.fd", "-drive",
             "if=pflash,format=raw,file=" + variables, "-trace", "kvm_set_user_memory"});
  ASSERT_TRUE(qemu.wait_serial("in 5 seconds")) << qemu.output();
  qemu.send("\x1b");
  ASSERT_TRUE(qemu.wait_serial("Shell>")) << qemu.output();
  qemu.send("echo do^ne\r");  // ^ quotes: what is typed is echoed as it is
  ASSERT_TRUE(qemu.wait_serial("done")) << qemu.output();
  EXPECT_THAT(qemu.output(), HasSubstr("flags=0x2")) << "no read-only slot";
  qemu.quit();
}

TEST(QemuFirmware, OvmfComesToItsShell) {
  NEEDS_FIRMWARE();
  reaches_the_shell("q35,smm=off");
}
TEST(QemuFirmware, OvmfComesToItsShellWithoutAnIrqchip) {
  NEEDS_FIRMWARE();
  reaches_the_shell("q35,smm=off,kernel-irqchip=off");
}

// Only code in system-management mode can write this flash. Two processors: each SMI brings both into the
// mode.
TEST(QemuFirmware, OvmfWithSecureBootWritesAVariable) {
  NEEDS_FIRMWARE();
  const std::string code = firmware + "OVMF_CODE_4M.secboot.fd";
  if (!std::filesystem::exists(code)) GTEST_SKIP() << code << " is not there: run scripts/fetch-guests";
  TemporaryDirectory directory;
  const std::string variables = directory / "variables";
  std::filesystem::copy_file(firmware + "OVMF_VARS_4M.fd", variables);
  Qemu qemu({"-machine", "q35,smm=on", "-smp", "2", "-m", "256M", "-nic", "none", "-global",
             "driver=cfi.pflash01,property=secure,value=on", "-drive",
             "if=pflash,format=raw,readonly=on,file=" + code, "-drive",
             "if=pflash,format=raw,file=" + variables});
  ASSERT_TRUE(qemu.wait_serial("in 5 seconds")) << qemu.output();
  qemu.send("\x1b");
  ASSERT_TRUE(qemu.wait_serial("Shell>")) << qemu.output();
  qemu.send("setvar Word -guid 5d0a2bb1-7c63-4be0-9fa1-1f4f6d6f6465 -nv -bs =4b45505442594c4f444745\r");
  qemu.send("echo do^ne\r");  // ^ quotes: what is typed is echoed as it is
  ASSERT_TRUE(qemu.wait_serial("done")) << qemu.output();
  qemu.quit();
  std::ifstream flash(variables, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(flash), {});
  EXPECT_THAT(bytes, HasSubstr("KEPTBYLODGE"));
}

// --- Linux

TEST(QemuLinux, DebiansInstallerComesToItsFirstDialog) {
  NEEDS_FIRMWARE();
  Qemu qemu({"-machine", "q35", "-m", "1G", "-kernel", firmware + "installer/linux", "-initrd",
             firmware + "installer/initrd.gz", "-append", "console=ttyS0 quiet"});
  ASSERT_TRUE(qemu.wait_serial("Select a language")) << qemu.output();
  qemu.quit();
}

// Kernels by QEMU's own firmware (SeaBIOS; qboot for microvm) and devices, to userland and power-off.
struct Kernel {
  const char* name;
  const char* guest;
  const char* machine;
  const char* cpus;
};

class QemuKernel : public testing::TestWithParam<Kernel> {};

TEST_P(QemuKernel, BootsToPowerOff) {
  const Kernel& kernel = GetParam();
  const std::string guest = std::string(LODGE_GUESTS) + "/" + kernel.guest;
  if (!std::filesystem::exists(guest + "/vmlinuz"))
    GTEST_SKIP() << "guest '" << kernel.guest << "' is not there: run scripts/fetch-guests";
  Qemu qemu({"-machine", kernel.machine, "-smp", kernel.cpus, "-m", "512M", "-nic", "none", "-kernel",
             guest + "/vmlinuz", "-initrd", guest + "/initramfs", "-append",
             "console=ttyS0 panic=-1 lodge.mode=report"});
  ASSERT_TRUE(qemu.wait_serial("lodge-guest: powering off")) << qemu.output();
  EXPECT_EQ(qemu.process().wait_exit(testing_support::qemu_patience), 0) << qemu.output();
  EXPECT_THAT(qemu.output(), HasSubstr(std::string("CPU:    ") + kernel.cpus));
  EXPECT_THAT(qemu.output(), HasSubstr("reboot: Power down"));  // and no panic, which would be a reset
}

// One processor without an irqchip: QEMU of Debian 12 (7.2+dfsg-7+deb12u18) never takes back a SIPI there,
// and its thread of a halted second processor spins with QEMU's lock held, whatever the accelerator.
INSTANTIATE_TEST_SUITE_P(All, QemuKernel,
                         testing::Values(Kernel{"PcOn", "cloud", "pc,kernel-irqchip=on", "2"},
                                         Kernel{"PcSplit", "cloud", "pc,kernel-irqchip=split", "2"},
                                         Kernel{"PcOff", "cloud", "pc,kernel-irqchip=off", "1"},
                                         Kernel{"Q35On", "cloud", "q35,kernel-irqchip=on", "2"},
                                         Kernel{"Q35Split", "cloud", "q35,kernel-irqchip=split", "2"},
                                         Kernel{"Q35Off", "cloud", "q35,kernel-irqchip=off", "1"},
                                         Kernel{"MicrovmOn", "cloud", "microvm,kernel-irqchip=on", "2"},
                                         Kernel{"MicrovmSplit", "cloud", "microvm,kernel-irqchip=split", "2"},
                                         Kernel{"MicrovmOff", "cloud", "microvm,kernel-irqchip=off", "1"},
                                         Kernel{"I686", "i686", "pc", "2"}),
                         [](const auto& test) { return std::string(test.param.name); });

// --- Disks: a guest copies one to another. QEMU's I/O thread is told by an ioeventfd, and tells by an irqfd.

std::string noise(size_t size) {
  std::mt19937_64 random(1);
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

class QemuDisk : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(guest_ + "/vmlinuz"))
      GTEST_SKIP() << "guest 'cloud' is not there: run scripts/fetch-guests";
  }

  // What QEMU has asked of the accelerator.
  std::string copies(const std::string& machine, const std::string& device) const {
    const std::string bytes = noise(8 << 20), from = directory_ / "from", to = directory_ / "to";
    write_file(from, bytes);
    write_file(to, std::string(bytes.size(), '\0'));
    Qemu qemu({"-machine", machine,
               "-smp",     "2",
               "-m",       "256M",
               "-nic",     "none",
               "-object",  "iothread,id=thread",
               "-drive",   "if=none,id=from,format=raw,readonly=on,file=" + from,
               "-drive",   "if=none,id=to,format=raw,file=" + to,
               "-device",  device + ",drive=from,serial=from,iothread=thread",
               "-device",  device + ",drive=to,serial=to,iothread=thread",
               "-trace",   "kvm_set_ioeventfd_*",
               "-trace",   "kvm_irqchip_*",
               "-kernel",  guest_ + "/vmlinuz",
               "-initrd",  guest_ + "/initramfs",
               "-append",  "console=ttyS0 quiet panic=-1 lodge.mode=shell"});
    EXPECT_TRUE(qemu.wait_serial("This is a shell in the guest.")) << qemu.output();
    qemu.send(
        "for d in vda vdb; do ln -s /dev/$d /$(cat /sys/block/$d/serial); done; dd if=/from of=/to bs=64k "
        "conv=fsync "
        "&& echo co''pied && poweroff -f\n");  // the quotes: the line is echoed
    EXPECT_TRUE(qemu.wait_serial("copied")) << qemu.output();
    EXPECT_EQ(qemu.process().wait_exit(testing_support::qemu_patience), 0) << qemu.output();
    std::ifstream in(to, std::ios::binary);
    EXPECT_TRUE(std::string({std::istreambuf_iterator<char>(in), {}}) == bytes) << "not what was copied";
    EXPECT_THAT(qemu.output(), Not(HasSubstr("failed")));  // to have an eventfd, and does without
    return qemu.output();
  }

 private:
  const std::string guest_ = std::string(LODGE_GUESTS) + "/cloud";
  TemporaryDirectory directory_;
};

constexpr const char* with_value = "kvm_set_ioeventfd_(pio|mmio) [^\n]* assign: 1 [^\n]* match: 1";

TEST_F(QemuDisk, AnyWriteNotifiesAndMessagesAreRouted) {
  const std::string asked = copies("q35,kernel-irqchip=split", "virtio-blk-pci");
  EXPECT_TRUE(std::regex_search(asked, std::regex("kvm_set_ioeventfd_mmio [^\n]* assign: 1 [^\n]* match: 0")))
      << asked;
  EXPECT_THAT(asked, HasSubstr("kvm_irqchip_add_msi_route"));
}
TEST_F(QemuDisk, APortsValueNotifiesAndMessagesAreRouted) {
  const std::string asked = copies("pc", "virtio-blk-pci,disable-modern=on");
  EXPECT_TRUE(std::regex_search(asked, std::regex(with_value))) << asked;
  EXPECT_THAT(asked, HasSubstr("kvm_irqchip_add_msi_route"));
}
TEST_F(QemuDisk, ARegistersValueNotifies) {
  const std::string asked = copies("microvm", "virtio-blk-device");
  EXPECT_TRUE(std::regex_search(asked, std::regex(with_value))) << asked;
}

}  // namespace
}  // namespace lodge
