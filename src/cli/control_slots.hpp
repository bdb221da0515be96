// lodge ctl's words for devices that come and go.
#pragma once

#include <span>
#include <string>

#include "vm/control/client.hpp"

namespace lodge::cli {

using Arguments = std::span<const std::string>;

// What is asked of the machine, and how its answer reads as text.
struct Asked {
  vm::control::Json answer;
  std::string text;  // lines, each with its end
};

Asked slots(vm::control::Client& client, Arguments arguments);
Asked add_disk(vm::control::Client& client, Arguments arguments);
Asked add_network(vm::control::Client& client, Arguments arguments);
Asked add_device(vm::control::Client& client, Arguments arguments);
Asked remove(vm::control::Client& client, Arguments arguments);

}  // namespace lodge::cli
