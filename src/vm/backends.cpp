#include "vm/backends.hpp"

namespace lodge::vm {

Backends::Backends(const std::vector<SerialConfig>& serial, const Stream::Filter& terminal_filter) {
  for (const auto& config : serial) {
    const bool stdio = config.kind == SerialConfig::Kind::stdio;
    serial_.push_back(
        std::make_shared<Stream>(open_ends(config, "--serial"), stdio ? terminal_filter : Stream::Filter{}));
    if (stdio) others_["stdio"] = serial_.back();
  }
}

std::shared_ptr<Stream> Backends::open(const std::string& specification, const std::string& option) {
  auto& stream = others_[specification];
  if (!stream) {
    Stream::Ends ends = open_ends(parse_serial(option, specification), option);
    ends.in.reset();  // such a device only prints
    stream = std::make_shared<Stream>(std::move(ends), Stream::Filter{});
  }
  return stream;
}

void Backends::flush() noexcept {
  for (auto& stream : serial_) stream->flush();
  for (auto& [name, stream] : others_) stream->flush();
}

}  // namespace lodge::vm
