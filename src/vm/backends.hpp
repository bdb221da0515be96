// All of a VM's streams to the host: its serial ports' and those of --device options. They outlive machine
// resets, so that a reset neither truncates a file nor renames a pseudo-terminal.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "block/image.hpp"
#include "net/config.hpp"
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
  // shared after that; stdio is shared with a serial port. A device that also reads (`input`) is the only
  // reader. Throws UsageError naming `option`.
  std::shared_ptr<Stream> open(const std::string& specification, const std::string& option, bool input);
  // The disk image at `path`, opened at its first use. It stays open over machine resets, so that a temporary
  // overlay keeps what the guest has written. Throws UsageError, also when a device has it.
  std::shared_ptr<block::Image> open_disk(const std::string& path, const block::OpenOptions& options);
  // Gives devices an image that is no file by this path, from now on.
  void add_disk(const std::string& path, std::shared_ptr<block::Image> image) {
    disks_[path] = std::move(image);
  }
  // The image that a device has opened by this path. Throws UsageError when none has.
  block::Image& disk(const std::string& path);
  // The network that `config` describes. It outlives machine resets. Throws UsageError.
  std::shared_ptr<net::Backend> open_network(const net::Config& config);
  // Closes disks and networks that no device has any more: one was taken out of the running machine.
  void close_unused() noexcept;
  // The pseudo-terminals that devices have opened: the option and the path.
  const std::vector<std::pair<std::string, std::string>>& device_terminals() const noexcept {
    return device_terminals_;
  }
  // The user's terminal has this size now.
  void resize_terminal(uint16_t columns, uint16_t rows) noexcept;

  // The VM really starts: files lose what they held. Without this call they are as before when the object
  // goes, and those that did not exist are gone.
  void keep() noexcept;
  void flush() noexcept;

  ~Backends();
  Backends(const Backends&) = delete;
  Backends& operator=(const Backends&) = delete;

 private:
  Backends() = default;  // delegated to, so that the destructor also cleans up after a half-made object
  struct File {
    std::string path;
    bool created;
  };
  Stream::Ends open_noting_files(const SerialConfig& config, const std::string& option);

  Stream::Filter terminal_filter_;
  bool terminal_has_reader_ = false;
  std::set<std::string> readers_;  // the options that have it
  std::vector<std::pair<std::string, std::string>> device_terminals_;
  std::map<std::string, std::shared_ptr<block::Image>> disks_;
  std::vector<std::pair<net::Config, std::shared_ptr<net::Backend>>> networks_;
  std::vector<File> files_;
  bool kept_ = false;
  std::vector<std::shared_ptr<Stream>> serial_;
  std::map<std::string, std::shared_ptr<Stream>> others_;
};

}  // namespace lodge::vm
