// Transfers by io_uring: one ring, whose completions one thread collects.
//
// Writes that the page cache does not take at once go to threads of our own: the kernel would give them to
// its own threads, one at a time for a file, and filling holes 1 MiB at a time was ten times slower that way
// (500 against 5,400 MiB/s, Linux 6.18, ext4).
#pragma once

#include <liburing.h>

#include "block/transfer.hpp"

namespace lodge::block {

class UringEngine final : public TransferEngine {
 public:
  // Null, with the errno in `error`, when the kernel or a seccomp filter does not permit io_uring.
  static std::shared_ptr<UringEngine> create(int& error);
  ~UringEngine() override;

  void submit(Transfer transfer) noexcept override;
  void plug() noexcept override;
  void unplug() noexcept override;
  std::string_view name() const noexcept override { return "io_uring"; }

 private:
  // What the ring holds at a time; more waits in the backlog. The completion queue has room for twice as
  // many, so that it never overflows.
  static constexpr unsigned entries = 256;

  UringEngine() = default;
  void enqueue(std::unique_ptr<Transfer> transfer) noexcept;
  void prepare(std::unique_ptr<Transfer> transfer) noexcept;
  void hand_over() noexcept;
  void collect() noexcept;
  void end(std::unique_ptr<Transfer> transfer, int result) noexcept;

  io_uring ring_{};
  std::mutex mutex_;  // the submission queue and what follows
  unsigned in_ring_ = 0;
  std::deque<std::unique_ptr<Transfer>> backlog_;
  std::thread::id plugged_;  // the thread whose batch is being gathered
  std::thread collector_;
  WorkerPool threads_{4};  // for what the ring cannot do, or not well
};

}  // namespace lodge::block
