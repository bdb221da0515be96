// A real system: Debian with systemd, from the disk that `lodge image build` has made, booted by its own
// kernel.
#include <fmt/format.h>
#include <unistd.h>

#include <fstream>

#include "block/temporary_directory.hpp"
#include "system/guest.hpp"
#include "system/http_server.hpp"

namespace lodge {
namespace {

using testing_support::run;

// What is asked of the system goes to its console, as a person would type it. Shared folders and the balloon
// have their place here too.
class Debian : public Boot {
 protected:
  static std::string disk() { return guest("debian") + "/debian.qcow2"; }

  static std::vector<std::string> lodge(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), LODGE_BINARY);
    return arguments;
  }
  static void log_in(Process& process) {
    ASSERT_TRUE(process.wait_output("lodge login: ", boot_patience)) << process.out() << process.err();
    process.send("root\n");
    ASSERT_TRUE(process.wait_output("Password: ", boot_patience)) << process.out();
    process.send("lodge\n");
    ASSERT_TRUE(process.wait_output("root@lodge:~# ", boot_patience)) << process.out();
  }
  // With the key that the image was built for.
  static void log_in_by_ssh(uint16_t port) {
    if (!std::filesystem::exists("/usr/bin/ssh")) return;
    const auto ssh = run({"/usr/bin/ssh", "-i", guest("debian") + "/key", "-p", std::to_string(port), "-o",
                          "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o",
                          "UserKnownHostsFile=/dev/null", "root@127.0.0.1", "hostname"},
                         boot_patience);
    EXPECT_EQ(ssh.out, "lodge\n") << ssh.err;
  }
  // Types a command and waits for its end; `mark` is a number that no other call has.
  static void type(Process& process, const std::string& command, int mark) {
    process.send(fmt::format("{}; echo mark=$(({}+1))\n", command, mark - 1));
    ASSERT_TRUE(process.wait_output(fmt::format("mark={}", mark), boot_patience)) << process.out();
  }
};

TEST_F(Debian, WorksAndLeavesItsDiskWhole) {
  NEEDS_GUEST("debian");
  const block::TemporaryDirectory directory;
  const std::string overlay = directory / "overlay.qcow2";
  ASSERT_EQ(run(lodge({"image", "create", "--backing", disk(), overlay}), answer_patience).status, 0);
  std::string file;
  for (uint32_t i = 0; i < 1 << 20; i++) file += static_cast<char>(i * 2654435761u >> 24);
  std::ofstream(directory / "file") << file;
  const std::string sum = run({"/usr/bin/sha256sum", directory / "file"}, answer_patience).out.substr(0, 64);
  const HttpServer server(file);
  uint16_t port = 0;
  { port = HttpServer("").port(); }  // one that was free a moment ago

  Process process(lodge(
      {"run", "--accel", "soft", "--memory", "768M", "--forward", fmt::format("{}:22", port), overlay}));
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
  type(process, "systemctl is-system-running --wait; systemctl --failed", 104);
  EXPECT_THAT(process.out(), HasSubstr("0 loaded units listed")) << process.out();
  log_in_by_ssh(port);
  process.send("poweroff\n");
  EXPECT_EQ(process.wait_exit(boot_patience), 0) << process.out() << process.err();

  const auto check = run(lodge({"image", "check", overlay}), boot_patience);
  EXPECT_EQ(check.status, 0) << check.out << check.err;
  const std::string raw = directory / "disk.raw";
  ASSERT_EQ(run(lodge({"image", "convert", "--format", "raw", overlay, raw}), boot_patience).status, 0);
  const auto fsck = run({"/usr/sbin/e2fsck", "-fn", raw + "?offset=1048576"}, boot_patience);
  EXPECT_EQ(fsck.status, 0) << fsck.out << fsck.err;
}

}  // namespace
}  // namespace lodge
