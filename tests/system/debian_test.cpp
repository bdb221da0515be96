// A real system: Debian with systemd, from the disk that `lodge image build` has made, booted by its own
// kernel.
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

#include "base/temporary_directory.hpp"
#include "guestfs/iso9660.hpp"
#include "system/guest.hpp"
#include "system/http_server.hpp"

namespace lodge {
namespace {

using testing_support::run;

// What is asked of the system goes to its console, as a person would type it.
class Debian : public Boot {
 protected:
  static std::string disk() { return guest("debian") + "/debian.qcow2"; }
  // A disk of its own for one test, with what `name`'s has.
  static void make_overlay(const std::string& name, const std::string& overlay) {
    const auto made =
        run(lodge({"image", "create", "--backing", guest(name) + "/debian.qcow2", overlay}), answer_patience);
    ASSERT_EQ(made.status, 0) << made.err;
  }

  static std::vector<std::string> lodge(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), LODGE_BINARY);
    return arguments;
  }
  static void log_in(Process& process, const std::string& hostname = "lodge") {
    ASSERT_TRUE(process.wait_output(hostname + " login: ", boot_patience)) << process.out() << process.err();
    process.send("root\n");
    ASSERT_TRUE(process.wait_output("Password: ", boot_patience)) << process.out();
    process.send("lodge\n");
    ASSERT_TRUE(process.wait_output("root@" + hostname + ":~# ", boot_patience)) << process.out();
  }
  // With the key that was made for the guest `name`.
  static void log_in_by_ssh(uint16_t port, const std::string& name = "debian",
                            const std::string& hostname = "lodge") {
    if (!std::filesystem::exists("/usr/bin/ssh")) return;
    const auto ssh = run(
        {"/usr/bin/ssh", "-i", guest(name) + "/key", "-p", std::to_string(port), "-o", "BatchMode=yes", "-o",
         "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@127.0.0.1", "hostname"},
        boot_patience);
    EXPECT_EQ(ssh.out, hostname + "\n") << ssh.err;
  }
  // A port of the host's that was free a moment ago.
  static uint16_t free_port() { return HttpServer("").port(); }
  // Bytes that the host's file system holds for a file.
  static uint64_t held_for(const std::string& path) {
    struct stat status {};
    return ::stat(path.c_str(), &status) == 0 ? static_cast<uint64_t>(status.st_blocks) * 512 : UINT64_MAX;
  }
  // Types a command and waits for its end; `mark` is a number that no other call has.
  static void type(Process& process, const std::string& command, int mark) {
    process.send(fmt::format("{}; echo mark=$(({}+1))\n", command, mark - 1));
    ASSERT_TRUE(process.wait_output(fmt::format("mark={}", mark), boot_patience)) << process.out();
  }

  // A folder of the host's, both ways.
  static void share(Process& process, const std::string& folder) {
    std::ofstream(folder + "/from-host") << "to the guest\n";
    type(process,
         "mkdir -p /shared; mount -t virtiofs tag /shared && cat /shared/from-host; "
         "echo to the host >/shared/from-guest; umount /shared",
         301);
    EXPECT_THAT(process.out(), HasSubstr("\rto the guest\r"));
    std::string line;
    std::ifstream file(folder + "/from-guest");
    std::getline(file, line);
    EXPECT_EQ(line, "to the host");
  }

  // The guest's driver says that it does without memory, and that it has it back.
  static void balloon(const std::string& socket) {
    const auto inflate = [&](const std::string& size) {
      const std::string wanted = fmt::format("actual      {} MiB", size);
      EXPECT_EQ(run(lodge({"ctl", socket, "balloon", size + "M"}), answer_patience).status, 0);
      std::string shown;
      for (int i = 0; i < 600 && shown.find(wanted) == std::string::npos; i++) {
        shown = run(lodge({"ctl", socket, "balloon"}), answer_patience).out;
        ::usleep(100'000);
      }
      EXPECT_THAT(shown, HasSubstr(wanted));
    };
    inflate("128");
    inflate("0");
  }

  // Files come and go on the overlay's file system and on one that is made on the third disk, which is raw:
  // fstrim gives their space back to the host.
  static void trim(Process& process, const std::string& overlay, const std::string& raw) {
    constexpr uint64_t MiB = 1 << 20, written = 24 * MiB, metadata = 4 * MiB;  // what else changes meanwhile
    type(process, "mkfs.ext4 -q -E nodiscard /dev/vdc; mount /dev/vdc /mnt; sync; fstrim /; sync", 201);
    const uint64_t before[] = {held_for(overlay), held_for(raw)};
    type(process, "for d in /var/tmp /mnt; do dd if=/dev/urandom of=$d/big bs=1M count=24; done; sync", 202);
    const uint64_t full[] = {held_for(overlay), held_for(raw)};
    type(process, "rm /var/tmp/big /mnt/big; sync; fstrim / && fstrim /mnt; echo trim=$?; sync; umount /mnt",
         203);
    EXPECT_THAT(process.out(), HasSubstr("trim=0"));
    for (size_t i = 0; i < 2; i++) {
      EXPECT_GE(full[i] + metadata, before[i] + written) << i;
      EXPECT_LE(held_for(i == 0 ? overlay : raw), full[i] - written + metadata) << i;
    }
  }
};

// As cloud-init's settings come on: Linux reads what this tree writes.
void write_volume(const std::string& path) {
  const auto volume = guestfs::make_iso9660("CIDATA", {{"user-data", "two\n"}, {"meta-data", "one\n"}});
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(volume.data()), static_cast<std::streamsize>(volume.size()));
}

TEST_F(Debian, WorksAndLeavesItsDiskWhole) {
  NEEDS_GUEST("debian");
  const TemporaryDirectory directory;
  const std::string overlay = directory / "overlay.qcow2";
  make_overlay("debian", overlay);
  std::string file;
  for (uint32_t i = 0; i < 1 << 20; i++) file += static_cast<char>(i * 2654435761u >> 24);
  std::ofstream(directory / "file") << file;
  const std::string sum = run({"/usr/bin/sha256sum", directory / "file"}, answer_patience).out.substr(0, 64);
  const HttpServer server(file);
  const uint16_t port = free_port();
  const std::string volume = directory / "volume";
  write_volume(volume);

  const std::string third = directory / "third.raw";
  ASSERT_EQ(run(lodge({"image", "create", "--format", "raw", third, "64M"}), answer_patience).status, 0);

  const std::string folder = directory / "folder", socket = directory / "socket";
  std::filesystem::create_directory(folder);

  Process process(lodge({"run", "--accel", accelerator(), "--memory", "768M", "--forward",
                         fmt::format("{}:22", port), "--disk", volume + ",readonly", "--disk", third,
                         "--share", folder + ":tag", "--control", socket, overlay}));
  log_in(process);
  type(process, "for i in $(seq 300); do ip -4 -o address | grep 10.0.2.15 && break; sleep 0.2; done", 101);
  type(process, fmt::format("wget -q -O file http://10.0.2.2:{}/file; sha256sum file", server.port()), 102);
  EXPECT_THAT(process.out(), HasSubstr("inet 10.0.2.15/24"));
  EXPECT_THAT(process.out(), HasSubstr(sum + "  file"));
  type(process,
       "fio --name=verify --filename=/var/tmp/verify --size=8M --rw=randwrite --bs=4k --verify=crc32c "
       "--do_verify=1 --end_fsync=1 >fio.log; echo fio=$?; rm /var/tmp/verify",
       103);
  EXPECT_THAT(process.out(), HasSubstr("fio=0"));
  type(process,
       "blkid -o value -s LABEL /dev/vdb; mount -o ro /dev/vdb /mnt && (cd /mnt; cat *; echo *); umount /mnt",
       105);
  EXPECT_THAT(process.out(), HasSubstr("CIDATA\r\none\r\ntwo\r\nmeta-data user-data"));
  type(process, "systemctl is-system-running --wait; systemctl --failed", 104);
  EXPECT_THAT(process.out(), HasSubstr("0 loaded units listed")) << process.out();
  log_in_by_ssh(port);
  trim(process, overlay, third);
  share(process, folder);
  balloon(socket);
  process.send("poweroff\n");
  EXPECT_EQ(process.wait_exit(boot_patience), 0) << process.out() << process.err();

  const auto check = run(lodge({"image", "check", overlay}), boot_patience);
  EXPECT_EQ(check.status, 0) << check.out << check.err;
  const std::string raw = directory / "disk.raw";
  ASSERT_EQ(run(lodge({"image", "convert", "--format", "raw", overlay, raw}), boot_patience).status, 0);
  const auto fsck = run({"/usr/sbin/e2fsck", "-fn", raw + "?offset=1048576"}, boot_patience);
  EXPECT_EQ(fsck.status, 0) << fsck.out << fsck.err;
}

// With the guest of `scripts/fetch-guests cloud-init`, which is not fetched unasked.
TEST_F(Debian, CloudInitTakesItsSettings) {
  NEEDS_GUEST("cloud-init");
  const TemporaryDirectory directory;
  const std::string overlay = directory / "overlay.qcow2", key = guest("cloud-init") + "/key.pub";
  make_overlay("cloud-init", overlay);
  const uint16_t port = free_port();
  {
    Process process(lodge({"run", "--accel", accelerator(), "--memory", "768M", "--forward",
                           fmt::format("{}:22", port), "--hostname", "web", "--ssh-key", key, "--run",
                           "echo \"it: ran\" >>/root/ran", "--run", "echo twice >>/root/ran", overlay}));
    log_in(process, "web");
    type(process,
         "until [ -e /run/cloud-init/result.json ]; do sleep 0.2; done; cat ran; grep -a WARNING "
         "/var/log/cloud-init.log || echo no complaints",
         201);
    EXPECT_THAT(process.out(), HasSubstr("it: ran\r\ntwice\r\nno complaints\r\n"));
    log_in_by_ssh(port, "cloud-init", "web");
    process.send("poweroff\n");
    EXPECT_EQ(process.wait_exit(boot_patience), 0) << process.out() << process.err();
  }
  // Other settings are applied to the same disk, and none are needed for what is set already.
  const std::string user_data = directory / "user-data";
  std::ofstream(user_data)
      << "#cloud-config\nwrite_files: [{path: /root/written, content: \"by cloud-init\\n\"}]\n";
  Process process(lodge({"run", "--accel", accelerator(), "--memory", "768M", "--hostname", "other",
                         "--user-data", user_data, overlay}));
  log_in(process, "other");
  type(process, "until [ -e /run/cloud-init/result.json ]; do sleep 0.2; done; cat ran written", 202);
  EXPECT_THAT(process.out(), HasSubstr("it: ran\r\ntwice\r\nby cloud-init\r\n"));
  process.send("poweroff\n");
  EXPECT_EQ(process.wait_exit(boot_patience), 0) << process.out() << process.err();
}

}  // namespace
}  // namespace lodge
