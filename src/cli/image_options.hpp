// `lodge image`: what a person typed.
#pragma once

#include <CLI/App.hpp>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "distribution/debian.hpp"

namespace lodge::cli {

struct ImageCommand {
  enum class Action { create, info, check, convert, resize, snapshot, rebase, build };
  Action action = Action::info;
  std::string file, target;  // target: of convert
  std::string format;        // of the file, or of what is made; empty: by contents, or qcow2
  std::string source_format;
  bool json = false, progress = false;

  // create, convert
  uint64_t size = 0;
  std::optional<std::string> backing;
  std::string backing_format, data_file, preallocation = "off";
  unsigned version = 3, cluster_bits = 16, refcount_order = 4;
  bool lazy_refcounts = false, subclusters = false, raw_data = false, zstd = false, compress = false;
  std::function<void()> while_copying;  // called a few times a second; what it throws ends the copying
  // check
  std::string repair;
  // resize: `size` absolute, or how much more or less
  char sign = 0;
  bool shrink = false;
  // snapshot: one of them
  bool list = false;
  std::string create_name, apply_name, delete_name;
  // rebase
  bool no_backing = false, unsafe = false, chain = false;
  // build: `file`, `size`, `format` and
  distribution::DebianDisk disk;  // without ssh_keys
  std::string ssh_key;            // or a file with some
  bool verbose = false;
};

namespace detail {
// The options as text, before their values are understood.
struct RawImageOptions {
  std::string file, target, format, source_format, size, backing, backing_format, data_file, repair,
      preallocation = "off";
  std::optional<std::string> cluster_size, refcount_bits, version, compression;
  std::optional<std::string> create_name, apply_name, delete_name;
  std::string distribution = "debian", suite = "bookworm", build_size = "4G", mirror, hostname = "debian",
              password, ssh_key;
  std::vector<std::string> packages;
  bool verbose = false;
  bool json = false, progress = false, lazy_refcounts = false, subclusters = false, raw_data = false,
       compress = false, shrink = false, list = false, no_backing = false, unsafe = false, chain = false;
};
void describe_image(CLI::App& app, RawImageOptions& raw);
}  // namespace detail

// Throws UsageError. `action` is the subcommand's name.
ImageCommand understand_image(const std::string& action, const detail::RawImageOptions& raw);

}  // namespace lodge::cli
