#include "block/qcow2/image.hpp"

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "block/qcow2/run.hpp"

namespace lodge::block::qcow2 {

Qcow2Image::Qcow2Image(Parts parts, bool read_only)
    : storage_(std::move(parts.storage)),
      data_(std::move(parts.data)),
      backing_(std::move(parts.backing)),
      read_only_(read_only),
      metadata_(*storage_, data_.get(), std::move(parts.header), !read_only, parts.cache),
      l2_entries_(metadata_.header().l2_entries()),
      subcluster_bits_(metadata_.cluster_bits() - (metadata_.header().extended_l2() ? 5 : 0)),
      zeros_(metadata_.cluster_size()),
      size_(metadata_.header().size),
      bitmaps_marked_(!metadata_.header().extension(extension_bitmaps)) {
  load_snapshots();
  // Features of which we know nothing but that a writer who does not keep them up has to say so.
  if (!read_only_ && (header().autoclear & ~known_autoclear)) {
    metadata_.change_header().autoclear &= known_autoclear;
    if (const int error = metadata_.commit()) throw_errno(error, storage_->path());
  }
}

Qcow2Image::~Qcow2Image() {
  close();
}

// --- requests ----------------------------------------------------------------------------------------------

std::vector<iovec> Qcow2Image::slice(const Request& request, uint64_t at, uint64_t length) const {
  std::vector<iovec> result;
  if (request.kind != Request::Kind::read && request.kind != Request::Kind::write) {
    for (; length > 0; length -= result.back().iov_len)
      result.push_back({const_cast<uint8_t*>(zeros_.data()), std::min<uint64_t>(length, zeros_.size())});
    return result;
  }
  for (const auto& buffer : request.buffers) {
    if (length == 0) break;
    if (at >= buffer.iov_len) {
      at -= buffer.iov_len;
      continue;
    }
    const uint64_t size = std::min<uint64_t>(buffer.iov_len - at, length);
    result.push_back({static_cast<uint8_t*>(buffer.iov_base) + at, size});
    length -= size;
    at = 0;
  }
  return result;
}

void Qcow2Image::start(Request::Kind kind, std::span<const iovec> buffers, uint64_t offset, uint64_t length,
                       bool unmap, Completion done) noexcept {
  const bool change = kind != Request::Kind::read;
  const uint64_t size = size_;
  if (offset > size || length > size - offset) return done(EINVAL);
  if (change && read_only_) return done(EROFS);
  if (length == 0) return done(0);
  if (direct(kind, buffers, offset, length, done)) return;
  auto request = std::make_shared<Request>();
  request->kind = kind;
  request->buffers.assign(buffers.begin(), buffers.end());
  request->offset = offset;
  request->length = length;
  request->unmap = unmap;
  request->done = inflight_.enter(std::move(done));
  {
    const Lock lock(metadata_.mutex());
    if (exclusive_) {
      gated_.push_back(std::move(request));
      return;
    }
    active_++;
  }
  proceed(std::move(request), false);
}

// The common case, with as little as possible around it: one row of data where it is to stay. False: the
// request is for the long way, and `done` still the caller's.
bool Qcow2Image::direct(Request::Kind kind, std::span<const iovec> buffers, uint64_t offset, uint64_t length,
                        Completion& done) noexcept {
  const bool write = kind == Request::Kind::write;
  if (kind != Request::Kind::read && !(write && bitmaps_marked_)) return false;
  Run run;
  uint64_t epoch = 0;
  {
    const Lock lock(metadata_.mutex());
    if (exclusive_ || find_run(offset, length, run) != 0) return false;
    if (run.kind != Run::Kind::data || run.length != length) return false;
    if (write && (!run.writable || !may_write(run))) return false;
    active_++;
    epoch = metadata_.enter_epoch();
  }
  auto ended = [this, epoch, done = std::move(done)](int error) mutable {
    done(error);
    done = nullptr;
    const Lock lock(metadata_.mutex());
    metadata_.leave_epoch(epoch);
    if (--active_ == 0) idle_.notify_all();
  };
  std::vector<iovec> list(buffers.begin(), buffers.end());
  if (write)
    data().write(std::move(list), run.host, std::move(ended));
  else
    data().read(std::move(list), run.host, std::move(ended));
  return true;
}

void Qcow2Image::to_worker(RequestPtr request) noexcept {
  workers_.run([this, request = std::move(request)]() mutable { proceed(std::move(request), true); });
}

void Qcow2Image::proceed(RequestPtr request, bool worker) noexcept {
  Lock lock(metadata_.mutex());
  if (request->kind != Request::Kind::read && !bitmaps_marked_) {
    lock.unlock();
    if (!worker) return to_worker(std::move(request));
    if (const int error = mark_bitmaps_in_use()) request->error = error;
    lock.lock();
  }
  for (unsigned steps = 1; request->at < request->length && request->error == 0; steps++) {
    if (steps % 1024 == 0) {  // let others in between
      lock.unlock();
      lock.lock();
    }
    int error = 0;
    switch (request->kind) {
      case Request::Kind::read: error = read_step(lock, request, worker); break;
      case Request::Kind::write:
        error = write_step(lock, request, request->length - request->at, worker);
        break;
      case Request::Kind::zeroes:
      case Request::Kind::discard: error = change_step(lock, request, worker); break;
    }
    if (error == EBUSY) return;
    if (error == EAGAIN) {
      lock.unlock();
      return to_worker(std::move(request));
    }
    if (error) request->error = error;
  }
  lock.unlock();
  part_ended(request, 0);
}

void Qcow2Image::part_ended(const RequestPtr& request, int error) noexcept {
  if (error) request->error = error;
  if (--request->pending != 0) return;
  {
    const Lock lock(metadata_.mutex());
    if (--active_ == 0) idle_.notify_all();
  }
  request->done(request->error);
}

void Qcow2Image::read(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept {
  start(Request::Kind::read, buffers, offset, total_length(buffers), false, std::move(done));
}

void Qcow2Image::write(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept {
  start(Request::Kind::write, buffers, offset, total_length(buffers), false, std::move(done));
}

void Qcow2Image::discard(uint64_t offset, uint64_t length, Completion done) noexcept {
  start(Request::Kind::discard, {}, offset, length, true, std::move(done));
}

void Qcow2Image::write_zeroes(uint64_t offset, uint64_t length, bool unmap, Completion done) noexcept {
  start(Request::Kind::zeroes, {}, offset, length, unmap, std::move(done));
}

// --- flush
// ---------------------------------------------------------------------------------------------------

void Qcow2Image::flush(Completion done) noexcept {
  if (read_only_) return done(0);
  {
    const Lock lock(metadata_.mutex());
    flushes_.push_back(inflight_.enter(std::move(done)));
    if (flushes_.size() > 1) return;  // who came first takes us along, or has not begun
  }
  flusher_.run([this] { flush_queued(); });
}

// One commit answers all that wait when it begins.
void Qcow2Image::flush_queued() noexcept {
  std::vector<Completion> flushes;
  {
    const Lock lock(metadata_.mutex());
    flushes = std::exchange(flushes_, {});
  }
  const int error = metadata_.commit();
  for (auto& done : flushes) done(error);
}

// --- changes of the whole
// ------------------------------------------------------------------------------------

int Qcow2Image::exclusively(const std::function<int(Lock&)>& change) noexcept {
  const std::lock_guard one(exclusive_mutex_);
  Lock lock(metadata_.mutex());
  exclusive_ = true;
  idle_.wait(lock, [this] { return active_ == 0; });
  const int error = change(lock);
  exclusive_ = false;
  auto gated = std::exchange(gated_, {});
  active_ += gated.size();
  lock.unlock();
  for (auto& request : gated) {
    // The disk may have become smaller meanwhile.
    if (request->offset + request->length > size_) request->error = EINVAL;
    to_worker(std::move(request));
  }
  return error;
}

void Qcow2Image::resize(uint64_t size, Completion done) noexcept {
  if (read_only_) return done(EROFS);
  if (size % 512 != 0) return done(EINVAL);
  changer_.run([this, size, done = inflight_.enter(std::move(done))]() mutable {
    // The rest of the last cluster must read as zeros should the disk grow again.
    const uint64_t old = size_, cluster = metadata_.cluster_size(), end = (size | (cluster - 1)) + 1;
    if (size < old && size % cluster != 0) {
      if (const int error = block::write_zeroes(*this, size, std::min(end, old) - size, false))
        return done(error);
    }
    done(exclusively([this, size](Lock& lock) { return resize_now(lock, size); }));
  });
}

int Qcow2Image::resize_now(Lock& lock, uint64_t size) {
  const uint64_t old = size_;
  if (header().l1_entries_for(size) * 8 > maximum_l1_bytes || size > uint64_t{1} << 61) return EFBIG;
  if (!snapshots_.empty() && header().version < 3) return ENOTSUP;  // they would not know their size
  if (header().extension(extension_bitmaps)) return ENOTSUP;        // nor would bitmaps
  int error = size < old ? shrink(lock, size) : 0;
  while (error == 0) {
    error = size > old ? grow(size) : 0;
    if (error == EAGAIN)
      error = metadata_.load_refcounts(lock);
    else
      break;
  }
  if (error) return error;
  metadata_.change_header().size = size;
  lock.unlock();
  error = metadata_.commit();
  // Raw external data is the whole disk.
  if (error == 0 && header().raw_external_data()) error = data_->truncate(size);
  lock.lock();
  if (error == 0) size_ = size;
  return error;
}

int Qcow2Image::grow(uint64_t size) {
  if (backing_ && backing_->size() > size_) return ENOTSUP;  // its contents would show up behind the old end
  const uint64_t needed = header().l1_entries_for(size);
  if (needed <= metadata_.l1().size()) return 0;
  std::vector<uint64_t> l1 = metadata_.l1();
  l1.resize(needed);
  return metadata_.replace_l1(std::move(l1));
}

// What lies behind the new end is given up; the L1 table stays as large as it is.
int Qcow2Image::shrink(Lock& lock, uint64_t size) {
  const uint64_t cluster = metadata_.cluster_size(), end = size_;
  for (uint64_t offset = (size + cluster - 1) & ~(cluster - 1); offset < end;) {
    const uint64_t index = l1_index(offset), next = std::min((index + 1) * l2_entries_ * cluster, end);
    if (const int error = load(lock, index)) return error;
    L2Table* table = metadata_.cached_l2(index);
    if (table) {
      const int error = metadata_.writable_l2(index, table);
      if (error == EAGAIN) continue;
      if (error) return error;
      for (; offset < next; offset += cluster) {
        metadata_.release_entry(metadata_.entry(*table, l2_index(offset)));
        metadata_.set_entry(*table, l2_index(offset), {});
      }
    }
    offset = next;
  }
  forget_unpacked();
  return 0;
}

int Qcow2Image::close() noexcept {
  inflight_.wait();
  if (std::exchange(closed_, true)) return 0;
  {
    Lock lock(metadata_.mutex());
    idle_.wait(lock, [this] { return !committing_ && active_ == 0; });
  }
  const int error = read_only_ ? 0 : metadata_.close();
  storage_->close();
  if (data_) data_->close();
  if (backing_) backing_->close();
  return error;
}

}  // namespace lodge::block::qcow2
