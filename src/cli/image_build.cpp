// lodge image build: a disk with an installed Debian.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/end_signals.hpp"
#include "base/error.hpp"
#include "base/fd.hpp"
#include "cli/commands.hpp"
#include "cli/image_report.hpp"
#include "cli/seed_options.hpp"
#include "distribution/scratch.hpp"

namespace lodge::cli {
namespace {

namespace fs = std::filesystem;

// A bar that is drawn over and over on a terminal; elsewhere a line for each thing that begins.
class Bar {
 public:
  explicit Bar(bool quiet) : quiet_(quiet), terminal_(::isatty(STDERR_FILENO) == 1) {}
  ~Bar() {
    if (terminal_ && !what_.empty()) std::fputs("\r\033[K", stderr);
  }
  Bar(const Bar&) = delete;
  Bar& operator=(const Bar&) = delete;

  void show(std::string_view what, unsigned percent) {
    if (quiet_ || (what == what_ && (!terminal_ || percent == percent_))) return;
    constexpr unsigned width = 40;
    const unsigned filled = percent * width / 100;
    if (terminal_)
      fmt::print(stderr, "\r\033[K[{:=<{}}{: <{}}] {:3} %  {}", "", filled, "", width - filled, percent,
                 what);
    else
      fmt::print(stderr, "lodge: {}\n", what);
    std::fflush(stderr);
    what_ = what, percent_ = percent;
  }

 private:
  bool quiet_, terminal_;
  std::string what_;
  unsigned percent_ = 0;
};

// A directory that only we enter, beside what is made: the disk is as large as the file system allows.
distribution::ScratchDirectory work_directory(const std::string& output) {
  try {
    return {fs::path(output).parent_path() / ".lodge-build-XXXXXX", 0700};
  } catch (const std::system_error& error) {
    usage_error("--output {}: no file can be made there: {}", output, error.code().message());
  }
}

}  // namespace

int build_image(const ImageCommand& command) {
  distribution::DebianDisk disk = command.disk;
  if (!command.ssh_key.empty()) disk.ssh_keys = read_keys(command.ssh_key);
  disk.size = command.size;
  distribution::check(disk);
  if (fs::exists(command.file))
    usage_error("--output {}: is there already; remove it or choose another name", command.file);
  EndSignals signals;
  const auto work = work_directory(command.file);
  const std::string raw = work / "disk.raw";
  {
    const Fd fd(::open(raw.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!fd || ::fchmod(fd.get(), 0666) != 0) throw_errno(raw);
    Bar bar(command.verbose);
    distribution::build(
        disk, fd.get(), signals, [&](std::string_view what, unsigned percent) { bar.show(what, percent); },
        [&](std::string_view line) {
          if (command.verbose) fmt::print(stderr, "{}\n", line);
        });
    ::fchmod(fd.get(), 0644);
  }
  if (command.format == "raw") {
    if (::renameat2(AT_FDCWD, raw.c_str(), AT_FDCWD, command.file.c_str(), RENAME_NOREPLACE) != 0)
      throw_errno("--output " + command.file);
  } else {
    ImageCommand convert = command;
    convert.action = ImageCommand::Action::convert;
    convert.file = raw;
    convert.target = command.file;
    convert.source_format = "raw";
    convert.while_copying = [&] { signals.check(); };
    return image(convert);
  }
  if (command.json) fmt::print("{}\n", image_info(command.file, command.format).dump(2));
  return 0;
}

}  // namespace lodge::cli
