// Makes a disk with an installed Debian, without root and without loop devices: mmdebstrap installs the
// packages into a directory (as root, in a user namespace, or under fakechroot, whichever it can), mke2fs
// makes the file system of the directory, and the partition table is ours.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/end_signals.hpp"

namespace lodge::distribution {

struct DebianDisk {
  std::string suite = "bookworm", mirror;  // no mirror: deb.debian.org
  std::string hostname = "debian";
  std::string password;               // of root; empty: logged in on the console without one
  std::vector<std::string> ssh_keys;  // each a line as in authorized_keys; none: no SSH server
  std::vector<std::string> packages;  // beyond those that the system needs
  uint64_t size = 0;                  // of the disk, bytes
};

// What the user may have meant otherwise: throws UsageError naming the option.
void check(const DebianDisk& disk);

// `what` happens, `percent` of all is done.
using BuildProgress = std::function<void(std::string_view what, unsigned percent)>;

// Fills the empty file `fd`, which must be writable for everyone (as the root of a user namespace is another
// user) and should be in a directory that only its owner enters. Each line that the tools print goes to
// `log`. Throws UsageError when a tool is missing or fails, Interrupted when one of `signals` comes.
void build(const DebianDisk& disk, int fd, EndSignals& signals, const BuildProgress& progress,
           const std::function<void(std::string_view)>& log);

namespace detail {
// What is to be told of a build that has failed: the tools' own reason, or what their user should do about
// it.
std::string explain(const std::deque<std::string>& lines, const std::string& user);

// How far a build is, from the lines that mmdebstrap and apt print.
class Progress {
 public:
  explicit Progress(BuildProgress report) : report_(std::move(report)) {}
  void line(std::string_view line);

 private:
  BuildProgress report_;
  std::string what_ = "reading the package lists";
  unsigned begin_ = 0, end_ = 5;  // percent of all: this phase
  unsigned steps_ = 0, done_ = 0;
};
}  // namespace detail

}  // namespace lodge::distribution
