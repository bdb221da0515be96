#include "block/transfer.hpp"

#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <system_error>

#include "base/error.hpp"
#include "block/requests.hpp"
#include "block/uring.hpp"

namespace lodge::block {
namespace {

// A larger write would keep this thread for too long; two threads do not write to one file faster than one
// does, they wait for its lock. A write that took 0.5 ms longer than its bytes need (4 KiB: 1 us) has waited
// for the disk, and those after it would too: for a while they wait on other threads. A kernel that makes
// writers pause does so for 10 to 200 ms (a thread that another has pushed aside is back before that); as the
// thread here may be a vCPU's, it tries again only when that cost it one part in fifty.
constexpr uint64_t at_once_bytes = 2 << 20;
constexpr int64_t slow_write = 500'000, slow_period = 20'000'000, pause = 10'000'000, pause_share = 50;

int64_t steady_nanoseconds() noexcept {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

// The kernel takes at most IOV_MAX pieces at a time.
int vector_count(const std::vector<iovec>& buffers) noexcept {
  return static_cast<int>(std::min<size_t>(buffers.size(), IOV_MAX));
}

int read_all(int fd, std::vector<iovec>& buffers, uint64_t offset) noexcept {
  while (!buffers.empty()) {
    const ssize_t done = ::preadv(fd, buffers.data(), vector_count(buffers), static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (done == 0) {  // beyond the end
      for (const auto& buffer : buffers) std::memset(buffer.iov_base, 0, buffer.iov_len);
      return 0;
    }
    drop_front(buffers, static_cast<size_t>(done));
    offset += static_cast<size_t>(done);
  }
  return 0;
}

int write_all(int fd, std::vector<iovec>& buffers, uint64_t offset) noexcept {
  while (!buffers.empty()) {
    const ssize_t done = ::pwritev(fd, buffers.data(), vector_count(buffers), static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (done == 0) return ENOSPC;
    drop_front(buffers, static_cast<size_t>(done));
    offset += static_cast<size_t>(done);
  }
  return 0;
}

int allocate(int fd, int mode, uint64_t offset, uint64_t length) noexcept {
  for (;;) {
    if (::fallocate(fd, mode, static_cast<off_t>(offset), static_cast<off_t>(length)) == 0) return 0;
    if (errno != EINTR) return errno;
  }
}

bool unsupported(int error) noexcept {
  return error == EOPNOTSUPP || error == ENOSYS || error == ENODEV || error == EINVAL;
}

int write_zeros(int fd, uint64_t offset, uint64_t length) noexcept {
  static constexpr size_t piece = 64 * 1024;
  static const std::vector<uint8_t> zeros(piece);
  while (length > 0) {
    const uint64_t size = std::min<uint64_t>(length, piece);
    std::vector<iovec> buffers{{const_cast<uint8_t*>(zeros.data()), size}};
    if (const int error = write_all(fd, buffers, offset)) return error;
    offset += size;
    length -= size;
  }
  return 0;
}

}  // namespace

void drop_front(std::vector<iovec>& buffers, size_t size) noexcept {
  auto it = buffers.begin();
  while (it != buffers.end() && size >= it->iov_len) size -= (it++)->iov_len;
  buffers.erase(buffers.begin(), it);
  if (size == 0 || buffers.empty()) return;
  buffers.front().iov_base = static_cast<uint8_t*>(buffers.front().iov_base) + size;
  buffers.front().iov_len -= size;
}

int execute(Transfer& t) noexcept {
  switch (t.kind) {
    case Transfer::Kind::read: return read_all(t.fd, t.buffers, t.offset);
    case Transfer::Kind::write: return write_all(t.fd, t.buffers, t.offset);
    case Transfer::Kind::sync: return ::fdatasync(t.fd) == 0 ? 0 : errno;
    case Transfer::Kind::punch: {
      const int error = allocate(t.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, t.offset, t.length);
      return unsupported(error) ? 0 : error;
    }
    case Transfer::Kind::erase:
      if (const int error = allocate(t.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, t.offset, t.length);
          !unsupported(error))
        return error;
      [[fallthrough]];
    case Transfer::Kind::zero: {
      const int error = allocate(t.fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, t.offset, t.length);
      return unsupported(error) ? write_zeros(t.fd, t.offset, t.length) : error;
    }
  }
  return EINVAL;
}

WorkerPool::~WorkerPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void WorkerPool::run(Task task) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (idle_ <= tasks_.size() && threads_.size() < limit_) try {
        threads_.emplace_back([this] { loop(); });
      } catch (
          const std::system_error&) {  // the process may have no more threads: those that are there do it
      }
    if (!threads_.empty()) {
      tasks_.push_back(std::move(task));
      task = nullptr;
    }
  }
  if (task) return task();
  work_.notify_one();
}

void WorkerPool::loop() noexcept {
  std::unique_lock lock(mutex_);
  for (;;) {
    while (tasks_.empty()) {
      if (stop_) return;
      idle_++;
      work_.wait(lock);
      idle_--;
    }
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // what it holds goes before the lock is taken again
    lock.lock();
  }
}

bool TransferEngine::complete_at_once(Transfer& t) noexcept {
  if (t.kind == Transfer::Kind::read) {
    const ssize_t done =
        ::preadv2(t.fd, t.buffers.data(), vector_count(t.buffers), static_cast<off_t>(t.offset), RWF_NOWAIT);
    if (done > 0) {
      drop_front(t.buffers, static_cast<size_t>(done));
      t.offset += static_cast<size_t>(done);
    }
    if (!t.buffers.empty()) return false;
    t.done(0);
    return true;
  }
  const uint64_t bytes = total_length(t.buffers);
  if (t.kind != Transfer::Kind::write || bytes > at_once_bytes) return false;
  const int64_t begin = steady_nanoseconds();
  if (begin < slow_until_.load(std::memory_order_relaxed)) return false;
  const int error = execute(t);
  const int64_t end = steady_nanoseconds();
  if (const int64_t took = end - begin; took > slow_write + static_cast<int64_t>(bytes / 4))
    slow_until_.store(end + (took < pause ? slow_period : took * pause_share), std::memory_order_relaxed);
  t.done(error);
  return true;
}

void ThreadEngine::submit(Transfer transfer) noexcept {
  if (complete_at_once(transfer)) return;
  pool_.run([transfer = std::move(transfer)]() mutable { transfer.done(execute(transfer)); });
}

std::shared_ptr<TransferEngine> make_engine(Engine kind) {
  if (kind == Engine::threads) return std::make_shared<ThreadEngine>();
  int error = 0;
  if (auto uring = UringEngine::create(error)) return uring;
  if (kind == Engine::uring) {
    usage_error("io_uring is not permitted here ({}); choose the engine 'threads' or 'auto'",
                std::generic_category().message(error));
  }
  return std::make_shared<ThreadEngine>();
}

}  // namespace lodge::block
