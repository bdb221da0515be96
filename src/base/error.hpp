// Errors at set-up. Everything that can fail because of what a user asked for, or what the host lacks, throws
// one of these; run-time paths (vCPU, virtqueue, device registers) never throw.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace lodge {

// Bad input or configuration. what() is one line that names the option or file and the remedy; the command
// prints it and exits with status 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A signal has asked for the end of what was done, and all of it is cleared away. The command prints what()
// and exits with status 128 + signal.
class Interrupted : public std::runtime_error {
 public:
  Interrupted(int signal, const std::string& what) : std::runtime_error(what), signal_(signal) {}
  int signal() const noexcept { return signal_; }

 private:
  int signal_;
};

// Throws UsageError with a formatted sentence.
template <class... Args>
[[noreturn]] void usage_error(fmt::format_string<Args...> format, Args&&... args) {
  throw UsageError(fmt::format(format, std::forward<Args>(args)...));
}

// Throws std::system_error with `error` (a positive errno) and the sentence `what`.
[[noreturn]] void throw_errno(int error, const std::string& what);

// Throws std::system_error with the current errno.
[[noreturn]] void throw_errno(const std::string& what);

}  // namespace lodge
