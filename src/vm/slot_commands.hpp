// The control socket's commands for devices that come and go while the guest runs.
#pragma once

#include "vm/control/protocol.hpp"
#include "vm/virtual_machine.hpp"

namespace lodge::vm {

// As in QMP: `driver`, a name of --device, and that device's options; the answer names the slot. All throw
// control::CommandError.
control::Json device_add(VirtualMachine& machine, const control::Request& request);
// `id`: the slot's, or a disk's name. The device has gone when lodge_query_slots() shows it no more.
control::Json device_del(VirtualMachine& machine, const control::Request& request);
// The slots, and what is in them.
control::Json lodge_query_slots(VirtualMachine& machine, const control::Request& request);

}  // namespace lodge::vm
