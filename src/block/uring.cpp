#include "block/uring.hpp"

#include <fcntl.h>
#include <linux/falloc.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

namespace lodge::block {

std::shared_ptr<UringEngine> UringEngine::create(int& error) {
  std::shared_ptr<UringEngine> engine(new UringEngine);
  engine->ring_.ring_fd = -1;
  error = -io_uring_queue_init(entries, &engine->ring_, 0);
  if (error != 0) {
    engine->ring_.ring_fd = -1;
    return nullptr;
  }
  engine->collector_ = std::thread([raw = engine.get()] { raw->collect(); });
  return engine;
}

// Nothing is in flight any more: the files wait for their own requests.
UringEngine::~UringEngine() {
  if (collector_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
      io_uring_prep_nop(sqe);
      io_uring_sqe_set_data(sqe, nullptr);  // tells the collector to end
      hand_over();
    }
    collector_.join();
  }
  if (ring_.ring_fd >= 0) io_uring_queue_exit(&ring_);
}

void UringEngine::submit(Transfer transfer) noexcept {
  if (complete_at_once(transfer)) return;
  if (transfer.kind == Transfer::Kind::write)
    return threads_.run([t = std::move(transfer)]() mutable { t.done(execute(t)); });
  enqueue(std::make_unique<Transfer>(std::move(transfer)));
}

// The kernel may be short of memory for a moment; it takes what is in the queue later then.
void UringEngine::hand_over() noexcept {
  while (io_uring_sq_ready(&ring_) > 0) {
    const int result = io_uring_submit(&ring_);
    if (result == -EAGAIN || result == -EBUSY) std::this_thread::yield();
  }
}

void UringEngine::enqueue(std::unique_ptr<Transfer> transfer) noexcept {
  const std::lock_guard lock(mutex_);
  if (in_ring_ >= entries || !backlog_.empty()) return backlog_.push_back(std::move(transfer));
  prepare(std::move(transfer));
  if (plugged_ != std::this_thread::get_id()) hand_over();
}

void UringEngine::prepare(std::unique_ptr<Transfer> transfer) noexcept {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);  // there is one: in_ring_ is less than there are
  in_ring_++;
  Transfer& t = *transfer;
  const auto count = static_cast<unsigned>(std::min<size_t>(t.buffers.size(), IOV_MAX));
  switch (t.kind) {
    case Transfer::Kind::read: io_uring_prep_readv(sqe, t.fd, t.buffers.data(), count, t.offset); break;
    case Transfer::Kind::write: break;  // does not come here
    case Transfer::Kind::sync: io_uring_prep_fsync(sqe, t.fd, IORING_FSYNC_DATASYNC); break;
    case Transfer::Kind::punch:
    case Transfer::Kind::erase:
    case Transfer::Kind::zero:
      io_uring_prep_fallocate(sqe, t.fd,
                              (t.kind == Transfer::Kind::zero ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE) |
                                  FALLOC_FL_KEEP_SIZE,
                              static_cast<off_t>(t.offset), static_cast<off_t>(t.length));
      break;
  }
  io_uring_sqe_set_data(sqe, transfer.release());
}

void UringEngine::plug() noexcept {
  const std::lock_guard lock(mutex_);
  if (plugged_ == std::thread::id()) plugged_ = std::this_thread::get_id();
}

void UringEngine::unplug() noexcept {
  const std::lock_guard lock(mutex_);
  if (plugged_ == std::this_thread::get_id()) plugged_ = {};
  hand_over();
}

void UringEngine::collect() noexcept {
  for (;;) {
    io_uring_cqe* cqe = nullptr;
    if (io_uring_wait_cqe(&ring_, &cqe) != 0) continue;  // a signal
    const int result = cqe->res;
    std::unique_ptr<Transfer> transfer;
    {
      // The completion queue is only ours; the lock also orders us after the thread that submitted.
      const std::lock_guard lock(mutex_);
      transfer.reset(static_cast<Transfer*>(io_uring_cqe_get_data(cqe)));
      io_uring_cqe_seen(&ring_, cqe);
      if (!transfer) return;
      in_ring_--;
      for (; in_ring_ < entries && !backlog_.empty(); backlog_.pop_front())
        prepare(std::move(backlog_.front()));
      hand_over();
    }
    end(std::move(transfer), result);
  }
}

void UringEngine::end(std::unique_ptr<Transfer> transfer, int result) noexcept {
  Transfer& t = *transfer;
  if (result == -EINTR || result == -EAGAIN) return enqueue(std::move(transfer));
  if (t.kind == Transfer::Kind::read) {
    if (result < 0) return t.done(-result);
    drop_front(t.buffers, static_cast<size_t>(result));
    t.offset += static_cast<unsigned>(result);
    if (result > 0 && !t.buffers.empty()) return enqueue(std::move(transfer));
    for (const auto& buffer : t.buffers) std::memset(buffer.iov_base, 0, buffer.iov_len);  // beyond the end
    return t.done(0);
  }
  // What the file system cannot do has other ways, which may take long.
  if (result < 0 && t.kind != Transfer::Kind::sync)
    return threads_.run([taken = std::move(transfer)] { taken->done(execute(*taken)); });
  t.done(-result);
}

}  // namespace lodge::block
