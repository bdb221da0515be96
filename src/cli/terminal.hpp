// The user's terminal in raw mode.
#pragma once

#include <termios.h>

namespace lodge::cli {

// Switches the terminal on standard input to raw mode, from enter() on, and gives it back on every way out:
// restore(), the destructor, and (this is process-wide, so one object at a time) the fatal signals. Does
// nothing when standard input is no terminal or belongs to another job.
class RawTerminal {
 public:
  explicit RawTerminal(bool wanted);  // false: never active
  ~RawTerminal();
  RawTerminal(const RawTerminal&) = delete;
  RawTerminal& operator=(const RawTerminal&) = delete;

  bool active() const noexcept { return active_; }
  void restore() noexcept;  // before the process is stopped
  void enter() noexcept;    // after it goes on

 private:
  bool active_ = false;
};

}  // namespace lodge::cli
