// Transfers between memory and a file, and who executes them.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string_view>
#include <thread>
#include <vector>

#include "block/image.hpp"

namespace lodge::block {

struct Transfer {
  // read: what lies beyond the end of the file reads as zeros. sync: fdatasync. punch: the range reads as
  // zeros and takes no space; a hint where the file system cannot. zero: the range reads as zeros, always,
  // and keeps its space. erase: the range reads as zeros, always, and takes no space where the file system
  // can do that.
  enum class Kind : uint8_t { read, write, sync, punch, zero, erase };
  Kind kind = Kind::read;
  int fd = -1;
  uint64_t offset = 0;
  std::vector<iovec> buffers = {};  // read, write
  uint64_t length = 0;              // punch, zero, erase
  Completion done = {};
};

// Executes it on this thread; returns 0 or an errno and leaves `done` alone.
int execute(Transfer& transfer) noexcept;

// Reads what is in the page cache, on this thread and without waiting. True when that was everything;
// otherwise `transfer` is what is left to do.
bool read_cached(Transfer& transfer) noexcept;

// Drops the first `size` bytes of a scatter-gather list: what a short transfer has done.
void drop_front(std::vector<iovec>& buffers, size_t size) noexcept;

// Threads that are started when there is work for them, at most `limit`.
class WorkerPool {
 public:
  using Task = std::move_only_function<void()>;
  explicit WorkerPool(unsigned limit) : limit_(limit) {}
  ~WorkerPool();  // runs what is queued to its end
  void run(Task task) noexcept;

 private:
  void loop() noexcept;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Task> tasks_;
  std::vector<std::thread> threads_;
  const unsigned limit_;
  unsigned idle_ = 0;
  bool stop_ = false;
};

// May be shared by any number of files; outlives them.
class TransferEngine {
 public:
  virtual ~TransferEngine() = default;
  // Completes as block::Completion says; the file descriptor must live until then.
  virtual void submit(Transfer transfer) noexcept = 0;
  virtual void plug() noexcept {}
  virtual void unplug() noexcept {}
  virtual std::string_view name() const noexcept = 0;

 protected:
  // What the page cache can do at once is done on the caller's thread, which is faster than any hand-over:
  // reads of what is there, and writes that are not huge, as long as the kernel does not make writers wait
  // for the disk. True when `transfer` has been completed; otherwise it is what is left to do.
  bool complete_at_once(Transfer& transfer) noexcept;

 private:
  std::atomic<int64_t> slow_until_ = 0;  // nanoseconds of the steady clock: writes have been found to wait
};

class ThreadEngine final : public TransferEngine {
 public:
  void submit(Transfer transfer) noexcept override;
  std::string_view name() const noexcept override { return "threads"; }

 private:
  // As many as a disk with one queue gains from; a guest's queue depth beyond that waits here.
  WorkerPool pool_{4};
};

// Throws UsageError when `kind` is uring and the kernel does not permit it.
std::shared_ptr<TransferEngine> make_engine(Engine kind);

}  // namespace lodge::block
