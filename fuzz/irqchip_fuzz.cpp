// Register accesses of a hostile guest, and hostile saved state, against the soft accelerator's interrupt
// hardware: 8259, 8254, IOAPIC and LAPIC as one irqchip with two vCPUs. Besides the sanitizers it checks that
// what a vCPU is promised (pending_vector) is what it gets (acknowledge), and that ports and timers never
// stall.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <system_error>

#include "base/clock.hpp"
#include "input.hpp"
#include "kvm/soft/irqchip/irqchip.hpp"

namespace {

using namespace lodge;
using namespace lodge::kvm::soft;

class Port final : public VcpuPort {
 public:
  explicit Port(const Clock& clock) : clock_(clock) {}
  void interrupt_changed() noexcept override {}
  void nmi() noexcept override {}
  void smi() noexcept override {}
  void init() noexcept override {}
  void sipi(uint8_t /*vector*/) noexcept override {}
  void unhalt() noexcept override {}
  uint64_t guest_tsc() const noexcept override { return clock_.now(); }
  uint64_t tsc_deadline_to_clock_ns(uint64_t guest_tsc) const noexcept override { return guest_tsc; }

 private:
  const Clock& clock_;
};

using Input = fuzz::Bytes;

void require(bool condition) {
  if (!condition) std::abort();
}

constexpr uint16_t ports[] = {0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x4d0, 0x4d1};

void access_port(Irqchip& chip, Input& in, bool write) {
  const uint16_t port = ports[in.take<uint8_t>() % std::size(ports)];
  uint32_t value = in.take<uint8_t>();
  const unsigned size = (value & 0x80) != 0 && (value & 7) == 7 ? 4 : 1;
  if (write)
    chip.port_write(port, &value, size);
  else
    chip.port_read(port, &value, size);
}

void access_ioapic(Irqchip& chip, Input& in) {
  const uint8_t select = in.take<uint8_t>();
  uint32_t value = in.take<uint32_t>();
  const uint64_t window = Ioapic::default_base + 0x10;
  chip.mmio_write(Ioapic::default_base, &select, 1);
  if ((value & 1) != 0)
    chip.mmio_read(window + (value & 0xe), &value, 4);
  else
    chip.mmio_write(window, &value, 4);
}

void access_lapic(Lapic& lapic, Input& in) {
  const uint8_t op = in.take<uint8_t>();
  const uint8_t reg = in.take<uint8_t>();
  uint64_t value = in.take<uint64_t>();
  switch (op & 7) {
    case 0: lapic.mmio_write(static_cast<uint32_t>(reg) << 4, static_cast<uint32_t>(value)); break;
    case 1: lapic.mmio(static_cast<uint32_t>(reg) * 5, (op & 8) != 0, &value, op >> 4 & 8 ? 8 : 4); break;
    case 2: lapic.msr_read(0x800 + reg, value); break;
    case 3: lapic.msr_write(0x800 + reg, value); break;
    case 4: lapic.set_apic_base(value, (op & 8) != 0); break;
    case 5: lapic.set_tsc_deadline(value); break;
    case 6: lapic.set_cr8(reg); break;
    default: lapic.mmio_write(0xb0, 0); break;
  }
}

// Paravirtual EOI, IPIs and kicks.
void hypercall(Irqchip& chip, Lapic& lapic, Input& in) {
  const uint8_t op = in.take<uint8_t>();
  const uint64_t targets[2] = {in.take<uint8_t>(), in.take<uint8_t>()};
  switch (op & 3) {
    case 0: lapic.defer_eoi(); break;
    case 1: lapic.settle_eoi((op & 4) != 0); break;
    case 2: {
      const int taken = chip.send_ipis(targets, in.take<uint8_t>() % 4, in.take<uint32_t>());
      require(taken <= 2);
      break;
    }
    default: chip.unhalt(op >> 2); break;
  }
}

void take_interrupts(Lapic& lapic) {
  for (int i = 0; i < 4; ++i) {
    const int promised = lapic.pending_vector();
    require(promised >= 0 ? lapic.maybe_pending() : true);
    const int got = lapic.acknowledge();
    require(promised == got);
    require(got >= -1 && got <= 255);
  }
}

void exchange_state(Irqchip& chip, Lapic& lapic, Input& in) {
  const uint8_t what = in.take<uint8_t>();
  const auto corrupt = [&](auto& state) {
    auto* bytes = reinterpret_cast<uint8_t*>(&state);
    for (int i = 0; i < 4; ++i) bytes[in.take<uint16_t>() % sizeof state] ^= in.take<uint8_t>();
  };
  if (what % 5 < 3) {
    kvm_irqchip state = chip.chip(what % 5);
    corrupt(state.chip);
    chip.set_chip(state);
  } else if (what % 5 == 3) {
    kvm_pit_state2 state = chip.pit2();
    corrupt(state);
    chip.set_pit2(state);
  } else {
    kvm_lapic_state state = lapic.state((what & 0x80) != 0);
    corrupt(state);
    lapic.set_state(state, (what & 0x40) != 0);
  }
}

void set_routing(Irqchip& chip, Input& in) {
  std::array<kvm_irq_routing_entry, 4> entries{};
  for (auto& entry : entries) {
    entry.gsi = in.take<uint8_t>() % 32;
    entry.type = 1 + in.take<uint8_t>() % 3;
    entry.u.msi.address_lo = in.take<uint8_t>() % 4;
    entry.u.msi.address_hi = in.take<uint8_t>() % 26;
    entry.u.msi.data = in.take<uint16_t>();
  }
  try {
    chip.set_gsi_routing(entries);
  } catch (const std::system_error&) {
    // Refused, as it should be: the table is unchanged.
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in({data, size});
  FakeClock clock;
  Port ports_of[2] = {Port(clock), Port(clock)};
  Irqchip chip(clock);
  chip.create_full();
  kvm_pit_config config{};
  config.flags = KVM_PIT_SPEAKER_DUMMY;
  chip.create_pit(config);
  Lapic* lapics[2] = {&chip.add_vcpu(0, ports_of[0]), &chip.add_vcpu(1, ports_of[1])};
  for (Lapic* lapic : lapics) lapic->mmio_write(0xf0, 0x1ff);
  // 300 operations reach any state of these chips; time per input stays bounded, so a time-out means a stall.
  for (int steps = 0; steps < 300 && !in.empty(); ++steps) {
    const uint8_t op = in.take<uint8_t>();
    Lapic& lapic = *lapics[op >> 7];
    switch (op & 15) {
      case 0:
      case 1: access_port(chip, in, false); break;
      case 2:
      case 3: access_port(chip, in, true); break;
      case 4: access_ioapic(chip, in); break;
      case 5:
      case 6: access_lapic(lapic, in); break;
      case 7: chip.irq_line(in.take<uint8_t>() % 32, (op & 16) != 0); break;
      case 8: {
        kvm_msi msi{};
        msi.address_lo = in.take<uint32_t>();
        msi.data = in.take<uint32_t>();
        chip.signal_msi(msi);
        break;
      }
      case 9:
        take_interrupts(lapic);
        if ((op & 16) != 0) hypercall(chip, lapic, in);
        break;
      case 10: clock.advance(in.take<uint16_t>() * 100u); break;
      case 11: clock.advance(in.take<uint16_t>() * 10'000u); break;
      case 12: exchange_state(chip, lapic, in); break;
      case 13: set_routing(chip, in); break;
      case 14: lapic.init_reset(); break;
      default: lapic.local_interrupt(static_cast<Lapic::Local>(0x33 + (op >> 4) % 4)); break;
    }
  }
  for (Lapic* lapic : lapics) take_interrupts(*lapic);
  return 0;
}
