// Every chip that a guest reaches through registers. The first byte picks the chip; the rest is a program of
// register accesses, inputs from the host and passing time. Afterwards the chip's saved state must load into
// a fresh chip and save as the same again, and state with one damaged field must load or be refused, never
// anything else.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>

#include "base/clock.hpp"
#include "base/error.hpp"
#include "device/acpi_pm.hpp"
#include "device/debug_ports.hpp"
#include "device/hpet.hpp"
#include "device/i8042.hpp"
#include "device/pci/chipset.hpp"
#include "device/pci/root.hpp"
#include "device/reduced_power.hpp"
#include "device/reset.hpp"
#include "device/rtc.hpp"
#include "device/serial.hpp"
#include "device/testdev.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/mmio.hpp"
#include "device/watchdog.hpp"
#include "input.hpp"
#include "machine.hpp"
#include "machine/bus.hpp"
#include "machine/layout.hpp"

namespace {

using namespace lodge;
namespace layout = machine::layout;

using Input = fuzz::Bytes;

// A back end that takes only some of what it is offered.
class Backend final : public device::CharBackend {
 public:
  size_t write(std::span<const uint8_t> bytes) noexcept override { return std::min(bytes.size(), room); }
  size_t room = SIZE_MAX;
};

// What the chips are plugged into. Each chip has a twin that loads its state.
struct Board {
  machine::Bus ports{"port", 0x10000};
  machine::Bus memory{"memory", uint64_t{1} << 52};
  machine::GuestMemory& ram;
  explicit Board(machine::GuestMemory& memory_of_guest) : ram(memory_of_guest) {}
  FakeClock clock;
  fuzz::NoPower power;
  Backend backend;
  std::deque<fuzz::Line> lines{24};
  std::function<machine::Interrupt&(unsigned)> line = [this](unsigned gsi) -> machine::Interrupt& {
    return lines.at(gsi);
  };
};

struct Chip {
  std::vector<std::pair<machine::RegisterWindow*, uint64_t>> windows;  // and their sizes
  Savable* state;
  Savable* twin;
  std::function<void(Input&)> event = [](Input&) {};
};

void check_saved_state(const Chip& chip, Input& input) {
  nlohmann::json first, second;
  chip.state->save(first);
  chip.twin->load(first);
  chip.twin->save(second);
  if (first != second) std::abort();
  if (first.size() > 2) {
    auto field = first.begin();
    std::advance(field, input.byte() % first.size());
    *field = input.number(8);
    try {
      chip.twin->load(first);
    } catch (const UsageError&) {
    }
  }
}

void run(Board& board, const Chip& chip, Input& input) {
  for (int step = 0; step < 512 && !input.empty(); step++) {
    uint8_t operation = input.byte();
    auto [window, size] = chip.windows[(operation >> 4) % chip.windows.size()];
    unsigned width = 1u << (operation & 3);
    uint64_t offset = input.number(2) % size;
    if (width > 4 && size <= 64) width = 1;  // ports have no 8-byte accesses
    offset = std::min(offset, size - std::min<uint64_t>(size, width));
    if (width > size) continue;
    switch (operation >> 2 & 3) {
      case 0: window->read(offset, width); break;
      case 1: window->write(offset, width, input.number(width)); break;
      case 2: chip.event(input); break;
      default: board.clock.advance(input.number(3) % 4'000'000); break;
    }
  }
  if (chip.state) check_saved_state(chip, input);
}

void fuzz_serial(Board& board, Input& input) {
  device::Serial chip(board.clock, board.lines[4], board.backend),
      twin(board.clock, board.lines[4], board.backend);
  auto event = [&](Input& from) {
    uint8_t what = from.byte();
    std::array<uint8_t, 32> bytes{};
    if (what & 1) chip.receive({bytes.data(), what / 8u});
    if (what & 2) chip.receive_break();
    board.backend.room = what & 4 ? SIZE_MAX : what >> 6;
    chip.transmit_ready();
  };
  run(board, {{{&chip, device::Serial::window_size}}, &chip, &twin, event}, input);
}

void fuzz_rtc(Board& board, Input& input) {
  device::Rtc chip(board.clock, board.lines[8]), twin(board.clock, board.lines[8]);
  auto event = [&](Input& from) {
    // Long enough for alarms and dates, with the wall clock stepped in both directions.
    board.clock.wall_start += from.number(6) - (uint64_t{1} << 47);
    chip.reset();
  };
  run(board, {{{&chip, device::Rtc::window_size}}, &chip, &twin, event}, input);
}

void fuzz_i8042(Board& board, Input& input) {
  device::I8042 chip(board.lines[1], board.lines[12], board.power),
      twin(board.lines[1], board.lines[12], board.power);
  run(board, {{{&chip.data_window(), 1}, {&chip.command_window(), 1}}, &chip, &twin}, input);
}

void fuzz_hpet(Board& board, Input& input) {
  device::HpetWiring wiring{board.lines[0], board.lines[8], board.line, [](bool) {}};
  device::Hpet chip(board.clock, wiring), twin(board.clock, wiring);
  auto event = [&](Input& from) { chip.rtc_input().set(from.byte() & 1); };
  run(board, {{{&chip, device::Hpet::window_size}, {&chip, 0x160}}, &chip, &twin, event}, input);
}

void fuzz_acpi_pm(Board& board, Input& input) {
  device::AcpiPm chip(board.clock, board.lines[9], board.power),
      twin(board.clock, board.lines[9], board.power);
  auto event = [&](Input& from) {
    chip.press_power_button();
    chip.raise_gpe(from.byte());
    board.clock.advance(from.number(5));
  };
  run(board, {{{&chip, device::AcpiPm::window_size}, {&chip.smi_window(), 2}}, &chip, &twin, event}, input);
}

void fuzz_watchdog(Board& board, Input& input) {
  device::Watchdog chip(board.clock, [] {}), twin(board.clock, [] {});
  auto event = [&](Input& from) { board.clock.advance(from.number(5)); };
  run(board, {{{&chip, device::Watchdog::window_size}}, &chip, &twin, event}, input);
}

void fuzz_reset(Board& board, Input& input) {
  device::ResetControl control(board.power), control_twin(board.power);
  device::Port92 port(board.power), port_twin(board.power);
  device::LatchPorts latch, latch_twin;
  run(board, {{{&control, 1}}, &control, &control_twin}, input);
  run(board, {{{&port, 1}}, &port, &port_twin}, input);
  run(board, {{{&latch, 16}}, &latch, &latch_twin}, input);
}

void fuzz_testdev(Board& board, Input& input) {
  device::Testdev chip(board.ram, board.line);
  run(board,
      {{{&chip.echo_window(), 4},
        {&chip.flush_window(), 4},
        {&chip.irq_window(), 24},
        {&chip.memory_window(), 0x10000}},
       nullptr,  // 64 KiB of saved memory would cost all the fuzzer's time
       nullptr},
      input);
}

// A function with BARs of every kind, whose windows may be looked into while they move.
class Card final : public device::pci::Function {
 public:
  explicit Card(device::LatchPorts& window) : Function("card", {0x1234, 0x5678, 0, 0xff0000}) {
    using enum device::pci::BarKind;
    add_bar(0, io, 16, window);
    add_bar(1, memory32, 0x1000, window);
    add_bar(2, memory64, 0x10000, window);
    add_bar(4, memory64_prefetchable, 0x1'0000'0000, window);
    use_interrupt_pin(1);
    config().allow(config().add_capability(9, 64) + 2, 4, 0xffff'ffff);
  }
};

// Two ports, one with a card that comes and goes: bus numbers and slots as the guest wishes.
void fuzz_root_port(Board& board, Input& input) {
  device::ResetControl reset(board.power);
  device::LatchPorts window;
  Card card(window);
  device::pci::RootPort port("a", 1), other("b", 2);
  device::pci::Root root(board.ports, board.memory, board.line, reset);
  root.add_port(1, port);
  root.add_port(2, other);
  auto event = [&](Input& from) {
    const uint8_t what = from.byte();
    if (port.occupied())
      root.unplug(card, what & 1);
    else
      port.plug(card, what & 1);
    if (what & 2) root.reset();
    if (what & 0x20) port.ask_to_let_go();
    card.set_intx(what & 4);
    root.ecam_window().write((what >> 3 & 3) << 20 | from.byte(), 4, from.number(4));
  };
  // Presence is what is plugged in, not what was saved: root_port_test compares states.
  run(board, {{{&root.ecam_window(), 0x10000}}, nullptr, nullptr, event}, input);
}

void fuzz_pci(Board& board, Input& input) {
  device::ResetControl reset(board.power);
  device::LatchPorts window;
  device::pci::HostBridge bridge;
  device::pci::LpcBridge lpc;
  Card card(window), twin(window);
  device::pci::Root root(board.ports, board.memory, board.line, reset);
  root.add(0, 0, bridge);
  root.add(0x1f, 0, lpc);
  root.add(1, 0, card);
  board.ports.add(device::pci::Root::ports_base, 8, root.port_window(), "pci");
  board.memory.add(layout::ecam_base, layout::ecam_size, root.ecam_window(), "ecam");
  // Accesses to the card's configuration, and to wherever its BARs may be by now.
  auto event = [&](Input& from) {
    uint8_t what = from.byte();
    board.ports.write(0xcf8, 4, 0x8000'0800 | (what & 0xfc));
    board.ports.write(0xcfc + (what & 3), 4, from.number(4));
    card.set_intx(what & 1);
    board.memory.read(from.number(6), 8);
    board.ports.read(from.number(2), 4);
  };
  Chip chip{{{&root.port_window(), 8}, {&root.ecam_window(), 0x10000}}, &card, &twin, event};
  run(board, chip, input);
}

void fuzz_reduced_power(Board& board, Input& input) {
  device::ReducedPower chip(board.lines[9], board.power), twin(board.lines[9], board.power);
  run(board, {{{&chip, 4}}, &chip, &twin, [&](Input&) { chip.press_power_button(); }}, input);
}

class NoDoorbells final : public machine::Doorbells {
 public:
  bool add(const machine::Doorbell&) noexcept override { return false; }
  void remove(const machine::Doorbell&) noexcept override {}
};

// The transport's registers with the simplest device behind them; virtio_fuzz has the rings.
void fuzz_virtio_mmio(Board& board, Input& input) {
  namespace virtio = device::virtio;
  const auto zeroes = [](std::span<uint8_t>) {};
  NoDoorbells none;
  virtio::MmioTransport chip(std::make_unique<virtio::Entropy>(board.ram, virtio::RingFeatures{}, zeroes),
                             board.lines[16], none);
  virtio::MmioTransport twin(std::make_unique<virtio::Entropy>(board.ram, virtio::RingFeatures{}, zeroes),
                             board.lines[17], none);
  const auto event = [&](Input& from) {
    std::array<uint8_t, 8> bytes{};
    for (auto& byte : bytes) byte = from.byte();
    board.ram.write(from.number(2), bytes);
    chip.device().kick(0);
  };
  run(board, {{{&chip, 0x104}}, &chip, &twin, event}, input);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input({data, size});
  static machine::GuestMemory ram(layout::MiB);  // only the test device touches it, and only its mappings
  Board board(ram);
  switch (input.byte() % 12) {
    case 0: fuzz_serial(board, input); break;
    case 1: fuzz_rtc(board, input); break;
    case 2: fuzz_i8042(board, input); break;
    case 3: fuzz_hpet(board, input); break;
    case 4: fuzz_acpi_pm(board, input); break;
    case 5: fuzz_reset(board, input); break;
    case 9: fuzz_watchdog(board, input); break;
    case 6: fuzz_testdev(board, input); break;
    case 7: fuzz_reduced_power(board, input); break;
    case 8: fuzz_virtio_mmio(board, input); break;
    case 10: fuzz_root_port(board, input); break;
    default: fuzz_pci(board, input); break;
  }
  return 0;
}
