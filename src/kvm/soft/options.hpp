// How the soft accelerator runs guests.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lodge::kvm::soft {

enum class Engine : uint8_t {
  translate,  // host code for what runs often, the interpreter for the rest
  interpret,  // the interpreter alone: the reference
  lockstep,   // every translated block is run by both, and the VM stops where they differ
};

struct Options {
  Engine engine = Engine::translate;
  uint32_t translate_after = 16;  // runs of a block by the interpreter before it becomes host code
  // Turns of a loop before the path that the guest takes from its head becomes one piece; 0: never. At most
  // 2^31.
  uint32_t superblock_after = 2048;
  size_t code_cache = size_t{64} << 20;  // bytes of host code of all vCPUs, at most; at least 1 MiB
  unsigned idle_ms = 10'000;  // a vCPU idle for so long gives memory for decoded and translated code back
  bool perf_map = false;      // names translated code for perf in /tmp/perf-PID.map
  // Write-protects pages of code in the VMM's own mapping of guest memory, so that a VMM which does not call
  // Vm::note_write (a client of /dev/kvm) is noticed all the same. Needs a SIGSEGV handler of the process.
  bool guard_code = false;
  bool count = false;  // guest instructions and look-ups of translated code: costs some of its speed
};

}  // namespace lodge::kvm::soft
