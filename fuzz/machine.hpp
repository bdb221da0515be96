// What a chip is wired to, where the wires end nowhere.
#pragma once

#include "machine/io.hpp"

namespace lodge::fuzz {

class Line final : public machine::Interrupt {
 public:
  void set(bool) noexcept override {}
};

class NoPower final : public machine::Power {
 public:
  void request(machine::PowerRequest) noexcept override {}
  void exit_with(int) noexcept override {}
};

}  // namespace lodge::fuzz
