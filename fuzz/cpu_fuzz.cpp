// Random bytes as guest code: the decoder, the interpreter of every instruction family and exception
// delivery, in every mode of the processor. At most 256 instructions run, one by one (guest debugging makes
// run() return after each), so no input can loop.
#include "cpu_guest.hpp"

namespace {

using namespace lodge;
constexpr unsigned max_instructions = 256;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static fuzz::Guest guest({});  // the accelerator is opened once: it measures the TSC
  if (size <= fuzz::header_size) return 0;
  const fuzz::Machine machine = fuzz::make_machine(guest, data, size);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
  machine.vcpu->set_guest_debug(debug);
  for (unsigned i = 0; i < max_instructions; ++i)
    if (!fuzz::answer(machine.vcpu->run())) break;
  return 0;
}
