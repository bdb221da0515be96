#include "preload/qemu.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <stdexcept>

namespace lodge::testing_support {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto pause = std::chrono::milliseconds(100);
constexpr unsigned columns = 80, lines = 25;

std::vector<std::string> command_line(const std::vector<std::string>& arguments, const std::string& socket) {
  std::vector<std::string> line = {LODGE_BINARY,
                                   "kvm",
                                   "--",
                                   "qemu-system-x86_64",
                                   "-accel",
                                   "kvm",
                                   "-display",
                                   "none",
                                   "-serial",
                                   "stdio",
                                   "-no-reboot",
                                   "-qmp",
                                   "unix:" + socket + ",server=on,wait=off"};
  line.insert(line.end(), arguments.begin(), arguments.end());
  return line;
}

// With `-accel kvm` and no /dev/kvm of the host's among its descriptors, QEMU runs on Lodge.
bool uses_the_hosts_kvm(pid_t pid) {
  std::error_code gone;
  for (const auto& entry : std::filesystem::directory_iterator(fmt::format("/proc/{}/fd", pid)))
    if (std::filesystem::read_symlink(entry.path(), gone) == "/dev/kvm") return true;
  return false;
}

}  // namespace

Qemu::Qemu(const std::vector<std::string>& arguments)
    : process_(command_line(arguments, directory_ / "qmp")) {
  connect();
  receive_line();  // the greeting
  execute("qmp_capabilities");
  if (uses_the_hosts_kvm(process_.pid())) fail("it has the host's own /dev/kvm open");
}

void Qemu::fail(const std::string& what) {
  process_.wait_exit(Seconds(1));
  throw std::runtime_error("QEMU: " + what + "\n" + output());
}

void Qemu::connect() {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, (directory_ / "qmp").c_str(), sizeof address.sun_path - 1);
  const auto end = Clock::now() + qemu_patience;
  for (;;) {
    socket_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return;
    if (Clock::now() >= end || process_.wait_exit(Seconds(0.1)) >= 0) fail("no monitor to talk to");
  }
}

std::string Qemu::receive_line() {
  for (;;) {
    if (const size_t end = received_.find('\n'); end != std::string::npos) {
      const std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      return line;
    }
    pollfd ready{socket_.get(), POLLIN, 0};
    const int timeout = static_cast<int>(std::chrono::milliseconds(std::chrono::minutes(5)).count());
    if (::poll(&ready, 1, timeout) <= 0) fail("no answer");
    std::array<char, 4096> piece;
    const ssize_t size = ::read(socket_.get(), piece.data(), piece.size());
    if (size <= 0) fail("the monitor has closed");
    received_.append(piece.data(), static_cast<size_t>(size));
  }
}

nlohmann::json Qemu::execute(std::string_view command, const nlohmann::json& arguments) {
  nlohmann::json request = {{"execute", command}};
  if (!arguments.is_null()) request["arguments"] = arguments;
  const std::string line = request.dump() + "\n";
  if (::send(socket_.get(), line.data(), line.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(line.size()))
    fail("the monitor takes no command");
  for (;;) {
    const auto answer = nlohmann::json::parse(receive_line(), nullptr, false);
    if (answer.contains("return")) return answer["return"];
    if (answer.contains("error")) fail(line + answer.dump());
  }
}

std::string Qemu::monitor(const std::string& line) {
  return execute("human-monitor-command", {{"command-line", line}}).get<std::string>();
}

std::string Qemu::screen() {
  const std::string path = directory_ / "screen";
  execute("pmemsave", {{"val", 0xb8000}, {"size", columns * lines * 2}, {"filename", path}});
  std::ifstream file(path, std::ios::binary);
  const std::string cells{std::istreambuf_iterator<char>(file), {}};
  std::string text;
  for (size_t i = 0; i + 1 < cells.size(); i += 2) {
    const auto symbol = static_cast<unsigned char>(cells[i]);
    text += symbol == 0 ? ' ' : symbol < 32 || symbol > 126 ? '?' : cells[i];
    if (i / 2 % columns == columns - 1) text += '\n';
  }
  return text;
}

bool Qemu::wait_screen(const std::string& pattern) {
  const std::regex wanted(pattern);
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(qemu_patience);
  while (!std::regex_search(screen(), wanted)) {
    if (Clock::now() >= end) return false;
    process_.wait_exit(pause);  // the guest's serial output has to be read meanwhile
  }
  return true;
}

void Qemu::press(const std::vector<std::string>& keys) {
  // QEMU holds a key for a tenth of a second and has no long queue.
  for (const std::string& key : keys) {
    monitor("sendkey " + key);
    process_.wait_exit(2 * pause);
  }
}

void Qemu::quit() {
  execute("quit");
  if (process_.wait_exit(qemu_patience) != 0) fail("no orderly end");
}

}  // namespace lodge::testing_support
