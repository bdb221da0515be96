// What a machine has counted so far: for `lodge run --stats` at its end and for the control socket at any
// time.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "device/disk.hpp"
#include "kvm/kvm.hpp"
#include "net/packet.hpp"

namespace lodge::vm {

class Machine;

struct Statistics {
  struct Balloon {
    uint64_t target = 0, actual = 0, released = 0;  // bytes, as device/virtio/balloon.hpp says
  };
  struct Network {
    std::string mac;
    net::Traffic to_guest, from_guest;
  };
  struct Disk {
    std::string name;
    device::Disk::Counts counts;  // since the last reset
  };
  std::string name, accelerator_name;
  std::string protocol;  // how the kernel was entered
  uint64_t port_exits = 0, memory_exits = 0, other_exits = 0;
  unsigned resets = 0;
  bool paused = false;
  double seconds = 0;       // since run() was called, or of it
  double vcpu_seconds = 0;  // CPU time of the vCPUs' threads, which also do what their exits ask for
  uint64_t memory = 0, resident = 0;  // bytes of guest RAM, and of it what the host holds
  std::optional<Balloon> balloon;
  std::vector<Network> networks;  // the cards, in the order of the configuration; since the last reset
  std::vector<Disk> disks;
  // What the accelerator has counted, all vCPUs together.
  std::vector<kvm::Statistic> accelerator;
};

// Adds the values of the same name, and what is new to `all`.
void add_statistics(std::vector<kvm::Statistic>& all, const std::vector<kvm::Statistic>& more);

// What the present machine itself tells.
void describe_machine(Machine& machine, Statistics& out);

// With rates of it, and the CPU time of the whole process.
nlohmann::ordered_json statistics_json(const Statistics& counted);

}  // namespace lodge::vm
