// Which accelerators this host has, how fast each is, and which one fits.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kvm/kvm.hpp"
#include "vm/config.hpp"

namespace lodge::vm {

struct AcceleratorReport {
  std::string name;  // "kvm" or "soft"
  bool available = false;
  bool boots_kernels = false;  // a stock kernel could run
  double mips = 0;  // measured, million guest instructions a second of ring-0 code; 0: could not be
  std::vector<std::string> problems;  // why it is not available, or boots nothing: a sentence each
};

struct HostReport {
  AcceleratorReport kvm, soft;
  Accelerator choice = Accelerator::soft;  // what `auto` picks
  std::string why;
};

// Opens and measures; a few tenths of a second. Never throws for what it finds.
HostReport examine_host();

struct Selected {
  std::unique_ptr<kvm::System> system;
  std::string remark;  // why, when `auto` chose; a warning, when what was asked for will not do. Empty:
                       // nothing to say
};
// Opens what was asked for. Throws std::system_error when the host does not have it.
Selected open_accelerator(Accelerator wanted, const kvm::soft::Options& soft = {});

}  // namespace lodge::vm
