// All of a VM's streams to the host: its serial ports' and those of --device options. They outlive machine
// resets, so that a reset neither truncates a file nor renames a pseudo-terminal.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "vm/config.hpp"
#include "vm/stream.hpp"

namespace lodge::vm {

class Backends {
 public:
  // Opens one stream for each serial port. `terminal_filter` (may be empty) edits what is typed on standard
  // input. Throws UsageError naming --serial.
  Backends(const std::vector<SerialConfig>& serial, const Stream::Filter& terminal_filter);

  size_t serial_ports() const noexcept { return serial_.size(); }
  Stream& serial(size_t port) noexcept { return *serial_[port]; }
  // The stream that `specification` names ("stdio", "file:PATH", "null"...), opened at its first use and
  // shared after that; stdio is shared with a serial port. Throws UsageError naming `option`.
  std::shared_ptr<Stream> open(const std::string& specification, const std::string& option);

  void flush() noexcept;

 private:
  std::vector<std::shared_ptr<Stream>> serial_;
  std::map<std::string, std::shared_ptr<Stream>> others_;
};

}  // namespace lodge::vm
