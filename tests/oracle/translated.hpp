// Runs blocks in the soft accelerator as a guest's user program: a vCPU whose kernel is an IRETQ, and a HLT
// behind every exception gate. With Engine::translate every block is translated before its first run.
#pragma once

#include <memory>
#include <span>

#include "case.hpp"
#include "kvm/soft/options.hpp"

namespace lodge::oracle {

class Translated {
 public:
  static constexpr int32_t hung = -2, lost = -3;  // Outcome::exception: endless; left for no exception

  explicit Translated(kvm::soft::Engine engine);
  ~Translated();

  // Runs a case. `fresh_code`: it is another than that of the last run, or has changed itself.
  void run(const Case& c, bool fresh_code, std::span<const uint8_t> memory, Outcome& outcome);
  // Paths that became one piece so far.
  uint64_t superblocks() const;

 private:
  struct Machine;
  std::unique_ptr<Machine> machine_;
};

}  // namespace lodge::oracle
