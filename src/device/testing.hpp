// Fakes for the unit tests beside the chips.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "device/character.hpp"
#include "machine/io.hpp"

namespace lodge::device::testing {

class FakeInterrupt : public machine::Interrupt {
 public:
  void set(bool new_level) noexcept override {
    if (new_level && !level) rises++;
    level = new_level;
  }
  bool level = false;
  unsigned rises = 0;
};

class FakePower : public machine::Power {
 public:
  void request(machine::PowerRequest request) noexcept override { requests.push_back(request); }
  void exit_with(int status) noexcept override { exit_status = status; }
  std::vector<machine::PowerRequest> requests;
  std::optional<int> exit_status;
};

class FakeBackend : public CharBackend {
 public:
  size_t write(std::span<const uint8_t> bytes) noexcept override {
    size_t count = std::min(bytes.size(), room);
    output.append(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count));
    room -= count;
    return count;
  }
  void receive_ready() noexcept override { ready_calls++; }
  std::string output;
  size_t room = SIZE_MAX;
  unsigned ready_calls = 0;
};

// Saves `from`, loads the result into `to`, and says whether saving `to` gives the same.
template <class Device>
bool round_trip(const Device& from, Device& to) {
  nlohmann::json first, second;
  from.save(first);
  to.load(first);
  to.save(second);
  return first == second;
}

}  // namespace lodge::device::testing
