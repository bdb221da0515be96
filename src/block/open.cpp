// Opening images: which format, and the files that an image names.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <set>

#include "base/error.hpp"
#include "block/chain.hpp"
#include "block/probe.hpp"
#include "block/qcow2/check.hpp"
#include "block/qcow2/create.hpp"
#include "block/qcow2/image.hpp"
#include "block/raw.hpp"
#include "block/throttle.hpp"

namespace lodge::block {
namespace {

// Long chains are slow and are mistakes; a loop is one that never ends.
constexpr size_t maximum_depth = 64;

class Opener {
 public:
  explicit Opener(const OpenOptions& options) : options_(options), engine_(make_engine(options.engine)) {}

  std::unique_ptr<Image> open(const std::string& path, const std::string& format, bool read_only) {
    if (!format.empty() && format != "raw" && format != "qcow2")
      usage_error("{}: unknown image format '{}'; there are raw and qcow2", path, format);
    auto storage =
        std::make_unique<FileStorage>(path, read_only ? Use::read : Use::write, options_.lock, engine_);
    remember(path);
    return open(std::move(storage), format, read_only);
  }

  std::unique_ptr<Image> open(std::unique_ptr<Storage> storage, const std::string& format, bool read_only) {
    std::array<uint8_t, magic_size> start{};
    if (const int error = storage->read(start.data(), start.size(), 0)) throw_errno(error, storage->path());
    if (format == "qcow2" || (format.empty() && looks_formatted(start)))
      return open_qcow2(std::move(storage), read_only);
    if (format.empty()) refuse_foreign(*storage);
    return std::make_unique<RawImage>(std::move(storage), format.empty());
  }

 private:
  void remember(const std::string& path) {
    struct stat status {};
    if (::stat(path.c_str(), &status) != 0) return;
    if (!seen_.insert({status.st_dev, status.st_ino}).second)
      usage_error("{}: is its own backing file, directly or through others; 'lodge image rebase' mends that",
                  path);
    if (seen_.size() > maximum_depth)
      usage_error("{}: is behind more than {} backing files; shorten the chain with 'lodge image convert'",
                  path, maximum_depth);
  }

  std::unique_ptr<Image> open_qcow2(std::unique_ptr<Storage> storage, bool read_only) {
    qcow2::Qcow2Image::Parts parts;
    parts.header = qcow2::read_header(*storage);
    if (!read_only) parts.header = make_writable(*storage, std::move(parts.header));
    if (parts.header.external_data()) parts.data = data_file(*storage, parts.header, read_only);
    if (parts.header.backing_file && options_.backing) {
      const std::string path = backing_path(storage->path(), *parts.header.backing_file);
      try {
        parts.backing = open(path, parts.header.backing_format, true);
      } catch (const UsageError& error) {
        usage_error("{} (the backing file of {})", error.what(), storage->path());
      }
    }
    parts.storage = std::move(storage);
    return std::make_unique<qcow2::Qcow2Image>(std::move(parts), read_only);
  }

  // Refuses, or repairs, what must not be written as it is.
  static qcow2::Header make_writable(Storage& storage, qcow2::Header header) {
    if (header.has(qcow2::feature_corrupt)) {
      usage_error(
          "{}: is marked as corrupt; 'lodge image check --repair all' tries to mend it, or open it "
          "read-only",
          storage.path());
    }
    if (!header.has(qcow2::feature_dirty)) return header;
    // Whoever wrote it last did not close it: its counts have to be counted.
    const auto result = qcow2::check(storage, qcow2::Repair::all);
    if (result.left() != 0)
      usage_error("{}: was not closed properly and cannot be repaired; see 'lodge image check'",
                  storage.path());
    return qcow2::read_header(storage);
  }

  std::unique_ptr<Storage> data_file(const Storage& storage, const qcow2::Header& header, bool read_only) {
    std::string path = options_.data_file;
    if (path.empty()) {
      const std::filesystem::path name(header.data_file);
      if (header.data_file.empty())
        usage_error("{}: has an external data file but does not name it", storage.path());
      path = backing_path(storage.path(), header.data_file);
      std::error_code error;
      if (!in_same_directory(path, storage.path()) || std::filesystem::is_symlink(path, error))
        usage_error(
            "{}: names the data file '{}', which is not in its own directory; images may not choose "
            "other files to write",
            storage.path(), header.data_file);
    }
    remember(path);
    return std::make_unique<FileStorage>(path, read_only ? Use::read : Use::write, options_.lock, engine_);
  }

  const OpenOptions& options_;
  std::shared_ptr<TransferEngine> engine_;
  std::set<std::pair<dev_t, ino_t>> seen_;
};

}  // namespace

std::string backing_path(const std::string& image, const std::string& name) {
  std::string path = name.starts_with("file:") ? name.substr(5) : name;
  if (path.starts_with("json:") || path.find("://") != std::string::npos)
    usage_error("{}: its backing file '{}' is not a file, and Lodge reads only files", image, name);
  return std::filesystem::path(image).parent_path() / path;
}

bool in_same_directory(const std::string& a, const std::string& b) {
  const auto directory = [](const std::filesystem::path& path) {
    return path.parent_path().empty() ? std::filesystem::path(".") : path.parent_path();
  };
  std::error_code error;
  return std::filesystem::equivalent(directory(a), directory(b), error);
}

namespace {

// A file without a name, in memory's or the disk's own interest: changes of a guest can be many.
Fd temporary_file() {
  const char* chosen = std::getenv("TMPDIR");
  const std::string directory = chosen && *chosen ? chosen : "/var/tmp";
  Fd fd(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd) {  // not every file system has it
    std::string pattern = directory + "/lodge-XXXXXX";
    fd.reset(::mkostemp(pattern.data(), O_CLOEXEC));
    if (!fd)
      usage_error("no temporary file can be made in {}: {}; set TMPDIR to another directory", directory,
                  std::generic_category().message(errno));
    ::unlink(pattern.c_str());
  }
  return fd;
}

std::unique_ptr<Image> temporary_overlay(std::unique_ptr<Image> base, const OpenOptions& options) {
  auto file = std::make_unique<FileStorage>(temporary_file(), "the temporary overlay", Use::write,
                                            make_engine(options.engine));
  file->never_sync();
  qcow2::CreateOptions create;
  create.size = base->size();
  // A guest writes a page here and there: small subclusters spare copying the rest from below.
  create.extended_l2 = true;
  qcow2::create(*file, create);
  qcow2::Qcow2Image::Parts parts;
  parts.header = qcow2::read_header(*file);
  parts.storage = std::move(file);
  parts.backing = std::move(base);
  return std::make_unique<qcow2::Qcow2Image>(std::move(parts), false);
}

}  // namespace

std::unique_ptr<Image> open_image(const std::string& path, const OpenOptions& options) {
  auto image = Opener(options).open(path, options.format, options.read_only || options.temporary);
  if (options.temporary && !options.read_only) image = temporary_overlay(std::move(image), options);
  if (options.limits.operations || options.limits.bytes)
    image = std::make_unique<ThrottledImage>(std::move(image), options.limits);
  return image;
}

std::unique_ptr<Image> open_storage(std::unique_ptr<Storage> storage, const OpenOptions& options) {
  return Opener(options).open(std::move(storage), options.format, options.read_only);
}

}  // namespace lodge::block
