// The host's end of a serial port: a terminal, a file, a pseudo-terminal or a pair of pipes.
//
// Output goes through a bounded buffer that a thread of its own empties, so that a slow reader never holds a
// vCPU: when the buffer is full the chip is told to keep its byte (CharBackend::write takes less) and the
// guest sees a transmitter that is busy. Input waits in the kernel until the chip has room.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/fd.hpp"
#include "device/character.hpp"
#include "vm/config.hpp"

namespace lodge::vm {

class Stream final : public device::CharBackend {
 public:
  // What the user types passes through a filter, which edits the bytes in place and returns how many are left
  // (the escape key of the terminal). Called on the stream's thread.
  using Filter = std::function<size_t(std::span<uint8_t>)>;

  struct Ends {
    Fd in;                  // none: no input
    Fd out;                 // none: output is dropped
    bool hangs_up = false;  // a pseudo-terminal: nobody may be there, and output is dropped then
    bool created = false;   // `where` is a file that did not exist before
    std::string where;      // for people: "/dev/pts/3"
  };

  // Throws std::system_error when the host has no thread or descriptor left.
  Stream(Ends ends, Filter filter);
  ~Stream() override;  // flushes

  void connect(device::CharPort& port) override;
  void disconnect() noexcept override;
  // Tells the chip, now and when another one is connected.
  void resize(uint16_t columns, uint16_t rows) noexcept;

  // Waits until what is buffered is written, for at most two seconds.
  void flush() noexcept;

  size_t write(std::span<const uint8_t> bytes) noexcept override;
  void receive_ready() noexcept override;
  const std::string& where() const noexcept { return where_; }

 private:
  static constexpr size_t capacity = 64 * 1024;

  void loop() noexcept;
  bool flush_some() noexcept;
  void read_some() noexcept;
  void offer() noexcept;
  void announce_room() noexcept;
  int wait_for(bool& readable, bool& writable) noexcept;

  std::string where_;
  Filter filter_;
  Fd in_, out_, wake_;
  bool hangs_up_;

  // Lock order: port_mutex_, the chip's own lock, mutex_. The chip calls in with its lock held and so meets
  // only mutex_.
  std::mutex port_mutex_;
  device::CharPort* port_ = nullptr;
  uint16_t columns_ = 0, rows_ = 0;  // 0: not known

  std::mutex mutex_;
  std::condition_variable drained_;
  std::vector<uint8_t> output_;  // a ring of `capacity`
  size_t head_ = 0, used_ = 0;
  bool refused_ = false;  // write() took less than offered
  bool stop_ = false;

  // The thread's own.
  std::array<uint8_t, 4096> input_{};
  size_t input_used_ = 0;
  std::atomic<bool> input_blocked_ = false;  // the chip has no room; receive_ready() clears it
  bool nobody_ = false;                      // hangs_up_: the other side is closed
  std::thread thread_;
};

// Opens the host's end that `config` names; a file keeps what is in it (Backends::keep()). `filter` is used
// for stdio only. Throws UsageError naming `option`.
Stream::Ends open_ends(const SerialConfig& config, const std::string& option);

}  // namespace lodge::vm
