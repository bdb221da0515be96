// The control socket's commands for keyboards and tablets.
#pragma once

#include "vm/control/protocol.hpp"
#include "vm/virtual_machine.hpp"

namespace lodge::vm {

// As in QMP; `hold-time`, `device` and `head` do not exist here. All throw control::CommandError.
control::Json send_key(VirtualMachine& machine, const control::Request& request);
control::Json input_send_event(VirtualMachine& machine, const control::Request& request);
// The devices, whether the guest listens, which lights are on.
control::Json lodge_query_input(VirtualMachine& machine, const control::Request& request);

}  // namespace lodge::vm
