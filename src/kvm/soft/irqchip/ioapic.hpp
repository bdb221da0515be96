// The I/O APIC with 24 inputs. See ioapic.cpp for what is modelled.
//
// Threads: all calls from any thread; the client's deliver() is called with the IOAPIC's lock held (lock
// order: IOAPIC, then LAPIC), acknowledgements without.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

#include "kvm/soft/irqchip/apic_message.hpp"

namespace lodge::kvm::soft {

class Ioapic {
 public:
  static constexpr uint64_t default_base = 0xfec00000;
  static constexpr unsigned pins = KVM_IOAPIC_NUM_PINS;

  class Client {
   public:
    virtual ~Client() = default;
    // How many LAPICs took it.
    virtual int deliver(const ApicMessage& message) noexcept = 0;
    // The guest completed an interrupt of `pin`.
    virtual void ioapic_acked(unsigned pin) noexcept = 0;
  };

  explicit Ioapic(Client& client);

  bool handles_gpa(uint64_t gpa) const noexcept { return gpa - default_base < 0x100; }
  // `offset` from the base. Accesses other than aligned 32-bit ones read the register's bytes and write the
  // low byte zero-extended, as in KVM.
  void read(uint32_t offset, void* data, unsigned size) noexcept;
  void write(uint32_t offset, const void* data, unsigned size) noexcept;

  // Level of `pin` as driven by `source` (0 to 31); the input is the OR of its sources.
  // > 0: delivered, 0: an edge that was pending already, or nobody took it; -1: masked or waiting for its
  // EOI.
  int set_irq(unsigned pin, unsigned source, bool level) noexcept;
  // A LAPIC completed `vector`. `broadcast`: clears remote IRR (level triggered, no EOI suppression); else
  // only listeners hear of it.
  void end_of_interrupt(uint8_t vector, bool broadcast) noexcept;
  // Whether an entry names `vector`; takes no lock.
  bool handles_vector(uint8_t vector) const noexcept {
    return (vectors_[vector / 64].load(std::memory_order_relaxed) >> (vector % 64) & 1) != 0;
  }

  void reset() noexcept;
  kvm_ioapic_state state() noexcept;
  void set_state(const kvm_ioapic_state& state) noexcept;

 private:
  void publish_vectors() noexcept;
  uint32_t read_indirect() const noexcept;
  void write_indirect(uint32_t value) noexcept;
  int service(unsigned pin) noexcept;

  Client& client_;
  std::mutex mutex_;
  uint8_t select_ = 0;
  uint8_t id_ = 0;
  uint32_t irr_ = 0;  // inputs that are high
  std::array<uint64_t, pins> entries_{};
  std::array<uint32_t, pins> sources_{};  // bit n: source n drives the input
  // Vectors that an entry names, for end_of_interrupt() without the lock: most EOIs are of LAPIC timers, IPIs
  // and MSIs.
  std::array<std::atomic<uint64_t>, 4> vectors_{};
};

}  // namespace lodge::kvm::soft
