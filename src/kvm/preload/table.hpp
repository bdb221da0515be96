// Which descriptors of the process are ours. For all others contains() is one load, and nothing else happens.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "kvm/preload/file.hpp"

namespace lodge::kvm::preload {

class Table {
 public:
  static constexpr int limit = 1 << 20;  // fs.nr_open unless configured

  bool contains(int fd) const noexcept {
    return static_cast<unsigned>(fd) < limit &&
           (bits_[fd / 64].load(std::memory_order_acquire) >> fd % 64 & 1) != 0;
  }
  std::shared_ptr<File> find(int fd) noexcept;  // or null

  // Takes the descriptor in; returns its number. Throws std::system_error (EMFILE).
  int add(OpenedFile opened);
  // `copy` was made of `fd` by the kernel. Whatever `copy` was before is gone.
  void duplicate(int fd, int copy) noexcept;
  // Before the kernel closes `fd` (whose number somebody else may have right after), or when it has made it
  // another file. The File goes with the last descriptor.
  void remove(int fd) noexcept;
  void remove_range(unsigned first, unsigned last) noexcept;

  // Around fork(), so that the child does not inherit a lock that is held.
  void before_fork() noexcept { mutex_.lock(); }
  void after_fork() noexcept { mutex_.unlock(); }

 private:
  void set(int fd, std::shared_ptr<File> file);

  std::array<std::atomic<uint64_t>, limit / 64> bits_{};
  std::mutex mutex_;
  std::map<int, std::shared_ptr<File>> files_;
};

// The process's. Never destroyed: its threads may still run when the process exits.
Table& table() noexcept;

}  // namespace lodge::kvm::preload
