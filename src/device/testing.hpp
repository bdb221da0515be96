// Fakes for the unit tests beside the chips.
#pragma once

#include <mutex>
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

// Where messages and doorbells end: remembers both.
class FakePlatform : public machine::MsiTarget, public machine::Doorbells {
 public:
  void signal(uint64_t address, uint32_t data) noexcept override {
    const std::lock_guard lock(mutex);
    messages.emplace_back(address, data);
  }
  bool add(const machine::Doorbell& doorbell) noexcept override {
    doorbells.push_back(doorbell);
    return true;
  }
  void remove(const machine::Doorbell& doorbell) noexcept override {
    std::erase_if(doorbells, [&](const auto& known) {
      return known.address == doorbell.address && known.match == doorbell.match && known.fd == doorbell.fd;
    });
  }
  bool windows_are_cheaper() const noexcept override { return cheap_windows; }
  bool cheap_windows = false;
  std::mutex mutex;
  std::vector<std::pair<uint64_t, uint32_t>> messages;
  std::vector<machine::Doorbell> doorbells;
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
