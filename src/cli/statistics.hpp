// What `lodge run --stats` tells about a run that has ended.
#pragma once

#include <string>

#include "vm/virtual_machine.hpp"

namespace lodge::cli {

struct RunReport {
  std::string name, accelerator, protocol;
  int exit_status = 0;
  double cpu_seconds = 0;  // of the whole process
  vm::Statistics counted;
};

std::string statistics_text(const RunReport& report);  // lines, the last without its end
std::string statistics_json(const RunReport& report);  // one line

}  // namespace lodge::cli
