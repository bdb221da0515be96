// What an option promises beside the device itself, seen from inside a guest and on the host: rate limits of
// disk and network, the MTU, a capture, and a qcow2 image whose data lie in a file of their own.
#include <fmt/format.h>

#include <cstring>
#include <fstream>
#include <regex>

#include "system/guest.hpp"
#include "system/http_server.hpp"

namespace lodge {
namespace {

constexpr size_t MiB = 1 << 20;

class Limits : public Boot {
 protected:
  std::string path(const std::string& name) const { return directory / name; }
  static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static int image(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {LODGE_BINARY, "image"});
    return testing_support::run(arguments, Seconds(60)).status;
  }
  static std::string noise(size_t size) {
    std::string data(size, '\0');
    uint32_t value = 1;
    for (char& byte : data) byte = static_cast<char>((value = value * 1664525 + 1013904223) >> 24);
    return data;
  }
  // Bytes of packets in a capture that is whole (libpcap's file format, nanoseconds).
  static size_t captured(const std::string& file) {
    const auto word = [&](size_t at) {
      uint32_t value = 0;
      std::memcpy(&value, file.data() + at, sizeof value);
      return value;
    };
    if (file.size() < 24 || word(0) != 0xa1b23c4d) return 0;
    size_t at = 24, bytes = 0;
    for (; at + 16 <= file.size() && word(at + 8) <= file.size() - at - 16; at += 16 + word(at + 8))
      bytes += word(at + 8);
    return at == file.size() ? bytes : 0;
  }
  const TemporaryDirectory directory;
};

// A limit is a lower bound of time, whatever else the host does: 4 MiB at 1 MiB a second, of which a tenth of
// a second's worth is free, take 3.9 seconds. Disk and network wait side by side.
TEST_F(Limits, RatesMtuCaptureAndADataFileOfItsOwn) {
  NEEDS_GUEST("cloud");
  const std::string contents = noise(4 * MiB);
  std::ofstream(path("raw"), std::ios::binary) << contents;
  ASSERT_EQ(image({"create", "--data-file", "data", "--raw-data", path("apart.qcow2"), "8M"}), 0);
  const HttpServer server(contents);
  Process process(command("cloud", "console=ttyS0 quiet lodge.mode=shell",
                          {"--disk", path("raw") + ",bps=1M", "--disk", path("apart.qcow2"), "--net",
                           "user,mtu=1400,rate=1M,pcap=" + path("pcap")}));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();
  process.send(fmt::format(
      "ip link set eth0 up; udhcpc -q -n -i eth0 -s /bin/guest-dhcp; echo mtu=$(cat "
      "/sys/class/net/eth0/mtu); "
      "now() {{ cut -d. -f1 /proc/uptime; }}; "
      "(s=$(now); dd if=/dev/vda of=/tmp/disk bs=64k; echo disk took $(($(now)-s))) & "
      "(s=$(now); wget -q -O /tmp/net http://10.0.2.2:{}/file; echo net took $(($(now)-s))) & wait; "
      "sha256sum /tmp/disk /tmp/net; dd if=/tmp/disk of=/dev/vdb bs=1M seek=2 conv=fsync; "
      "echo script=$((40+2)); poweroff -f\n",
      server.port()));
  ASSERT_TRUE(process.wait_output("script=42", boot_patience)) << process.out() << process.err();
  EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
  const std::string out = process.out();
  EXPECT_THAT(out, HasSubstr("mtu=1400\r"));
  for (const char* what : {"disk", "net"}) {
    std::smatch took;
    ASSERT_TRUE(std::regex_search(out, took, std::regex(std::string(what) + " took ([0-9]+)\r"))) << out;
    EXPECT_GE(std::stoi(took[1]), 3) << what;
  }
  const std::string sum =
      testing_support::run({"/usr/bin/sha256sum", path("raw")}, Seconds(60)).out.substr(0, 64);
  EXPECT_THAT(out, HasSubstr(sum + "  /tmp/disk"));
  EXPECT_THAT(out, HasSubstr(sum + "  /tmp/net"));
  EXPECT_GE(captured(read(path("pcap"))), contents.size());
  // The file with the data is the disk, byte for byte; the image has only the tables.
  const std::string data = read(path("data"));
  ASSERT_EQ(data.size(), 8 * MiB);
  EXPECT_TRUE(data.substr(2 * MiB, 4 * MiB) == contents);
  EXPECT_EQ(data.find_first_not_of('\0'), 2 * MiB + contents.find_first_not_of('\0'));
  EXPECT_LT(std::filesystem::file_size(path("apart.qcow2")), MiB);
  EXPECT_EQ(image({"check", path("apart.qcow2")}), 0);
}

}  // namespace
}  // namespace lodge
