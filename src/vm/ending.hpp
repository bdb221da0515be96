// How a VM ended, and the process exit status that says so. Odd statuses belong to isa-debug-exit, whose
// (value << 1) | 1 is always odd; ours are even so that the two never meet.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

namespace lodge::vm {

struct Ending {
  enum class Cause {
    power_off,     // the guest switched itself off
    reset,         // it reset the machine, and the configuration forbids reboots
    panic,         // triple fault, and the configuration forbids reboots
    debug_exit,    // isa-debug-exit
    vcpu_failure,  // the accelerator cannot go on
    no_restart,    // after a reset there was no kernel any more, or it could not be loaded
    host_failure,  // after a reset the host refused what the machine needs
    outside,       // ended by force: Ctrl-A X, or a signal after which the guest did not power off
  };
  Cause cause = Cause::power_off;
  int debug_status = 0;  // of Cause::debug_exit
  std::string message;   // a line for the user; empty when there is nothing to explain

  int exit_status() const noexcept {
    switch (cause) {
      case Cause::power_off: return 0;
      case Cause::reset: return 4;
      case Cause::panic: return 6;
      case Cause::debug_exit: return debug_status;
      case Cause::vcpu_failure: return 8;
      case Cause::outside: return 10;
      case Cause::host_failure: return 12;
      case Cause::no_restart: return 16;
    }
    return 12;
  }
};

inline constexpr int usage_status = 2;
inline constexpr int host_failure_status = 12;

// For --help: in the order of their numbers.
constexpr std::array<std::pair<std::string_view, std::string_view>, 10> exit_statuses() {
  return {{{"0", "the guest powered off"},
           {"2", "bad input: option, file or configuration"},
           {"4", "the guest reset the machine (--no-reboot)"},
           {"6", "the guest crashed by a triple fault (--no-reboot)"},
           {"8", "the accelerator could not go on; the reason is on stderr"},
           {"10", "ended from outside: Ctrl-A X, or a signal and no power-off by the guest"},
           {"12", "the host refused something: memory, a file, a device"},
           {"14", "the guest's kernel panicked (--device pvpanic)"},
           {"16", "after a reset the machine could not start again: no kernel on its disk"},
           {"odd", "isa-debug-exit: (value << 1) | 1"}}};
}

}  // namespace lodge::vm
