#include "distribution/debian.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <deque>
#include <filesystem>

#include "base/error.hpp"
#include "distribution/scratch.hpp"
#include "distribution/scripts.hpp"
#include "distribution/tool.hpp"
#include "guestfs/partitions.hpp"

namespace lodge::distribution {
namespace {

// A system that boots, gets an address, resolves names and installs more of itself.
constexpr const char* base_packages[] = {"linux-image-cloud-amd64",
                                         "initramfs-tools",
                                         "zstd",
                                         "systemd-sysv",
                                         "systemd-resolved",
                                         "udev",
                                         "dbus",
                                         "e2fsprogs",
                                         "iproute2",
                                         "iputils-ping",
                                         "ca-certificates",
                                         "less"};
constexpr uint64_t min_size = 1ull << 30;
constexpr uint64_t alignment = 1 << 20;  // a partition starts and ends at MiB
constexpr size_t kept_lines = 200;       // of the tools' output, to find what went wrong

bool made_of(std::string_view text, std::string_view more) {
  return !text.empty() && std::ranges::all_of(text, [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || more.find(c) != std::string_view::npos;
  });
}

std::vector<std::string> command_line(const DebianDisk& disk) {
  std::vector<std::string> packages(std::begin(base_packages), std::end(base_packages));
  if (!disk.ssh_keys.empty()) packages.emplace_back("openssh-server");
  packages.insert(packages.end(), disk.packages.begin(), disk.packages.end());
  std::vector<std::string> command{find_tool("mmdebstrap", "mmdebstrap"), "--verbose", "--format=null",
                                   "--variant=minbase", "--architectures=amd64",
                                   "--skip=cleanup",  // the hook does that, before the file system is made
                                   // Whatever is there after a crash of the host is of no use to anybody.
                                   "--dpkgopt=force-unsafe-io"};
  // As in Debian's container images: the guest can install them again with its packages.
  for (const char* path : {"doc", "man", "info", "locale"})
    command.push_back(fmt::format("--dpkgopt=path-exclude=/usr/share/{}/*", path));
  command.emplace_back("--dpkgopt=path-include=/usr/share/doc/*/copyright");
  command.push_back(fmt::format("--include={}", fmt::join(packages, ",")));
  command.push_back(std::string("--essential-hook=") + debian_prepare);
  command.push_back(std::string("--customize-hook=") + debian_finish);
  command.push_back(disk.suite);
  command.emplace_back("/dev/null");
  if (!disk.mirror.empty()) command.push_back(disk.mirror);
  return command;
}

// The line that says why: the first of apt's, dpkg's or mmdebstrap's errors.
std::string reason(const std::deque<std::string>& lines) {
  for (const char* mark : {"E: ", "dpkg: error", "mke2fs: ", "__populate_fs: ", "Err:"})
    for (const auto& line : lines)
      if (line.starts_with(mark)) return line;
  return lines.empty() ? "it said nothing" : lines.back();
}

std::string user_name() {
  const passwd* const user = ::getpwuid(::geteuid());
  return user ? user->pw_name : std::to_string(::geteuid());
}

void write_at(int fd, const std::vector<uint8_t>& bytes, uint64_t offset) {
  if (::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset)) !=
      static_cast<ssize_t>(bytes.size()))
    throw_errno("the partition table cannot be written");
}

}  // namespace

void check(const DebianDisk& disk) {
  if (disk.size < min_size || disk.size % alignment != 0)
    usage_error("--size: give a multiple of 1M from 1G on; {} bytes are none", disk.size);
  if (!made_of(disk.suite, "-"))
    usage_error("--suite: '{}' is not the name of a suite, like bookworm", disk.suite);
  if (!made_of(disk.hostname, "-") || disk.hostname.size() > 63 || disk.hostname.front() == '-')
    usage_error("--hostname: '{}' is not a name of lower-case letters, digits and '-'", disk.hostname);
  for (const auto& package : disk.packages)
    if (!made_of(package, "+-.") || !made_of(package.substr(0, 1), ""))
      usage_error("--package: '{}' is not the name of a package", package);
  if (disk.password.find_first_of(":\n") != std::string::npos)
    usage_error("--password: it may not contain ':' or an end of line");
  for (const auto& key : disk.ssh_keys)
    if (key.find('\n') != std::string::npos)
      usage_error("--ssh-key: give one public key, a file like ~/.ssh/id_ed25519.pub or its text");
  if (!disk.mirror.empty() && disk.mirror.find("://") == std::string::npos)
    usage_error("--mirror: '{}' is not an address like http://deb.debian.org/debian", disk.mirror);
}

void build(const DebianDisk& disk, int fd, EndSignals& signals, const BuildProgress& progress,
           const std::function<void(std::string_view)>& log) {
  check(disk);
  find_tool("mke2fs", "e2fsprogs");
  ToolRun run{.arguments = command_line(disk), .inherited = fd};
  if (::geteuid() != 0) find_tool("newuidmap", "uidmap");
  if (::ftruncate(fd, static_cast<off_t>(disk.size)) != 0) throw_errno("the disk cannot be made so large");
  const auto table = guestfs::make_gpt(disk.size, guestfs::random_guid(), guestfs::random_guid());
  // What mmdebstrap does not clear away itself is found here. Its users, others than ours, must pass.
  const ScratchDirectory scratch(std::filesystem::temp_directory_path() / "lodge-build-XXXXXX", 0711);
  run.environment = {{"TMPDIR", scratch.path()},
                     {"LODGE_PARTUUID", table.partition.uuid},
                     {"LODGE_HOSTNAME", disk.hostname},
                     {"LODGE_PASSWORD", disk.password},
                     {"LODGE_SSH_KEYS", fmt::format("{}", fmt::join(disk.ssh_keys, "\n"))},
                     {"LODGE_OFFSET", std::to_string(table.partition.begin)},
                     {"LODGE_KIB", std::to_string(table.partition.size >> 10)}};

  std::deque<std::string> lines;
  detail::Progress phases(progress);
  bool done = false;
  const int status = run_tool(run, signals, [&](std::string_view line) {
    log(line);
    phases.line(line);
    done |= line == "lodge: done";
    lines.emplace_back(line);
    if (lines.size() > kept_lines) lines.pop_front();
  });
  if (status != 0 || !done)
    usage_error("mmdebstrap could not make the system: {}", detail::explain(lines, user_name()));
  write_at(fd, table.start, 0);
  write_at(fd, table.end, disk.size - table.end.size());
}

std::string detail::explain(const std::deque<std::string>& lines, const std::string& user) {
  std::string why = reason(lines);
  // It has tried all of its ways without root.
  if (why.find("unable to pick chroot mode") == std::string::npos) return why;
  return fmt::format(
      "user '{}' may not make user namespaces with user IDs of their own; as root, `usermod --add-subuids "
      "100000-165535 --add-subgids 100000-165535 {}`, and see `sysctl kernel.unprivileged_userns_clone`",
      user, user);
}

void detail::Progress::line(std::string_view line) {
  const auto phase = [&](const char* what, unsigned begin, unsigned end) {
    what_ = what, begin_ = begin, end_ = end, steps_ = 0, done_ = 0;
  };
  if (line.starts_with("I: downloading packages")) phase("installing the essential packages", 5, 35);
  if (line.starts_with("I: installing remaining packages")) phase("installing packages", 35, 90);
  if (line == "lodge: setting the system up") phase("setting the system up", 90, 92);
  if (line == "lodge: making the file system") phase("making the file system", 92, 95);
  // "0 upgraded, 127 newly installed, ...": each is fetched, unpacked and set up.
  const size_t comma = line.find(" upgraded, ");
  unsigned packages = 0;
  if (comma != std::string_view::npos) {
    const auto number = line.substr(comma + 11);
    if (std::from_chars(number.data(), number.data() + number.size(), packages).ec == std::errc())
      steps_ = 3 * packages, done_ = 0;
  }
  for (const char* step : {"Get:", "Unpacking ", "Setting up "})
    if (line.starts_with(step)) done_++;
  const unsigned part = steps_ == 0 ? 0 : std::min(done_, steps_) * (end_ - begin_) / steps_;
  report_(what_, begin_ + part);
}

}  // namespace lodge::distribution
