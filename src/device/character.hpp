// Character streams: what stands between a chip that moves bytes (UART, debug console) and a back end of the
// host (terminal, file, pseudo-terminal, socket).
//
// Lock order: a chip calls CharBackend::write() with its own lock held, so a back end must hold none of its
// locks while it calls into a CharPort.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lodge::device {

class CharPort;

// The host's end, implemented by the VM. Any thread.
class CharBackend {
 public:
  virtual ~CharBackend() = default;
  // Takes a prefix of `bytes` and returns its length. Never blocks (this is the vCPU path): a back end that
  // is slow buffers, and when its buffer is full takes less and later calls CharPort::transmit_ready().
  virtual size_t write(std::span<const uint8_t> bytes) noexcept = 0;
  // The chip, which has refused input before, has room again.
  virtual void receive_ready() noexcept {}
  // The chip that gets the input, which is kept while there is none. After disconnect() returns the old chip
  // is not called any more. Not from the chip's own calls.
  virtual void connect(CharPort& /*port*/) {}
  virtual void disconnect() noexcept {}
};

// The chip's end, called by a back end. Any thread; never blocks for long.
class CharPort {
 public:
  virtual ~CharPort() = default;
  // Input for the guest. Takes a prefix of `bytes` and returns its length; when that is less than offered the
  // back end keeps the rest until CharBackend::receive_ready().
  virtual size_t receive(std::span<const uint8_t> bytes) noexcept = 0;
  // The back end, which has refused output before, has room again.
  virtual void transmit_ready() noexcept {}
  // The terminal behind the back end has this size now.
  virtual void resized(uint16_t /*columns*/, uint16_t /*rows*/) noexcept {}
};

// Output to nowhere, no input.
class NullBackend final : public CharBackend {
 public:
  size_t write(std::span<const uint8_t> bytes) noexcept override { return bytes.size(); }
};

}  // namespace lodge::device
