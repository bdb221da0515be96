// Writing: in place, or into clusters that are provided for it.
#include <algorithm>
#include <cerrno>

#include "block/qcow2/run.hpp"

namespace lodge::block::qcow2 {

int Qcow2Image::write_step(Lock& lock, const RequestPtr& request, uint64_t limit, bool worker) {
  const uint64_t offset = request->offset + request->at;
  Run run;
  if (const int error = find_run(offset, limit, run))
    return error == EAGAIN && worker ? load(lock, l1_index(offset)) : error;
  if (run.kind == Run::Kind::data && run.writable) return overwrite(lock, request, run.length);
  const int error = provide(lock, request, limit, worker);
  return error == EAGAIN && worker ? load(lock, l1_index(offset)) : error;
}

// A damaged image must not make us write over its tables.
bool Qcow2Image::may_write(const Run& run) const {
  if (header().external_data()) return true;
  const uint64_t size = metadata_.cluster_size();
  for (uint64_t at = run.host & ~(size - 1); at < run.host + run.length; at += size)
    if (!metadata_.plausible(at, true)) return false;
  return true;
}

int Qcow2Image::overwrite(Lock& lock, const RequestPtr& request, uint64_t limit) {
  const uint64_t offset = request->offset + request->at;
  Run run;
  find_run(offset, limit, run);
  if (!may_write(run)) return EIO;
  const uint64_t at = request->at, epoch = metadata_.enter_epoch();
  request->at += run.length;
  request->pending++;
  lock.unlock();
  data().write(slice(*request, at, run.length), run.host, [this, request, epoch](int error) {
    {
      const std::lock_guard relock(metadata_.mutex());
      metadata_.leave_epoch(epoch);
    }
    part_ended(request, error);
  });
  lock.lock();
  return 0;
}

bool Qcow2Image::needs_old(const Piece& piece, uint64_t from, uint64_t to) const {
  return piece.take_old && from < to;
}

// What has to be done to the cluster of [from, to) so that this range can be written. EEXIST: nothing.
int Qcow2Image::plan_piece(L2Table& table, uint64_t from, uint64_t to, Piece& piece) {
  const uint64_t size = metadata_.cluster_size(), sub = uint64_t{1} << subcluster_bits_;
  const bool extended = header().extended_l2(), external = header().external_data();
  const uint64_t index = l2_index(from);
  const Entry old = metadata_.entry(table, index);
  piece.guest = from & ~(size - 1);
  piece.from = from;
  piece.to = to;
  piece.begin = from & ~(sub - 1);
  piece.end = (to + sub - 1) & ~(sub - 1);
  const uint64_t first_sub = (piece.begin - piece.guest) >> subcluster_bits_,
                 last_sub = (piece.end - 1 - piece.guest) >> subcluster_bits_;
  const uint64_t touched = extended ? ((uint64_t{2} << last_sub) - (uint64_t{1} << first_sub)) : 0;
  const bool placed = external ? old.offset() != 0 || old.copied() : old.offset() != 0;
  const bool ours = !old.compressed() && placed && (old.copied() || external);
  const Run head = describe(old, piece.begin), tail = describe(old, piece.end - 1);
  if (head.kind == Run::Kind::damaged || tail.kind == Run::Kind::damaged) return EIO;
  if (ours && (extended ? (old.bits & touched) == touched : head.kind == Run::Kind::data)) return EEXIST;

  uint64_t bits = extended ? (old.bits | touched) & ~(touched << 32) : 0;
  const bool has_data = old.compressed() || (placed && !ours && (extended || head.kind == Run::Kind::data));
  if (has_data) {  // shared or compressed: the whole cluster moves
    piece.begin = piece.guest;
    piece.end = piece.guest + size;
    piece.take_old = true;
    bits = extended ? UINT32_MAX : 0;
  } else {
    // Subclusters at the ends that are there need nothing but the write.
    if (head.kind == Run::Kind::data) piece.begin = from;
    if (tail.kind == Run::Kind::data) piece.end = to;
    const auto backed = [&](const Run& run, uint64_t at) {
      return run.kind == Run::Kind::unallocated && backing_ && at < backing_->size();
    };
    piece.take_old =
        (piece.begin < from && backed(head, piece.begin)) || (to < piece.end && backed(tail, to));
  }
  if (ours || external) {
    piece.host = external ? piece.guest : old.offset();
    if (!external && !metadata_.plausible(piece.host, true)) return EIO;
  } else {
    if (placed || old.compressed()) piece.old = old;
    Allocation place;
    if (const int error = metadata_.allocate(place)) return error;
    piece.host = place.offset;
    piece.allocated = true;
    piece.fresh = place.fresh;
  }
  piece.entry = {piece.host | entry_copied, bits};
  return 0;
}

void Qcow2Image::abandon(Provision& provision) {
  for (const auto& piece : provision.pieces)
    if (piece.allocated) metadata_.cancel(piece.host);
}

int Qcow2Image::provide(Lock& lock, const RequestPtr& request, uint64_t limit, bool worker) {
  const uint64_t size = metadata_.cluster_size(), offset = request->offset + request->at;
  const uint64_t index = l1_index(offset);
  const auto cluster_of = [&](uint64_t at) { return at >> metadata_.cluster_bits(); };
  if (busy_.contains(cluster_of(offset))) {
    waiting_.push_back(request);
    return EBUSY;
  }
  L2Table* table = nullptr;
  if (const int error = metadata_.writable_l2(index, table)) return error;
  auto provision = std::make_shared<Provision>();
  provision->request = request;
  provision->l1_index = index;
  provision->first = request->at;
  const uint64_t end = std::min(offset + limit, (index + 1) * l2_entries_ * size);
  int error = 0;
  bool needs_worker = false;
  for (uint64_t at = offset; at < end && !busy_.contains(cluster_of(at));) {
    const uint64_t to = std::min(end, (at & ~(size - 1)) + size);
    Piece piece;
    error = plan_piece(*table, at, to, piece);
    if (error) break;
    needs_worker |= needs_old(piece, piece.begin, piece.from) || needs_old(piece, piece.to, piece.end);
    provision->pieces.push_back(std::move(piece));
    at = to;
  }
  // Enough is planned to go on with; what stopped us is met again.
  if (provision->pieces.empty()) return error == EEXIST ? 0 : error;
  if (needs_worker && !worker) {
    abandon(*provision);
    return EAGAIN;
  }
  table->pins++;
  for (const auto& piece : provision->pieces) busy_.insert(cluster_of(piece.guest));
  request->at += provision->pieces.back().to - offset;
  request->pending++;
  if (needs_worker && (error = copy_old(lock, *provision))) provision->error = error;  // enter() ends it
  transfer(lock, request, std::move(provision));
  return 0;
}

int Qcow2Image::copy_old(Lock& lock, Provision& provision) {
  const uint64_t limit = size_;
  const auto fill = [&](std::vector<uint8_t>& to, uint64_t from, uint64_t end) {
    to.resize(end - from);
    // The last cluster may end behind the disk's end.
    const uint64_t there = from >= limit ? 0 : std::min(end, limit) - from;
    return read_old(lock, from, std::span(to).first(there));
  };
  for (auto& piece : provision.pieces) {
    if (needs_old(piece, piece.begin, piece.from))
      if (const int error = fill(piece.head, piece.begin, piece.from)) return error;
    if (needs_old(piece, piece.to, piece.end))
      if (const int error = fill(piece.tail, piece.to, piece.end)) return error;
  }
  return 0;
}

// Writes all pieces, neighbours together. What surrounds the request's own data in a new cluster is old
// contents, or zeros, which a fresh place already has.
void Qcow2Image::transfer(Lock& lock, const RequestPtr& request, std::shared_ptr<Provision> provision) {
  lock.unlock();
  std::vector<iovec> buffers;
  uint64_t start = 0, end = 0;
  const auto send = [&] {
    if (buffers.empty() || provision->error != 0) return;
    provision->pending++;
    data().write(std::move(buffers), start, [this, provision](int error) {
      if (error) provision->error = error;
      if (--provision->pending == 0) enter(provision);
    });
    buffers = {};
  };
  const auto add = [&](uint64_t host, const void* from, uint64_t size) {
    if (size == 0) return;
    if (host != end || buffers.empty()) {
      send();
      start = end = host;
    }
    buffers.push_back({const_cast<void*>(from), size});
    end += size;
  };
  uint64_t at = provision->first;
  for (const auto& piece : provision->pieces) {
    const uint64_t to_host = piece.host - piece.guest;
    const auto surround = [&](const std::vector<uint8_t>& old, uint64_t from, uint64_t to) {
      if (!old.empty())
        add(to_host + from, old.data(), to - from);
      else if (!piece.fresh)
        add(to_host + from, zeros_.data(), to - from);
    };
    surround(piece.head, piece.begin, piece.from);
    uint64_t host = to_host + piece.from;
    for (const auto& buffer : slice(*request, at, piece.to - piece.from)) {
      add(host, buffer.iov_base, buffer.iov_len);
      host += buffer.iov_len;
    }
    at += piece.to - piece.from;
    surround(piece.tail, piece.to, piece.end);
  }
  send();
  if (--provision->pending == 0) enter(provision);
  lock.lock();
}

// The data is where it should be: now the tables may say so.
void Qcow2Image::enter(const std::shared_ptr<Provision>& provision) noexcept {
  std::vector<RequestPtr> waiting;
  bool commit = false;
  {
    const Lock lock(metadata_.mutex());
    L2Table* table = metadata_.cached_l2(provision->l1_index);
    if (provision->error != 0) {
      abandon(*provision);
    } else {
      for (const auto& piece : provision->pieces) {
        metadata_.set_entry(*table, l2_index(piece.guest), piece.entry);
        if (piece.old) metadata_.release_entry(*piece.old);
        if (piece.old && piece.old->compressed()) forget_unpacked();
      }
    }
    table->pins--;
    for (const auto& piece : provision->pieces) busy_.erase(piece.guest >> metadata_.cluster_bits());
    waiting = take_waiting();
    commit = metadata_.wants_commit() && !std::exchange(committing_, true);
  }
  if (commit) commit_in_background();
  for (auto& request : waiting) to_worker(std::move(request));
  part_ended(provision->request, provision->error);
}

std::vector<Qcow2Image::RequestPtr> Qcow2Image::take_waiting() {
  return std::exchange(waiting_, {});
}

void Qcow2Image::commit_in_background() {
  flusher_.run([this] {
    metadata_.commit();  // an error will be met again by the guest's own flush
    const Lock lock(metadata_.mutex());
    committing_ = false;
    idle_.notify_all();
  });
}

}  // namespace lodge::block::qcow2
