// A child process with pipes, for tests that drive the built programs from outside. Every wait has a
// deadline; the child is killed when the object goes, and when the thread that started it does.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "base/fd.hpp"

namespace lodge::testing_support {

using Seconds = std::chrono::duration<double>;

class Process {
 public:
  // Starts `arguments[0]` (a path). Throws std::system_error.
  explicit Process(const std::vector<std::string>& arguments);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void send(std::string_view text);
  void close_input() { input_.reset(); }
  void signal(int number) const;
  // Reads output until stdout contains `text`; false when the deadline passes or the output ends before.
  bool wait_output(std::string_view text, Seconds deadline);
  // Reads to the end of both outputs and reaps the child: its exit status, 128 + n for signal n, -1 at the
  // deadline. The same status when asked again.
  int wait_exit(Seconds deadline);

  const std::string& out() const { return out_; }
  const std::string& err() const { return err_; }
  pid_t pid() const { return pid_; }
  double cpu_seconds() const { return cpu_seconds_; }  // of the child, after wait_exit()

 private:
  bool pump(std::chrono::steady_clock::time_point end);

  pid_t pid_ = -1;
  int status_ = -1;
  Fd input_, output_, errors_;
  std::string out_, err_;
  double cpu_seconds_ = 0;
};

struct Result {
  int status;
  std::string out, err;
};
// Runs to the end with empty input.
Result run(const std::vector<std::string>& arguments, Seconds deadline);

}  // namespace lodge::testing_support
