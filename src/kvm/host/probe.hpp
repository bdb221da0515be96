// What a /dev/kvm can really do, measured. The device's presence proves little: some vendor modules run only
// user code natively, emulate the rest at about one million instructions a second and give up at instructions
// that every kernel executes. The probe runs tiny 64-bit guests, each with a time limit, and judges from what
// they did.
//
// Any thread; it starts and joins a helper thread. Takes some 50 ms, at most about 0.7 s whatever the device
// does.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "kvm/kvm.hpp"

namespace lodge::kvm::host {

struct Ability {
  enum class Result {
    works,        // the guest ran it and the result was right
    fails,        // it did not; `detail` says how
    not_offered,  // the processor's CPUID does not have it, so no kernel will try
    not_tried,    // the probe's time had run out
  };
  std::string_view name;  // "INT3"
  std::string_view need;  // what depends on it: "breakpoints and kernel code patching"
  bool required;          // a stock 64-bit kernel cannot boot without it (where it is offered)
  Result result;
  std::string detail;  // for `fails`: "internal error: suberror 1"
};

struct Probe {
  bool available = false;  // the device could be opened and makes VMs and vCPUs
  std::string error;       // why not, one sentence for the user
  double kernel_mips = 0;  // million instructions a second of a loop at ring 0
  double user_mips = 0;    // the same at ring 3; 0 where ring 3 cannot be entered
  std::vector<Ability> abilities;
  bool can_boot_stock_kernel = false;
  std::vector<std::string> reasons;  // why not; empty when it can
};

// Below this a stock kernel takes minutes to its first user process (it executes some 3e9 instructions to get
// there).
constexpr double needed_mips = 30;

// Never throws for what the device does or lacks: that is the result.
Probe probe(const std::string& path = "/dev/kvm");
// The same for an accelerator that is already open; soft may be measured with it as well.
Probe probe(System& system);

}  // namespace lodge::kvm::host
