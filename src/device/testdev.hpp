// pc-testdev: lets bare-metal test programs provoke an accelerator.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string_view>
#include <vector>

#include "base/state.hpp"
#include "device/byte_window.hpp"
#include "machine/io.hpp"
#include "machine/memory.hpp"

namespace lodge::device {

struct TestdevState {
  static constexpr std::string_view name = "pc-testdev";
  static constexpr unsigned version = 1;
  uint32_t echo = 0;
  std::vector<uint8_t> memory;
  template <class V>
  void visit(V& v) {
    v("echo", echo), v("memory", memory);
  }
};

class Testdev final : public Savable {
 public:
  static constexpr uint64_t echo_port = 0xe0, echo_size = 4;  // a 32-bit register: any size, any part
  static constexpr uint64_t flush_port = 0xe4,
                            flush_size = 4;  // a gpa written here is dropped from the host's tables
  static constexpr uint64_t byte_port = 0xe8, byte_size = 1;   // the same register for byte accesses
  static constexpr uint64_t irq_port = 0x2000, irq_size = 24;  // one byte a GSI: its level
  static constexpr uint64_t memory_base = 0xff00'0000,
                            memory_size = 0x10000;  // answers as MMIO, keeps its contents

  // `line` gives the interrupt input of a GSI from 0 to 23, alive as long as this device.
  Testdev(machine::GuestMemory& ram, const std::function<machine::Interrupt&(unsigned gsi)>& line);

  machine::RegisterWindow& echo_window() noexcept { return echo_; }
  machine::RegisterWindow& flush_window() noexcept { return flush_; }
  machine::RegisterWindow& irq_window() noexcept { return irq_; }
  machine::RegisterWindow& memory_window() noexcept { return memory_; }

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  class EchoWindow final : public machine::RegisterWindow {
   public:
    explicit EchoWindow(Testdev& testdev) : testdev_(testdev) {}
    uint64_t read(uint64_t offset, unsigned size) noexcept override;
    void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;

   private:
    Testdev& testdev_;
  };
  class FlushWindow final : public machine::RegisterWindow {
   public:
    explicit FlushWindow(Testdev& testdev) : testdev_(testdev) {}
    uint64_t read(uint64_t, unsigned) noexcept override { return 0; }
    void write(uint64_t, unsigned, uint64_t value) noexcept override { testdev_.ram_.unmap_page(value); }

   private:
    Testdev& testdev_;
  };
  class IrqWindow final : public ByteWindow {
   public:
    explicit IrqWindow(Testdev& testdev) : testdev_(testdev) {}

   protected:
    uint8_t read_byte(uint64_t) noexcept override { return 0; }
    void write_byte(uint64_t offset, uint8_t value) noexcept override;

   private:
    Testdev& testdev_;
  };
  class MemoryWindow final : public machine::RegisterWindow {
   public:
    explicit MemoryWindow(Testdev& testdev) : testdev_(testdev) {}
    uint64_t read(uint64_t offset, unsigned size) noexcept override;
    void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;

   private:
    Testdev& testdev_;
  };

  machine::GuestMemory& ram_;
  std::array<machine::Interrupt*, irq_size> lines_;
  mutable std::mutex mutex_;
  TestdevState state_;
  EchoWindow echo_{*this};
  FlushWindow flush_{*this};
  IrqWindow irq_{*this};
  MemoryWindow memory_{*this};
};

}  // namespace lodge::device
