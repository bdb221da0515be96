// Debian's kernel on networks other than the user-mode one: a tap of the host's, a cable to another machine.
#include <unistd.h>

#include <fstream>
#include <regex>

#include "system/guest.hpp"

namespace lodge {
namespace {

using testing::ContainsRegex;

class Network : public Boot {
 protected:
  // Programs in a network of their own, which end with the one that starts them.
  static std::vector<std::string> in_own_network() {
    std::vector<std::string> words = {"/usr/bin/unshare", "--net", "--pid", "--fork", "--kill-child"};
    if (::getuid() != 0) words.emplace_back("--map-root-user");
    return words;
  }
  static bool host_has_taps() {
    auto words = in_own_network();
    words.insert(words.end(), {"/bin/sh", "-c", "ip tuntap add lodge0 mode tap"});
    return testing_support::run(words, Seconds(60)).status == 0;
  }
  static std::string sum_of(const std::string& path) {
    return testing_support::run({"/usr/bin/sha256sum", path}, Seconds(60)).out.substr(0, 64);
  }
  static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void expect_shell(Process& process) {
    ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
        << process.out() << process.err();
  }

  const TemporaryDirectory directory;
};

// The guest loads a file and sends it back, pings and is pinged; two pairs of queues, a capture.
TEST_F(Network, TapCarriesFilesAndPings) {
  NEEDS_GUEST("cloud");
  if (!host_has_taps()) GTEST_SKIP() << "this host permits no tap in a network namespace";
  {
    std::ofstream file(directory / "file", std::ios::binary);
    uint32_t value = 1;
    for (unsigned i = 0; i < (4 << 20) / 4; i++) {
      value = value * 1664525 + 1013904223;
      file.write(reinterpret_cast<const char*>(&value), sizeof value);
    }
  }
  const std::string script =
      "cd '" + directory.path() +
      "' && ip tuntap add lodge0 mode tap vnet_hdr multi_queue && ip addr add 10.77.0.1/24 dev lodge0 && "
      "ip link set lodge0 up || exit 99\n"
      "busybox httpd -f -p 10.77.0.1:8080 -h . &\n"
      // A listener whose input ends would end the connection.
      "sleep 10000 | busybox nc -l -p 9000 >back &\n"
      "(until busybox ping -c 2 -W 5 10.77.0.2 >ping 2>&1 && grep -q '2 packets received' ping; do sleep 1; "
      "done; touch pinged) &\n"
      "\"$@\"";
  auto words = in_own_network();
  words.insert(words.end(), {"/bin/sh", "-c", script, "sh"});
  const auto lodge =
      command("cloud", "console=ttyS0 quiet lodge.mode=shell",
              {"--cpus", "2", "--net", "tap,ifname=lodge0,queues=2,pcap=" + directory / "pcap"});
  words.insert(words.end(), lodge.begin(), lodge.end());
  Process process(words);
  expect_shell(process);
  process.send(
      "ip addr add 10.77.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 10.77.0.1; "
      "wget -q -O /tmp/file http://10.77.0.1:8080/file; sha256sum /tmp/file; nc 10.77.0.1 9000 </tmp/file; "
      "ls /sys/class/net/eth0/queues; ping -c 3 10.77.0.1; "
      "until wget -q -O /dev/null http://10.77.0.1:8080/pinged; do sleep 1; done; "
      "echo script=$((40+2)); poweroff -f\n");
  ASSERT_TRUE(process.wait_output("script=42", boot_patience)) << process.out() << process.err();
  EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
  const std::string sum = sum_of(directory / "file");
  EXPECT_THAT(process.out(), HasSubstr(sum + "  /tmp/file"));
  EXPECT_EQ(sum_of(directory / "back"), sum);
  EXPECT_THAT(process.out(), HasSubstr("3 packets received"));
  EXPECT_THAT(process.out(), ContainsRegex("rx-1"));
  EXPECT_THAT(read(directory / "ping"), HasSubstr("2 packets received"));
  const std::string captured = read(directory / "pcap");
  EXPECT_GT(captured.size(), size_t{8} << 20);
  EXPECT_EQ(captured.substr(0, 4), "\x4d\x3c\xb2\xa1");
}

TEST_F(Network, TwoMachinesOverAStream) {
  NEEDS_GUEST("cloud");
  const std::string address = directory / "cable";
  const auto start = [&](const std::string& end) {
    return command(
        "cloud", "console=ttyS0 quiet lodge.mode=shell",
        {"--memory", "256M", "--net", "stream," + end + "=" + address + ",mtu=9000,reconnect=100"});
  };
  Process first(start("listen")), second(start("connect"));
  expect_shell(first);
  expect_shell(second);
  first.send(
      "ip addr add 10.88.0.1/24 dev eth0; ip link set eth0 up; echo up=$((1+1)); nc -l -p 7000 >/tmp/got; "
      "sha256sum /tmp/got; echo script=$((40+2)); poweroff -f\n");
  ASSERT_TRUE(first.wait_output("up=2", boot_patience)) << first.out();
  second.send(
      "ip addr add 10.88.0.2/24 dev eth0; ip link set eth0 up; "
      "dd if=/dev/urandom of=/tmp/sent bs=1M count=4; sha256sum /tmp/sent; "
      "until ping -c 1 -W 2 10.88.0.1; do sleep 1; done; sleep 1; nc 10.88.0.1 7000 </tmp/sent; "
      "cat /sys/class/net/eth0/mtu; echo script=$((40+2)); poweroff -f\n");
  for (Process* process : {&second, &first}) {
    ASSERT_TRUE(process->wait_output("script=42", boot_patience)) << process->out() << process->err();
    EXPECT_EQ(process->wait_exit(answer_patience), 0) << process->out() << process->err();
  }
  const std::regex sum("([0-9a-f]{64})  /tmp/(got|sent)");
  std::smatch got, sent;
  ASSERT_TRUE(std::regex_search(first.out(), got, sum)) << first.out();
  ASSERT_TRUE(std::regex_search(second.out(), sent, sum)) << second.out();
  EXPECT_EQ(got[1], sent[1]);
  EXPECT_THAT(second.out(), HasSubstr("9000\r\n"));
}

}  // namespace
}  // namespace lodge
