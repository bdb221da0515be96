// irqfds (KVM_IRQFD): eventfds whose signal raises an interrupt line, with one thread that waits for all of
// them.
//
// Threads: any. The client is called with the lock of this object held, from the irqfd thread or from
// acked(); it must not call back synchronously.
#pragma once

#include <linux/kvm.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <thread>

#include "base/fd.hpp"

namespace lodge::kvm::soft {

class Irqfds {
 public:
  // Interrupt sources of a line, whose levels are ORed: KVM_IRQ_LINE and irqfds without, and with,
  // resampling.
  static constexpr unsigned source_user = 0;
  static constexpr unsigned source_resample = 1;

  class Client {
   public:
    virtual ~Client() = default;
    virtual int set_irq(uint32_t gsi, unsigned source, bool level) noexcept = 0;
  };

  explicit Irqfds(Client& client) : client_(client) {}
  ~Irqfds();

  // KVM_IRQFD, also with KVM_IRQFD_FLAG_DEASSIGN (no error when there is none). The eventfds are duplicated,
  // so closing them does not de-assign. When a de-assignment returns, that irqfd raises nothing any more.
  // Throws std::system_error: EINVAL, EBADF, EBUSY (the eventfd is an irqfd already).
  void set(const kvm_irqfd& request);

  // The guest completed an interrupt of `gsi`: lowers the line of resampling irqfds and tells their owners.
  void acked(uint32_t gsi) noexcept;

 private:
  struct Entry {
    uint64_t identity;
    uint32_t gsi;
    Fd event;
    Fd resample;  // none: edge
  };
  void assign(const kvm_irqfd& request, uint64_t identity);
  void deassign(const kvm_irqfd& request, uint64_t identity);
  void start();
  void loop() noexcept;

  Client& client_;
  std::mutex mutex_;
  std::map<uint64_t, Entry> entries_;  // by the tag that epoll hands back
  uint64_t next_tag_ = 1;
  std::atomic<unsigned> resampling_{0};
  std::atomic<bool> stop_{false};
  Fd epoll_;
  Fd wake_;
  std::thread thread_;  // started by the first irqfd
};

}  // namespace lodge::kvm::soft
