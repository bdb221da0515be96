// SIGINT, SIGTERM and SIGHUP as a descriptor, for work that must be cleared away when one of them comes.
// While the object lives they are blocked on its thread (and on threads started from it) and end nothing by
// themselves; one that this process ignores (nohup, a shell's background) stays ignored.
#pragma once

#include <csignal>

#include "base/fd.hpp"

namespace lodge {

class EndSignals {
 public:
  EndSignals();  // throws std::system_error
  ~EndSignals();
  EndSignals(const EndSignals&) = delete;
  EndSignals& operator=(const EndSignals&) = delete;

  int fd() const noexcept { return fd_.get(); }  // readable when one waits
  int take() noexcept;                           // the next that waits, 0 when there is none
  void check();                                  // throws Interrupted when one waits
  // Between fork and exec: all three as a program expects to find them.
  void reset_in_child() const noexcept;

 private:
  sigset_t before_{};
  Fd fd_;
};

}  // namespace lodge
