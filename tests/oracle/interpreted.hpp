// Runs cases in the soft accelerator's interpreter: a processor in 64-bit mode at CPL 3, with the page tables
// that give it the addresses of case.hpp.
#pragma once

#include <memory>
#include <span>

#include "case.hpp"

namespace lodge::oracle {

class Interpreted {
 public:
  Interpreted();
  ~Interpreted();

  void run(const Case& c, std::span<const uint8_t> memory, Outcome& outcome);

 private:
  struct Machine;
  std::unique_ptr<Machine> machine_;
};

}  // namespace lodge::oracle
