// lodge image: make, examine and change disk images.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "block/chain.hpp"
#include "block/copy.hpp"
#include "block/qcow2/check.hpp"
#include "block/qcow2/create.hpp"
#include "cli/commands.hpp"
#include "cli/image_report.hpp"

namespace lodge::cli {
namespace {

using block::qcow2::Qcow2Image;

constexpr int damage_status = 1, leaks_status = 3;

// A line on stderr that is written over and over, at most ten times a second.
class ProgressLine {
 public:
  ProgressLine(const ImageCommand& command, const char* what)
      : what_(what),
        terminal_(::isatty(STDERR_FILENO) == 1),
        shown_(terminal_ || command.progress),
        check_(command.while_copying) {}
  ~ProgressLine() {
    if (drawn_ && terminal_) std::fputs("\r\033[K", stderr);
  }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  block::Progress callback() {
    if (!shown_ && !check_) return nullptr;
    return [this](uint64_t done, uint64_t all) {
      if (check_) check_();
      if (!shown_) return;
      const auto now = std::chrono::steady_clock::now();
      if (now - last_ < std::chrono::milliseconds(100) && done < all) return;
      last_ = now;
      drawn_ = true;
      const unsigned percent = all == 0 ? 100 : static_cast<unsigned>(done * 100 / all);
      if (terminal_)
        fmt::print(stderr, "\r\033[Klodge: {} {:3} %", what_, percent);
      else
        fmt::print(stderr, "lodge: {} {} %\n", what_, percent);
      std::fflush(stderr);
    };
  }

 private:
  const char* what_;
  bool terminal_, shown_, drawn_ = false;
  std::function<void()> check_;
  std::chrono::steady_clock::time_point last_{};
};

// A file that is new, and goes away again when what it is for does not come about.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path) {
    fd_.reset(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
    if (fd_) return;
    if (errno == EEXIST) usage_error("{}: is there already; remove it or choose another name", path);
    usage_error("{}: cannot be made: {}", path, std::generic_category().message(errno));
  }
  ~NewFile() {
    if (!kept_) ::unlink(path_.c_str());
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  int fd() const { return fd_.get(); }
  void keep() { kept_ = true; }

 private:
  std::string path_;
  Fd fd_;
  bool kept_ = false;
};

void require(int error, const std::string& what) {
  if (error) throw_errno(error, what);
}

std::unique_ptr<block::Image> open(const std::string& path, const std::string& format, bool read_only,
                                   bool backing = true) {
  block::OpenOptions options;
  options.format = format;
  options.read_only = read_only;
  options.backing = backing;
  return block::open_image(path, options);
}

// A qcow2 image for commands that are about qcow2 only.
class OpenQcow2 {
 public:
  OpenQcow2(const std::string& path, bool read_only, bool backing = true)
      : image_(open(path, "qcow2", read_only, backing)) {}
  Qcow2Image* operator->() const { return dynamic_cast<Qcow2Image*>(image_.get()); }
  Qcow2Image& operator*() const { return *operator->(); }

 private:
  std::unique_ptr<block::Image> image_;
};

// The backing file as the new image will find it: names are relative to the image's own directory.
std::unique_ptr<block::Image> open_backing(const std::string& image, const std::string& name,
                                           const std::string& format) {
  return open(block::backing_path(image, name), format, true);
}

void make(const ImageCommand& c, const std::string& path, uint64_t size, const NewFile& file, NewFile* data) {
  const std::string format = c.format.empty() ? "qcow2" : c.format;
  if (format == "raw") {
    if (::ftruncate(file.fd(), static_cast<off_t>(size)) != 0) throw_errno(path);
    if (c.preallocation == "full") require(::posix_fallocate(file.fd(), 0, static_cast<off_t>(size)), path);
    return;
  }
  if (c.preallocation != "off") usage_error("--preallocation full is for raw images");
  block::qcow2::CreateOptions options;
  options.size = size;
  options.version = c.version;
  options.cluster_bits = c.cluster_bits;
  options.refcount_order = c.refcount_order;
  options.lazy_refcounts = c.lazy_refcounts;
  options.extended_l2 = c.subclusters;
  options.compression = c.zstd ? block::qcow2::Compression::zstd : block::qcow2::Compression::zlib;
  options.backing_file = c.backing;
  options.backing_format = c.backing_format;
  options.data_file = c.data_file;
  options.raw_data = c.raw_data;
  block::FileStorage storage(Fd::duplicate(file.fd()), path, block::Use::write,
                             block::make_engine(block::Engine::threads));
  block::qcow2::create(storage, options);
  if (data && c.raw_data && ::ftruncate(data->fd(), static_cast<off_t>(size)) != 0) throw_errno(c.data_file);
}

std::optional<NewFile> make_data_file(const ImageCommand& c, const std::string& image) {
  if (c.data_file.empty()) return std::nullopt;
  const std::string path = block::backing_path(image, c.data_file);
  // Whoever opens the image refuses another place.
  if (!block::in_same_directory(image, path))
    usage_error(
        "--data-file: '{}' would not be in the directory of {}, as an image's data file must be; give a name "
        "without a directory",
        c.data_file, image);
  return std::optional<NewFile>(std::in_place, path);
}

int create(ImageCommand c) {
  uint64_t size = c.size;
  if (c.backing) {
    const auto backing = open_backing(c.file, *c.backing, c.backing_format);
    if (size == 0) size = backing->size();
    if (c.backing_format.empty()) c.backing_format = backing->format();
  }
  NewFile file(c.file);
  auto data = make_data_file(c, c.file);
  make(c, c.file, size, file, data ? &*data : nullptr);
  file.keep();
  if (data) data->keep();
  if (c.json) fmt::print("{}\n", image_info(c.file, c.format).dump(2));
  return 0;
}

int convert(ImageCommand c) {
  const auto from = open(c.file, c.source_format, true);
  if (c.backing && c.backing_format.empty())
    c.backing_format = open_backing(c.target, *c.backing, c.backing_format)->format();
  NewFile file(c.target);
  auto data = make_data_file(c, c.target);
  make(c, c.target, from->size(), file, data ? &*data : nullptr);
  {
    const auto to = open(c.target, c.format.empty() ? "qcow2" : c.format, false);
    ProgressLine line(c, "copying");
    // Over a backing file only what differs from it is copied.
    if (c.backing)
      block::copy_difference(*from, *to, line.callback());
    else
      block::copy_contents(*from, *to, c.compress, line.callback());
    require(to->close(), c.target + ": cannot be closed");
  }
  file.keep();
  if (data) data->keep();
  if (c.json) fmt::print("{}\n", image_info(c.target, "").dump(2));
  return 0;
}

int check(const ImageCommand& c) {
  using block::qcow2::Repair;
  const Repair repair = c.repair == "all" ? Repair::all : c.repair == "leaks" ? Repair::leaks : Repair::none;
  const auto use = repair == Repair::none ? block::Use::read : block::Use::write;
  block::FileStorage storage(c.file, use, true, block::make_engine(block::Engine::threads));
  ProgressLine line(c, "checking");
  const auto result = block::qcow2::check(storage, repair, line.callback());
  if (c.json)
    fmt::print("{}\n", check_json(c.file, result).dump(2));
  else
    fmt::print("{}", check_text(result));
  if (result.left() != 0) return damage_status;
  return result.leaks > result.leaks_fixed ? leaks_status : 0;
}

// Why an image has refused another size.
const char* what_fixes_size(const block::Image& image) {
  const auto* qcow2 = dynamic_cast<const Qcow2Image*>(&image);
  if (!qcow2) return "a format that does not know it";
  if (qcow2->header().extension(block::qcow2::extension_bitmaps)) return "bitmaps";
  if (qcow2->header().version < 3 && !qcow2->snapshots().empty()) return "snapshots, and is of version 2";
  return "a backing file larger than itself";
}

int resize(const ImageCommand& c) {
  const auto image = open(c.file, c.format, false);
  const uint64_t old = image->size();
  if (c.sign == '-' && c.size > old) usage_error("{}: has only {} bytes", c.file, old);
  const uint64_t size = c.sign == '+' ? old + c.size : c.sign == '-' ? old - c.size : c.size;
  if (size % 512 != 0) usage_error("{}: a disk's size is a multiple of 512 bytes", c.file);
  if (size < old && !c.shrink)
    usage_error("{}: has {} bytes; what lies behind the new end would be lost, add --shrink to allow that",
                c.file, old);
  const int error = block::resize(*image, size);
  if (error == ENOTSUP)
    usage_error("{}: cannot be resized: it has {}; copy it with 'lodge image convert' first", c.file,
                what_fixes_size(*image));
  require(error, c.file + ": cannot be resized");
  require(image->close(), c.file + ": cannot be closed");
  if (c.json) fmt::print("{}\n", image_info(c.file, c.format).dump(2));
  return 0;
}

int snapshot(const ImageCommand& c) {
  const bool change = !c.create_name.empty() || !c.apply_name.empty() || !c.delete_name.empty();
  const OpenQcow2 image(c.file, !change, false);
  const std::string& name = !c.create_name.empty()  ? c.create_name
                            : !c.apply_name.empty() ? c.apply_name
                                                    : c.delete_name;
  if (change) {
    const int error = !c.create_name.empty()  ? image->create_snapshot(name)
                      : !c.apply_name.empty() ? image->apply_snapshot(name)
                                              : image->delete_snapshot(name);
    if (error == EEXIST)
      usage_error("{}: has a snapshot '{}' already; delete it or choose another name", c.file, name);
    if (error == ENOENT)
      usage_error("{}: has no snapshot '{}'; see 'lodge image snapshot --list'", c.file, name);
    if (error == ENOTSUP) usage_error("{}: has an external data file or bitmaps, which exclude that", c.file);
    if (error == EOVERFLOW)
      usage_error(
          "{}: its reference counts are too narrow for another snapshot; 'lodge image convert' makes "
          "a copy with wider ones",
          c.file);
    if (error == EINVAL) usage_error("{}: has as many snapshots as an image can have; delete some", c.file);
    require(error, fmt::format("{}: snapshot '{}'", c.file, name));
    require(image->close(), c.file + ": cannot be closed");
  }
  if (c.json)
    fmt::print("{}\n", snapshots_json(image->snapshots()).dump(2));
  else if (!change)
    fmt::print("{}", snapshots_text(image->snapshots()));
  return 0;
}

// Before anything is open: the image would wait for its own lock.
void refuse_own_backing(const ImageCommand& c) {
  const std::string path = block::backing_path(c.file, *c.backing);
  const auto refuse_itself = [&](const std::string& file) {
    std::error_code error;
    if (std::filesystem::equivalent(file, c.file, error))
      usage_error("{}: cannot be its own backing file{}; choose another", c.file,
                  file == path ? "" : ", nor lie behind that");
  };
  refuse_itself(path);
  if (c.unsafe && !c.backing_format.empty()) return;  // the file need not be there yet
  for (const auto& image : image_chain(path, c.backing_format, true))
    refuse_itself(image["file"].get<std::string>());
}

int rebase(const ImageCommand& c) {
  if (c.backing) refuse_own_backing(c);
  const OpenQcow2 image(c.file, false, !c.unsafe);
  std::unique_ptr<block::Image> backing;
  std::string format = c.backing_format;
  if (c.backing && (!c.unsafe || format.empty())) {
    backing = open_backing(c.file, *c.backing, format);
    format = backing->format();
  }
  if (!c.unsafe) {
    ProgressLine line(c, "comparing");
    block::keep_contents(*image, backing.get(), line.callback());
  }
  require(image->set_backing(c.backing, format), c.file + ": cannot be written");
  require(image->close(), c.file + ": cannot be closed");
  if (c.json) fmt::print("{}\n", image_info(c.file, "qcow2").dump(2));
  return 0;
}

int info(const ImageCommand& c) {
  const auto chain = image_chain(c.file, c.format, c.chain);
  if (c.json)
    fmt::print("{}\n", (c.chain ? nlohmann::json(chain) : chain.front()).dump(2));
  else
    for (const auto& image : chain)
      fmt::print("{}{}", &image == &chain.front() ? "" : "\n", info_text(image));
  return 0;
}

}  // namespace

int image(const ImageCommand& command) {
  switch (command.action) {
    case ImageCommand::Action::create: return create(command);
    case ImageCommand::Action::info: return info(command);
    case ImageCommand::Action::check: return check(command);
    case ImageCommand::Action::convert: return convert(command);
    case ImageCommand::Action::resize: return resize(command);
    case ImageCommand::Action::snapshot: return snapshot(command);
    case ImageCommand::Action::rebase: return rebase(command);
    case ImageCommand::Action::build: return build_image(command);
  }
  return 0;
}

}  // namespace lodge::cli
