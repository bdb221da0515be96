#include "vm/stream.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "base/error.hpp"

namespace lodge::vm {
namespace {

// What a poll()ed pipe takes without blocking (POSIX: PIPE_BUF). stdout is shared with other processes, so it
// must not be made non-blocking.
constexpr size_t chunk = 4096;
// How soon a pseudo-terminal notices that somebody has opened it: the kernel does not announce that.
constexpr int hangup_poll_ms = 100;
constexpr auto flush_patience = std::chrono::seconds(2);

}  // namespace

Stream::Stream(Ends ends, Filter filter)
    : where_(std::move(ends.where)),
      filter_(std::move(filter)),
      in_(std::move(ends.in)),
      out_(std::move(ends.out)),
      wake_(Fd::event()),
      hangs_up_(ends.hangs_up),
      output_(capacity),
      thread_([this] { loop(); }) {}

Stream::~Stream() {
  disconnect();
  flush();
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  signal_event(wake_.get());
  thread_.join();
}

void Stream::flush() noexcept {
  std::unique_lock lock(mutex_);
  drained_.wait_for(lock, flush_patience, [this] { return used_ == 0; });
}

void Stream::connect(device::CharPort& port) {
  {
    std::lock_guard lock(port_mutex_);
    port_ = &port;
    if (columns_ != 0) port.resized(columns_, rows_);
  }
  receive_ready();
}

void Stream::resize(uint16_t columns, uint16_t rows) noexcept {
  std::lock_guard lock(port_mutex_);
  columns_ = columns;
  rows_ = rows;
  if (port_) port_->resized(columns, rows);
}

void Stream::disconnect() noexcept {
  std::lock_guard lock(port_mutex_);
  port_ = nullptr;
}

size_t Stream::write(std::span<const uint8_t> bytes) noexcept {
  std::lock_guard lock(mutex_);
  if (!out_) return bytes.size();
  const size_t taken = std::min(bytes.size(), capacity - used_);
  for (size_t i = 0; i < taken; i++) output_[(head_ + used_ + i) % capacity] = bytes[i];
  // The thread sleeps only with an empty buffer, so only the first byte has to wake it.
  if (used_ == 0 && taken > 0) signal_event(wake_.get());
  used_ += taken;
  refused_ |= taken < bytes.size();
  return taken;
}

void Stream::receive_ready() noexcept {
  if (input_blocked_.exchange(false)) signal_event(wake_.get());
}

// Returns false when the other side is gone for good.
bool Stream::flush_some() noexcept {
  if (nobody_) {
    std::lock_guard lock(mutex_);
    used_ = 0;
    drained_.notify_all();
    return true;
  }
  std::array<uint8_t, chunk> piece;
  size_t size;
  {
    std::lock_guard lock(mutex_);
    size = std::min({used_, chunk, capacity - head_});
    std::copy_n(output_.begin() + static_cast<ptrdiff_t>(head_), size, piece.begin());
  }
  ssize_t written = ::write(out_.get(), piece.data(), size);
  bool alive = true;
  if (written < 0) {
    if (errno == EINTR || errno == EAGAIN) return true;
    alive = hangs_up_;  // the reader of a pipe has left, or the disk is full: the guest goes on without
    written = static_cast<ssize_t>(size);
  }
  std::lock_guard lock(mutex_);
  head_ = (head_ + static_cast<size_t>(written)) % capacity;
  used_ = alive ? used_ - static_cast<size_t>(written) : 0;
  if (used_ == 0) drained_.notify_all();
  return alive;
}

void Stream::announce_room() noexcept {
  {
    std::lock_guard lock(mutex_);
    if (!refused_ || used_ > capacity / 2) return;
    refused_ = false;
  }
  std::lock_guard lock(port_mutex_);
  if (port_) port_->transmit_ready();
}

void Stream::offer() noexcept {
  if (input_used_ == 0) return;
  std::lock_guard lock(port_mutex_);
  // Set before the offer: a receive_ready() that comes in between must not be lost.
  input_blocked_ = true;
  const size_t taken = port_ ? port_->receive({input_.data(), input_used_}) : 0;
  std::memmove(input_.data(), input_.data() + taken, input_used_ - taken);
  input_used_ -= taken;
  if (input_used_ == 0) input_blocked_ = false;
}

void Stream::read_some() noexcept {
  std::array<uint8_t, 256> piece;
  const ssize_t count = ::read(in_.get(), piece.data(), piece.size());
  if (count < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (count <= 0) {
    // End of input is no reason to end: the guest goes on without. A pseudo-terminal may be opened again.
    if (!hangs_up_) in_.reset();
    return;
  }
  size_t size = static_cast<size_t>(count);
  if (filter_) size = filter_({piece.data(), size});
  // Only a filtered stream reads on while the guest does not listen; a person's keys beyond the buffer are
  // lost then.
  size = std::min(size, input_.size() - input_used_);
  std::copy_n(piece.begin(), size, input_.begin() + static_cast<ptrdiff_t>(input_used_));
  input_used_ += size;
}

int Stream::wait_for(bool& readable, bool& writable) noexcept {
  bool pending;
  {
    std::lock_guard lock(mutex_);
    if (stop_) return -1;
    pending = used_ > 0;
  }
  // The escape key must work although the guest reads nothing, so a filtered stream always listens.
  const bool want_input = in_ && (filter_ || input_used_ == 0);
  // A negative descriptor is skipped by poll().
  std::array<pollfd, 3> fds{
      {{wake_.get(), POLLIN, 0},
       {want_input && !nobody_ ? in_.get() : -1, POLLIN, 0},
       {hangs_up_ || pending ? out_.get() : -1, static_cast<short>(pending ? POLLOUT : 0), 0}}};
  if (hangs_up_ && nobody_) fds[2].fd = -1;
  const int count = ::poll(fds.data(), fds.size(), !nobody_ ? -1 : pending ? 0 : hangup_poll_ms);
  if (count < 0) return 0;
  if (fds[0].revents) take_event(wake_.get());
  if (hangs_up_) {
    pollfd probe{out_.get(), 0, 0};
    ::poll(&probe, 1, 0);
    nobody_ = (probe.revents & POLLHUP) != 0;
  }
  readable = want_input && !nobody_ && (fds[1].revents & (POLLIN | POLLHUP | POLLERR));
  writable = pending && (nobody_ || (fds[2].revents & (POLLOUT | POLLHUP | POLLERR)));
  return 0;
}

void Stream::loop() noexcept {
  ::pthread_setname_np(::pthread_self(), "lodge-stream");
  for (bool readable = false, writable = false; wait_for(readable, writable) == 0;
       readable = writable = false) {
    if (writable && !flush_some()) {
      std::lock_guard lock(mutex_);
      out_.reset();
    }
    announce_room();
    if (readable) read_some();
    if (!input_blocked_) offer();
  }
}

namespace {

Stream::Ends open_pty(const std::string& option) {
  Fd master(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  char path[128];
  if (!master || ::grantpt(master.get()) != 0 || ::unlockpt(master.get()) != 0 ||
      ::ptsname_r(master.get(), path, sizeof path) != 0) {
    usage_error("{}: this host gives no pseudo-terminal: {}", option, std::strerror(errno));
  }
  {
    // Raw, so that nothing is echoed back to the guest; opened and closed once, so that poll() reports a
    // hang-up until somebody comes.
    Fd slave(::open(path, O_RDWR | O_NOCTTY | O_CLOEXEC));
    termios mode{};
    if (slave && ::tcgetattr(slave.get(), &mode) == 0) {
      ::cfmakeraw(&mode);
      ::tcsetattr(slave.get(), TCSANOW, &mode);
    }
  }
  Stream::Ends ends;
  ends.in = Fd::duplicate(master.get());
  ends.out = std::move(master);
  ends.hangs_up = true;
  ends.where = path;
  return ends;
}

Stream::Ends open_stdio() {
  Stream::Ends ends;
  ends.where = "the terminal";
  // A background job must not read from the terminal: the kernel would stop it.
  const bool background = ::isatty(STDIN_FILENO) && ::tcgetpgrp(STDIN_FILENO) != ::getpgrp();
  if (::fcntl(STDIN_FILENO, F_GETFD) >= 0 && !background) ends.in = Fd::duplicate(STDIN_FILENO);
  if (::fcntl(STDOUT_FILENO, F_GETFD) >= 0) ends.out = Fd::duplicate(STDOUT_FILENO);
  return ends;
}

}  // namespace

Stream::Ends open_ends(const SerialConfig& config, const std::string& option) {
  Stream::Ends ends;
  switch (config.kind) {
    case SerialConfig::Kind::null: break;
    case SerialConfig::Kind::stdio: return open_stdio();
    case SerialConfig::Kind::pty: return open_pty(option);
    case SerialConfig::Kind::file:
      ends.where = config.path;
      ends.out = Fd(::open(config.path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
      ends.created = static_cast<bool>(ends.out);
      if (!ends.out && errno == EEXIST) ends.out = Fd(::open(config.path.c_str(), O_WRONLY | O_CLOEXEC));
      if (!ends.out) usage_error("{}: cannot write '{}': {}", option, config.path, std::strerror(errno));
      break;
  }
  return ends;
}

}  // namespace lodge::vm
