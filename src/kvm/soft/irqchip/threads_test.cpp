// The interrupt hardware from several threads at once, for the thread sanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "kvm/soft/irqchip/irqchip.hpp"
#include "kvm/soft/irqchip/test_support.hpp"

namespace lodge::kvm::soft {
namespace {

// All ways into a LAPIC at once. The periodic timers bring each vCPU to its last
// round even if an irqfd is de-assigned before its signal was seen.
TEST(IrqchipThreads, ConcurrentSourcesReachTwoVcpus) {
  constexpr int rounds = 300;
  RealClock clock;
  FakePort port0{clock}, port1{clock};
  Irqchip chip(clock);
  chip.create_full();
  chip.create_pit({});
  Lapic* lapics[] = {&chip.add_vcpu(0, port0), &chip.add_vcpu(1, port1)};
  std::atomic<int> taken[2] = {0, 0};
  const std::vector<kvm_irq_routing_entry> routes{msi_route(24, 0x61),
                                                  chip_route(10, KVM_IRQCHIP_IOAPIC, 10)};
  chip.set_gsi_routing(routes);
  for (auto* lapic : lapics) {
    lapic->mmio_write(0xf0, 0x1ff);
    lapic->mmio_write(0x320, 0x20041);
    lapic->mmio_write(0x380, 100'000);
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      FakePort& port = i == 0 ? port0 : port1;
      while (taken[i] < rounds) {
        ASSERT_TRUE(port.wait());
        while (lapics[i]->acknowledge() >= 0) {
          ++taken[i];
          lapics[i]->mmio_write(0xb0, 0);
          lapics[i]->mmio_write(0x310, i == 0 ? 1u << 24 : 0);
          lapics[i]->mmio_write(0x300, 0x4071);
        }
      }
    });
  }
  threads.emplace_back([&] {
    Fd event = Fd::event();
    kvm_irqfd request{};
    request.fd = static_cast<uint32_t>(event.get());
    request.gsi = 24;
    for (int i = 0; i < rounds; ++i) {
      request.flags = 0;
      chip.irqfd(request);
      signal_event(event.get());
      chip.irq_line(10, (i & 1) != 0);
      request.flags = KVM_IRQFD_FLAG_DEASSIGN;
      chip.irqfd(request);
      chip.set_gsi_routing(routes);
    }
  });
  for (auto& thread : threads) thread.join();
  for (auto* lapic : lapics) chip.remove_vcpu(*lapic);
}

// What vCPUs, devices and the VMM may do at any time, two threads at a time.
class EveryDoor {
 public:
  EveryDoor() {
    chip.create_full();
    chip.create_pit({.flags = KVM_PIT_SPEAKER_DUMMY});
    for (unsigned id = 0; id < 2; ++id) lapics.push_back(&chip.add_vcpu(id, *ports[id]));
    for (Lapic* lapic : lapics) lapic->mmio_write(0xf0, 0x1ff);
    chip.set_gsi_routing(std::vector{
        chip_route(4, KVM_IRQCHIP_PIC_MASTER, 4), chip_route(4, KVM_IRQCHIP_IOAPIC, 4),
        chip_route(9, KVM_IRQCHIP_PIC_SLAVE, 1), chip_route(9, KVM_IRQCHIP_IOAPIC, 9), msi_route(24, 0x61)});
  }
  ~EveryDoor() {
    for (Lapic* lapic : lapics) chip.remove_vcpu(*lapic);
  }

  using Random = std::mt19937;
  using Door = std::function<void(unsigned thread, Random&)>;
  std::vector<Door> doors{
      [this](unsigned, Random& random) { port(0x20 + random() % 2, random); },
      [this](unsigned, Random& random) { port(0xa0 + random() % 2, random); },
      [this](unsigned, Random& random) { port(0x4d0 + random() % 2, random); },
      [this](unsigned, Random& random) { port(0x40 + random() % 4, random); },
      [this](unsigned, Random& random) { port(0x61, random); },
      [this](unsigned, Random& random) { ioapic(random); },
      [this](unsigned, Random& random) { chip.irq_line(random() % 2 == 0 ? 4 : 9, random() % 2 == 0); },
      [this](unsigned thread, Random&) { lapics[thread]->acknowledge(); },
      [this](unsigned thread, Random&) { lapics[thread]->mmio_write(0xb0, 0); },
      [this](unsigned thread, Random& random) {
        if (random() % 2 == 0)
          lapics[thread]->mmio_read(0x20 + random() % 0x3e * 16);
        else
          lapics[thread]->mmio_write(0x80 + random() % 0x38 * 16, random() & 0x700ff);
      },
      [this](unsigned, Random&) { chip.signal_msi({.address_lo = 0xfee00000, .data = 0x62}); },
      [this](unsigned, Random& random) { state(random); },
      [this](unsigned thread, Random& random) { notify(thread, random); },
      [this](unsigned thread, Random& random) {
        const kvm_lapic_state saved = lapics[thread]->state(false);
        if (random() % 2 == 0) lapics[thread]->set_state(saved, false);
      },
  };

 private:
  void port(uint64_t number, Random& random) {
    auto value = static_cast<uint8_t>(random());
    if (random() % 2 == 0)
      chip.port_read(static_cast<uint16_t>(number), &value, 1);
    else
      chip.port_write(static_cast<uint16_t>(number), &value, 1);
  }
  void ioapic(Random& random) {
    const uint32_t select = random() % 0x40, value = random() & 0x1ffff;
    uint32_t seen = 0;
    chip.mmio_write(0xfec00000, &select, 4);
    random() % 2 == 0 ? chip.mmio_write(0xfec00010, &value, 4) : chip.mmio_read(0xfec00010, &seen, 4);
  }
  void state(Random& random) {
    const kvm_irqchip saved = chip.chip(random() % 3);
    const kvm_pit_state2 pit = chip.pit2();
    if (random() % 2 == 0) chip.set_chip(saved);
    if (random() % 2 == 0) chip.set_pit2(pit);
  }
  void notify(unsigned thread, Random& random) {
    kvm_ioeventfd request{};
    request.addr = 0x1000 + 8 * thread;
    request.len = 4;
    request.fd = events[thread].get();
    if (random() % 2 != 0) request.flags = KVM_IOEVENTFD_FLAG_DEASSIGN;
    error_of([&] { ioeventfds.set(request); });  // as it is, or is not, already
    ioeventfds.signal(false, 0x1000 + random() % 2 * 8, 4, 0);
  }

  RealClock clock;
  FakePort port0{clock}, port1{clock};
  std::array<FakePort*, 2> ports{&port0, &port1};
  Irqchip chip{clock};
  std::vector<Lapic*> lapics;
  IoEventfds ioeventfds;
  std::array<Fd, 2> events{Fd::event(), Fd::event()};
};

TEST(IrqchipThreads, EveryDoorStandsOpenToTwoThreads) {
  constexpr unsigned rounds = 20, tries = 20;
  EveryDoor hardware;
  const auto doors = static_cast<unsigned>(hardware.doors.size());
  // Every pair of doors, for a short time: other locks would order what a longer time brings together.
  std::barrier<> next(2);
  std::vector<std::jthread> threads;
  for (unsigned thread = 0; thread < 2; ++thread)
    threads.emplace_back([&, thread] {
      std::mt19937 random(thread);
      for (unsigned step = 0; step < rounds * doors * doors; ++step) {
        const auto& door = hardware.doors[thread == 0 ? step % doors : step / doors % doors];
        next.arrive_and_wait();
        for (unsigned n = 0; n < tries; ++n) door(thread, random);
      }
    });
}

}  // namespace
}  // namespace lodge::kvm::soft
