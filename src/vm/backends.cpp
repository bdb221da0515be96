#include "vm/backends.hpp"

#include <unistd.h>

#include <utility>

namespace lodge::vm {

Backends::Backends(const std::vector<SerialConfig>& serial, const Stream::Filter& terminal_filter)
    : Backends() {
  for (const auto& config : serial) {
    const bool stdio = config.kind == SerialConfig::Kind::stdio;
    serial_.push_back(std::make_shared<Stream>(open_noting_files(config, "--serial"),
                                               stdio ? terminal_filter : Stream::Filter{}));
    if (stdio) others_["stdio"] = serial_.back();
  }
}

std::shared_ptr<Stream> Backends::open(const std::string& specification, const std::string& option) {
  auto& stream = others_[specification];
  if (!stream) {
    Stream::Ends ends = open_noting_files(parse_serial(option, specification), option);
    ends.in.reset();  // such a device only prints
    stream = std::make_shared<Stream>(std::move(ends), Stream::Filter{});
  }
  return stream;
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
