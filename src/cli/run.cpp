// lodge run: one virtual machine in this process, with the user's terminal.
#include <fmt/format.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <optional>
#include <thread>

#include "base/error.hpp"
#include "cli/commands.hpp"
#include "cli/escape.hpp"
#include "cli/statistics.hpp"
#include "cli/terminal.hpp"
#include "cli/version.hpp"
#include "vm/accelerator.hpp"
#include "vm/control/server.hpp"
#include "vm/control_commands.hpp"
#include "vm/virtual_machine.hpp"

namespace lodge::cli {
namespace {

// How long a guest may take to power off after its button was pressed by a signal.
constexpr int power_off_patience_ms = 10'000;

constexpr const char* key_help =
    "\nlodge: Ctrl-A X ends the machine, B presses its power button, R resets it, A sends Ctrl-A, H is this "
    "help\n";

void say(const std::string& text) {
  fmt::print(stderr, "lodge: {}\n", text);
}

// The signals that are for the VM. Blocked before any thread is started, so that only the descriptor gets
// them.
Fd take_signals() {
  sigset_t set;
  ::sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT, SIGWINCH})
    ::sigaddset(&set, signal);
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  Fd fd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd) throw_errno("signalfd");
  return fd;
}

// As many open files as the host permits: a shared folder and a network open what the guest asks for, and the
// usual 1024 are for programs that call select(2).
void raise_open_files() noexcept {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

// Draws how much of the memory has been taken, until the machine has it all: that of a large one takes long.
// At a reset the terminal belongs to the guest.
machine::MemoryProgress show_memory(const std::atomic<bool>& built) {
  if (::isatty(STDERR_FILENO) != 1) return {};
  return [&built, shown = uint64_t{101}](uint64_t taken, uint64_t size) mutable {
    const uint64_t percent = taken * 100 / size;
    if (built || percent == shown) return;
    fmt::print(stderr, "\r\033[Klodge: taking memory from the host: {} %{}", percent,
               taken == size ? "\r\033[K" : "");
    std::fflush(stderr);
    shown = percent;
  };
}

// The guest's console is as large as the window.
void tell_size(vm::VirtualMachine& machine) noexcept {
  winsize size{};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col != 0)
    machine.resize_terminal(size.ws_col, size.ws_row);
}

// Turns signals into calls on the VM for its lifetime: SIGTERM, SIGINT and SIGHUP press the power button,
// SIGQUIT ends it, SIGTSTP gives the terminal back while the process is stopped.
class SignalServer {
 public:
  SignalServer(const Fd& signals, vm::VirtualMachine& machine, RawTerminal& terminal)
      : signals_(signals), machine_(machine), terminal_(terminal), stop_(Fd::event()), thread_([this] {
          loop();
        }) {}
  ~SignalServer() {
    signal_event(stop_.get());
    thread_.join();
  }

 private:
  void loop() noexcept {
    for (bool asked = false;;) {
      std::array<pollfd, 2> fds{{{signals_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}}};
      const int count = ::poll(fds.data(), fds.size(), asked ? power_off_patience_ms : -1);
      if (count < 0) continue;
      if (fds[1].revents) return;
      if (count == 0) machine_.end();
      signalfd_siginfo info{};
      if (::read(signals_.get(), &info, sizeof info) != sizeof info) continue;
      switch (info.ssi_signo) {
        case SIGTSTP:
          terminal_.restore();
          ::raise(SIGSTOP);
          terminal_.enter();
          break;
        case SIGCONT: terminal_.enter(); break;
        case SIGWINCH: tell_size(machine_); break;
        case SIGQUIT: machine_.end(); break;
        default:
          // No guest driver sees the button, or the user insists: no reason to wait.
          if (asked || !machine_.press_power_button()) machine_.end();
          asked = true;
          break;
      }
    }
  }

  const Fd& signals_;
  vm::VirtualMachine& machine_;
  RawTerminal& terminal_;
  Fd stop_;
  std::thread thread_;
};

std::unique_ptr<vm::Backends> open_backends(const vm::VmConfig& config, const RawTerminal& terminal,
                                            EscapeKey& key) {
  vm::Stream::Filter filter;
  // Input that is no terminal is passed on as it is: a file or a pipe has no escape key.
  if (terminal.active()) filter = [&key](std::span<uint8_t> input) { return key.filter(input); };
  auto backends = std::make_unique<vm::Backends>(config.serial, filter);
  for (size_t i = 0; i < config.serial.size(); i++) {
    if (config.serial[i].kind == vm::SerialConfig::Kind::pty) {
      say(fmt::format("serial port {} is {}", i + 1, backends->serial(i).where()));
    }
  }
  return backends;
}

// Named sockets are in a directory that may have to be made first.
std::unique_ptr<vm::control::Listener> listen_for_control(const RunCommand& command) {
  if (command.control.empty()) return nullptr;
  if (command.control.starts_with(vm::control::socket_directory(false) + "/"))
    vm::control::socket_directory(true);
  return std::make_unique<vm::control::Listener>(command.control);
}

void print_statistics(const RunCommand& command, vm::VirtualMachine& machine, int status) {
  auto counted = vm::statistics_json(machine.statistics());
  counted["exit_status"] = status;
  if (command.json)
    fmt::print(stderr, "{}\n", counted.dump());
  else
    say(statistics_text(counted));
}

}  // namespace

int run(const RunCommand& command) {
  vm::validate(command.config, vm::host_limits());
  auto listener = listen_for_control(command);  // before anything is opened: the machine may run already
  const Fd signals = take_signals();
  raise_open_files();
  ::prctl(PR_SET_NAME, ("lodge:" + command.config.name).substr(0, 15).c_str());
  auto selected = vm::open_accelerator(command.config.accelerator, command.config.soft);
  if (!selected.remark.empty() && ::isatty(STDERR_FILENO)) say(selected.remark);

  // The streams need the key before the VM exists, so its actions find the VM here.
  std::atomic<vm::VirtualMachine*> target = nullptr;
  EscapeKey key([&target](EscapeKey::Action action) {
    vm::VirtualMachine* machine = target;
    if (action == EscapeKey::Action::help) std::fputs(key_help, stderr);
    if (!machine) return;
    if (action == EscapeKey::Action::end) machine->end();
    if (action == EscapeKey::Action::power_button) machine->press_power_button();
    if (action == EscapeKey::Action::reset) machine->reset();
  });
  const bool uses_terminal = vm::uses_terminal(command.config);
  RawTerminal terminal(uses_terminal);
  std::atomic<bool> built = false;
  auto config = command.config;
  config.memory_progress = show_memory(built);
  vm::VirtualMachine machine(std::move(config), std::move(selected.system),
                             open_backends(command.config, terminal, key));
  built = true;
  for (const auto& [option, where] : machine.backends().device_terminals())
    say(fmt::format("{} is {}", option, where));
  target = &machine;
  terminal.enter();
  if (terminal.active()) tell_size(machine);
  vm::Ending ending;
  {
    SignalServer server(signals, machine, terminal);
    std::optional<vm::control::Server> control;
    if (listener)
      control.emplace(std::move(listener), version, [&machine](const vm::control::Request& request) {
        return vm::execute(machine, request);
      });
    ending = machine.run();
  }
  terminal.restore();
  if (!ending.message.empty()) say(ending.message);
  const int status = ending.exit_status();
  if (command.stats) print_statistics(command, machine, status);
  return status;
}

}  // namespace lodge::cli
