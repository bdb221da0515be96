// Discard and write-zeroes: whole clusters change only in the tables, the rest is written.
#include <algorithm>
#include <cerrno>

#include "block/qcow2/run.hpp"

namespace lodge::block::qcow2 {

// Whether nothing has to be written for [offset, offset + length) to read as zeros. One cluster at most.
bool Qcow2Image::reads_as_zeros(uint64_t offset, uint64_t length, int& error) {
  error = 0;
  while (length > 0) {
    Run run;
    if ((error = find_run(offset, length, run))) return false;
    if (run.kind != Run::Kind::zero &&
        !(run.kind == Run::Kind::unallocated && (!backing_ || offset >= backing_->size())))
      return false;
    offset += run.length;
    length -= run.length;
  }
  return true;
}

// The entry that a whole cluster gets; nothing when the tables cannot say it and data must be written.
std::optional<Entry> Qcow2Image::changed_entry(const Request& request, const Entry& old) const {
  const bool empty = old.word == 0 && old.bits == 0, extended = header().extended_l2();
  const bool zero_flag = header().version >= 3, keep_place = old.copied() && !old.compressed();
  constexpr uint64_t all_zero = uint64_t{UINT32_MAX} << 32;
  if (request.kind == Request::Kind::discard) {
    if (empty) return old;  // a backing file shows through, as before
    if (!backing_) return Entry{};
    if (!zero_flag) return old;  // old contents are allowed, another file's are not
    return extended ? Entry{0, all_zero} : Entry{entry_zero, 0};
  }
  if (header().raw_external_data()) return std::nullopt;  // its data must be right without our tables
  if (!zero_flag) {
    if (!backing_ && (request.unmap || empty)) return Entry{};
    return std::nullopt;
  }
  const uint64_t place = keep_place && (!request.unmap || header().external_data())
                             ? old.word & (entry_offset | entry_copied)
                             : 0;
  return extended ? Entry{place, all_zero} : Entry{place | entry_zero, 0};
}

// One whole cluster. EAGAIN, EBUSY as steps; EDOM: has to be written.
int Qcow2Image::change_cluster(Lock& lock, const RequestPtr& request, uint64_t offset) {
  const uint64_t index = l1_index(offset);
  if (busy_.contains(offset >> metadata_.cluster_bits())) {
    waiting_.push_back(request);
    return EBUSY;
  }
  L2Table* table = metadata_.cached_l2(index);
  if (!table && (metadata_.l1()[index] & entry_offset)) return EAGAIN;
  const Entry old = table ? metadata_.entry(*table, l2_index(offset)) : Entry{};
  const auto entry = changed_entry(*request, old);
  if (!entry) return EDOM;
  // Where zeros show already, and nobody asks for the space, tables need not grow.
  int error = 0;
  if (request->kind == Request::Kind::zeroes && old.word == 0 && old.bits == 0 && !backing_) return 0;
  if (entry->word == old.word && entry->bits == old.bits) return 0;
  if ((error = metadata_.writable_l2(index, table))) return error;
  metadata_.set_entry(*table, l2_index(offset), *entry);
  const bool place_stays = entry->offset() != 0 || header().external_data();
  if (!place_stays) metadata_.release_entry(old);
  if (old.compressed()) forget_unpacked();
  if (metadata_.wants_commit() && !std::exchange(committing_, true)) {
    lock.unlock();
    commit_in_background();
    lock.lock();
  }
  return 0;
}

int Qcow2Image::change_step(Lock& lock, const RequestPtr& request, bool worker) {
  const uint64_t size = metadata_.cluster_size(), offset = request->offset + request->at;
  const uint64_t end = request->offset + request->length, next = (offset & ~(size - 1)) + size;
  // The disk may end within its last cluster.
  const bool whole = offset % size == 0 && (end >= next || end == size_);
  const uint64_t length = std::min(end, next) - offset;
  const bool discard = request->kind == Request::Kind::discard;
  if (discard && header().external_data()) {
    // The table keeps its entry, the data file gives the space back.
    const uint64_t all = end - offset;
    request->at += all;
    request->pending++;
    lock.unlock();
    data().change(Transfer::Kind::punch, offset, all,
                  [this, request](int error) { part_ended(request, error); });
    lock.lock();
    return 0;
  }
  // Nothing is there and nothing shows through: a large disk has many such gigabytes.
  const uint64_t index = l1_index(offset);
  if (whole && (metadata_.l1()[index] & entry_offset) == 0 && (discard || !backing_) &&
      !header().raw_external_data()) {
    request->at += std::min((index + 1) * l2_entries_ * size, end) - offset;
    return 0;
  }
  int error = EDOM;
  if (whole)
    error = change_cluster(lock, request, offset);
  else if (discard)
    error = 0;
  else if (reads_as_zeros(offset, length, error) && !header().raw_external_data())
    error = 0;
  else if (error == 0)
    error = EDOM;
  if (error == EDOM) return write_step(lock, request, length, worker);
  if (error == EAGAIN && worker) return load(lock, index);
  if (error == 0) request->at += length;
  return error;
}

}  // namespace lodge::block::qcow2
