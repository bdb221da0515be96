// The 8254 interval timer and the PC's port 0x61. See pit.cpp for what is modelled.
//
// Threads: all calls from any thread; the client is called without the PIT's lock held.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/clock.hpp"

namespace lodge::kvm::soft {

class Pit {
 public:
  static constexpr uint64_t frequency = 1193182;  // Hz

  class Client {
   public:
    virtual ~Client() = default;
    // A rising edge of channel 0's output. > 0: delivered, so that acknowledged() will follow.
    virtual int pit_interrupt() noexcept = 0;
  };

  // `speaker`: port 0x61 belongs to the PIT too (KVM_PIT_SPEAKER_DUMMY).
  Pit(Client& client, Clock& clock, bool speaker);

  bool handles_port(uint16_t port) const noexcept {
    return (port & ~3u) == 0x40 || (speaker_ && port == 0x61);
  }
  uint8_t read(uint16_t port) noexcept;
  void write(uint16_t port, uint8_t value) noexcept;

  // The guest completed channel 0's interrupt.
  void acknowledged() noexcept;
  // KVM_REINJECT_CONTROL: whether ticks that the guest was too slow for are delivered later (default) or
  // dropped.
  void set_reinject(bool on) noexcept;

  void reset() noexcept;
  kvm_pit_state2 state() noexcept;
  void set_state(const kvm_pit_state2& state) noexcept;

 private:
  using Channel = kvm_pit_channel_state;

  uint64_t elapsed(const Channel& channel) const noexcept;
  bool output(const Channel& channel) const noexcept;
  uint16_t counter(const Channel& channel) const noexcept;
  uint8_t status(const Channel& channel) const noexcept;
  void write_control(uint8_t value) noexcept;
  void latch_count(Channel& channel) noexcept;
  void write_count(unsigned index, uint8_t value) noexcept;
  void load(unsigned index, uint32_t value) noexcept;
  uint8_t read_count(Channel& channel) noexcept;
  void set_gate(unsigned index, bool level) noexcept;
  uint64_t ticks_at(uint64_t now) const noexcept;
  void schedule() noexcept;
  void expired() noexcept;
  void interrupt() noexcept;

  Client& client_;
  Clock& clock_;
  const bool speaker_;

  std::mutex mutex_;
  std::array<Channel, 3> channels_{};
  std::array<uint64_t, 3> frozen_{};  // nanoseconds counted when the gate of modes 0 and 4 fell
  uint32_t flags_ = 0;                // KVM_PIT_FLAGS_*
  uint64_t ticks_done_ = 0;           // interrupts of channel 0 since it was loaded
  uint64_t deadline_ = 0;             // of the next one; 0: none
  bool reinject_ = true;
  bool waiting_ = false;  // for the guest to complete an interrupt
  unsigned backlog_ = 0;  // ticks that came meanwhile

  std::unique_ptr<Timer> timer_;  // last: its destructor waits for a callback that uses the members above
};

}  // namespace lodge::kvm::soft
