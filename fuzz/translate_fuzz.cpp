// Random bytes as guest code for the translator: every block becomes host code before its first run. It must
// end in guest exceptions, a shutdown or the VMM's hands. A guest that loops is ended after some
// milliseconds.
#include "cpu_guest.hpp"
#include "watchdog.hpp"

namespace {

using namespace lodge;
constexpr unsigned max_exits = 16;
constexpr std::chrono::milliseconds patience{3};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static fuzz::Guest guest({.translate_after = 0, .superblock_after = 2, .code_cache = size_t{1} << 20});
  static fuzz::Watchdog watchdog(patience);
  if (size <= fuzz::header_size) return 0;
  const fuzz::Machine machine = fuzz::make_machine(guest, data, size);
  watchdog.start(*machine.vcpu);
  for (unsigned i = 0; i < max_exits; ++i) {
    const kvm::Exit exit = machine.vcpu->run();
    if (exit.interrupted() || !fuzz::answer(exit)) break;
  }
  watchdog.stop();
  return 0;
}
