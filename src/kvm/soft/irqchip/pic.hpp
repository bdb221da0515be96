// The pair of 8259 interrupt controllers of a PC. See pic.cpp for what is modelled.
//
// Threads: all calls from any thread; the client is called without the PIC's lock held.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

namespace lodge::kvm::soft {

class Pic {
 public:
  class Client {
   public:
    virtual ~Client() = default;
    // INTR rose, or a new request came while it was high.
    virtual void pic_output() noexcept = 0;
    // The guest completed interrupt `irq` (0 to 15).
    virtual void pic_acked(unsigned irq) noexcept = 0;
  };

  explicit Pic(Client& client);

  static bool handles_port(uint16_t port) noexcept {
    return (port & ~0x81u) == 0x20 || port == 0x4d0 || port == 0x4d1;
  }
  uint8_t read(uint16_t port) noexcept;
  void write(uint16_t port, uint8_t value) noexcept;

  // Level of input `irq` (0 to 15) as driven by `source` (0 to 31); the input is the OR of its sources.
  // 1: delivered, 0: coalesced with a pending edge, -1: masked.
  int set_irq(unsigned irq, unsigned source, bool level) noexcept;

  bool output() const noexcept { return output_.load(std::memory_order_acquire); }
  int peek() noexcept;         // the vector that an INTA cycle would give; -1: INTR is low
  int acknowledge() noexcept;  // INTA cycle; without a request it gives the spurious vector of input 7

  void reset() noexcept;
  kvm_pic_state state(unsigned chip) noexcept;  // 0: master, 1: slave
  void set_state(unsigned chip, const kvm_pic_state& state) noexcept;

 private:
  // Interrupts completed by an operation; reported when the lock is released.
  using Acked = uint16_t;

  void write_command(unsigned chip, uint8_t value, Acked& acked) noexcept;
  void write_data(unsigned chip, uint8_t value) noexcept;
  void write_ocw2(unsigned chip, uint8_t value, Acked& acked) noexcept;
  uint8_t poll(unsigned chip, Acked& acked) noexcept;
  int set_input(kvm_pic_state& chip, unsigned pin, bool level) noexcept;
  int pending(const kvm_pic_state& chip) const noexcept;
  void take(unsigned chip, unsigned pin, Acked& acked) noexcept;
  void complete(unsigned chip, unsigned pin, Acked& acked) noexcept;
  void init_chip(unsigned chip, Acked& acked) noexcept;
  bool update() noexcept;
  int vector(bool take_it, Acked& acked) noexcept;
  void report(bool raised, Acked acked) noexcept;

  Client& client_;
  std::mutex mutex_;
  std::array<kvm_pic_state, 2> chips_{};
  std::array<uint32_t, 16> sources_{};  // bit n: source n drives the input high
  std::atomic<bool> output_{false};
};

}  // namespace lodge::kvm::soft
