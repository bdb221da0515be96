// Programs of the host that do a part of the work.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace lodge::distribution {

// The path of a program, looked for in $PATH and where system programs are. Throws UsageError naming the
// Debian package that has it.
std::string find_tool(const std::string& name, const std::string& package);

struct ToolRun {
  std::vector<std::string> arguments;              // the first is a path
  std::map<std::string, std::string> environment;  // added to this process's own
  int inherited = -1;                              // a descriptor that the program finds as number 9
};

// Runs a program to its end with nothing to read, calling line() for each line that it prints on stdout or
// stderr. SIGINT and SIGTERM end it too. Returns its exit status, 128 + n for signal n. Throws
// std::system_error when it cannot be started.
int run_tool(const ToolRun& run, const std::function<void(std::string_view)>& line);

}  // namespace lodge::distribution
