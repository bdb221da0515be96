// Programs of the host that do a part of the work.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/end_signals.hpp"

namespace lodge::distribution {

// The path of a program, looked for in $PATH and where system programs are. Throws UsageError naming the
// Debian package that has it.
std::string find_tool(const std::string& name, const std::string& package);

struct ToolRun {
  std::vector<std::string> arguments;              // the first is a path
  std::map<std::string, std::string> environment;  // added to this process's own
  int inherited = -1;                              // a descriptor that the program finds as number 9
  std::chrono::milliseconds patience{10'000};      // for its clearing up when a signal ends it
};

// Runs a program to its end with nothing to read, calling line() for each line that it prints on stdout or
// stderr. Returns its exit status, 128 + n for signal n. Throws std::system_error when it cannot be started.
//
// It has a session of its own. One of `signals` gives all of that SIGINT, as Ctrl-C would, and SIGKILL when
// the program is not done after its patience, or at the next signal; then Interrupted is thrown. For root,
// it is also the first process of namespaces of its own: none of its processes outlives it, nor this process,
// and what they have mounted is not seen outside.
int run_tool(const ToolRun& run, EndSignals& signals, const std::function<void(std::string_view)>& line);

}  // namespace lodge::distribution
