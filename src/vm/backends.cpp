#include "vm/backends.hpp"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/error.hpp"

namespace lodge::vm {

Backends::Backends(const std::vector<SerialConfig>& serial, const Stream::Filter& terminal_filter)
    : Backends() {
  terminal_filter_ = terminal_filter;
  for (const auto& config : serial) {
    const bool stdio = config.kind == SerialConfig::Kind::stdio;
    serial_.push_back(std::make_shared<Stream>(open_noting_files(config, "--serial"),
                                               stdio ? terminal_filter : Stream::Filter{}));
    if (!stdio) continue;
    others_["stdio"] = serial_.back();
    terminal_has_reader_ = true;
  }
}

// A machine is built anew at a reset, and its devices find the streams that they had.
std::shared_ptr<Stream> Backends::open(const std::string& specification, const std::string& option,
                                       bool input) {
  const SerialConfig config = parse_serial(option, specification);
  const bool stdio = config.kind == SerialConfig::Kind::stdio;
  const std::string key = specification == "pty" ? specification + " of " + option : specification;
  if (stdio && input && terminal_has_reader_ && !readers_.contains(option))
    usage_error("{}={}: the terminal belongs to another device; give --serial null", option, specification);
  auto& stream = others_[key];
  if (!stream || (stdio && input && !terminal_has_reader_)) {
    Stream::Ends ends = open_noting_files(config, option);
    if (config.kind == SerialConfig::Kind::pty) device_terminals_.emplace_back(option, ends.where);
    if (!input) ends.in.reset();  // such a device only prints
    stream = std::make_shared<Stream>(std::move(ends), stdio && input ? terminal_filter_ : Stream::Filter{});
  }
  if (stdio && input) {
    terminal_has_reader_ = true;
    readers_.insert(option);
  }
  return stream;
}

std::shared_ptr<block::Image> Backends::open_disk(const std::string& path,
                                                  const block::OpenOptions& options) {
  auto& disk = disks_[path];
  if (disk && disk.use_count() > 1) usage_error("--disk {}: the same file is given twice", path);
  if (!disk) disk = block::open_image(path, options);
  return disk;
}

block::Image& Backends::disk(const std::string& path) {
  const auto found = disks_.find(path);
  if (found == disks_.end() || !found->second) usage_error("{}: no disk of this machine has that file", path);
  return *found->second;
}

std::shared_ptr<net::Backend> Backends::open_network(const net::Config& config) {
  for (const auto& [known, network] : networks_)
    if (known == config && network.use_count() == 1) return network;  // its card went with a reset
  auto network = networks_.emplace_back(config, net::open_network(config)).second;
  if (kept_) network->keep();
  return network;
}

void Backends::close_unused() noexcept {
  std::erase_if(disks_, [](const auto& known) { return known.second.use_count() <= 1; });
  std::erase_if(networks_, [](const auto& known) { return known.second.use_count() <= 1; });
}

void Backends::resize_terminal(uint16_t columns, uint16_t rows) noexcept {
  const auto found = others_.find("stdio");
  if (found != others_.end()) found->second->resize(columns, rows);
}

Stream::Ends Backends::open_noting_files(const SerialConfig& config, const std::string& option) {
  Stream::Ends ends = open_ends(config, option);
  if (config.kind == SerialConfig::Kind::file) files_.push_back({config.path, ends.created});
  return ends;
}

void Backends::keep() noexcept {
  if (std::exchange(kept_, true)) return;
  // What is no regular file (a pipe, a terminal) refuses, and has nothing to lose.
  for (const auto& file : files_) std::ignore = ::truncate(file.path.c_str(), 0);
  for (const auto& known : networks_) known.second->keep();
}

Backends::~Backends() {
  if (kept_) return;
  for (const auto& file : files_)
    if (file.created) ::unlink(file.path.c_str());
}

void Backends::flush() noexcept {
  for (auto& stream : serial_) stream->flush();
  for (auto& [name, stream] : others_) stream->flush();
}

}  // namespace lodge::vm
