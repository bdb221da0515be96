// lodge ctl and lodge list: running machines, through their control sockets.
#pragma once

#include <string>
#include <vector>

namespace lodge::cli {

struct CtlCommand {
  std::string machine;  // a name, or a path
  std::string command;
  std::vector<std::string> arguments;
  bool json = false;
};
struct ListCommand {
  bool json = false;
};

// For help and completions.
std::string ctl_commands_help();
std::vector<std::string> ctl_command_names();

}  // namespace lodge::cli
