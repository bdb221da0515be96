// The commands of a machine's control socket. docs/control.md lists them.
#pragma once

#include "vm/control/protocol.hpp"
#include "vm/virtual_machine.hpp"

namespace lodge::vm {

// Does what is asked. On the control socket's thread; takes at most a second or so. Throws
// control::CommandError.
control::Json execute(VirtualMachine& machine, const control::Request& request);

}  // namespace lodge::vm
