// Random bytes as guest code: the decoder, the interpreter of every instruction family and exception
// delivery, in every mode of the processor. At most 256 instructions run, one by one (guest debugging makes
// run() return after each). An exception whose handler cannot be fetched is delivered without end, as by
// silicon: that input is ended after a while.
#include "cpu_guest.hpp"
#include "watchdog.hpp"

namespace {

using namespace lodge;
constexpr unsigned max_instructions = 256;
constexpr std::chrono::milliseconds patience{100};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static fuzz::Guest guest({});  // the accelerator is opened once: it measures the TSC
  static fuzz::Watchdog watchdog(patience);
  if (size <= fuzz::header_size) return 0;
  const fuzz::Machine machine = fuzz::make_machine(guest, data, size);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
  machine.vcpu->set_guest_debug(debug);
  watchdog.start(*machine.vcpu);
  for (unsigned i = 0; i < max_instructions; ++i) {
    const kvm::Exit exit = machine.vcpu->run();
    if (exit.interrupted() || !fuzz::answer(exit)) break;
  }
  watchdog.stop();
  return 0;
}
