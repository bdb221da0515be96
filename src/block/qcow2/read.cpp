// Reading, and what both reading and writing ask of the tables.
#include <algorithm>
#include <cerrno>

#include "block/qcow2/compression.hpp"
#include "block/qcow2/run.hpp"

namespace lodge::block::qcow2 {

Qcow2Image::Run Qcow2Image::describe(const Entry& e, uint64_t offset) const {
  const uint64_t cluster_mask = metadata_.cluster_size() - 1, in_cluster = offset & cluster_mask;
  Run run;
  run.length = cluster_mask + 1 - in_cluster;
  if (e.compressed()) {
    run.kind = header().external_data() ? Run::Kind::damaged : Run::Kind::compressed;
    run.word = e.word;
    return run;
  }
  // Offset 0 is a place only in a data file, where every cluster has the place that it has on the disk.
  const bool external = header().external_data(), placed = e.offset() != 0 || (external && e.copied());
  run.host = e.offset() + in_cluster;
  run.writable = e.copied() || external;
  bool allocated = placed, zero = header().version >= 3 && (e.word & entry_zero);
  if (header().extended_l2()) {
    const uint64_t subcluster = in_cluster >> subcluster_bits_;
    run.length = ((subcluster + 1) << subcluster_bits_) - in_cluster;
    allocated = e.bits >> subcluster & 1;
    zero = e.bits >> (32 + subcluster) & 1;
    if (allocated && (zero || !placed)) run.kind = Run::Kind::damaged;
    if (run.kind == Run::Kind::damaged) return run;
  }
  if (zero) {
    run.kind = Run::Kind::zero;
  } else if (allocated) {
    const bool good = external ? run.host == offset : metadata_.plausible(e.offset(), false);
    run.kind = good ? Run::Kind::data : Run::Kind::damaged;
  }
  return run;
}

bool Qcow2Image::same_run(const Run& run, const Run& next) const {
  if (run.kind != next.kind || run.kind == Run::Kind::compressed) return false;
  return run.kind != Run::Kind::data || (next.host == run.host + run.length && next.writable == run.writable);
}

// EAGAIN: the table is not in memory.
int Qcow2Image::find_run(uint64_t offset, uint64_t length, Run& run) {
  const uint64_t index = l1_index(offset);
  const uint64_t covered = (index + 1) * (l2_entries_ << metadata_.cluster_bits());
  const uint64_t end = std::min(offset + length, covered);
  const L2Table* table = metadata_.cached_l2(index);
  if (!table) {
    if (metadata_.l1()[index] & entry_offset) return EAGAIN;
    run.length = end - offset;
    return 0;
  }
  run = describe(metadata_.entry(*table, l2_index(offset)), offset);
  while (offset + run.length < end) {
    const uint64_t at = offset + run.length;
    const Run next = describe(metadata_.entry(*table, l2_index(at)), at);
    if (!same_run(run, next)) break;
    run.length += next.length;
  }
  run.length = std::min(run.length, end - offset);
  return run.kind == Run::Kind::damaged ? EIO : 0;
}

int Qcow2Image::load(Lock& lock, uint64_t index) {
  if (const int error = metadata_.load_l2(lock, index)) return error;
  return metadata_.load_refcounts(lock);
}

int Qcow2Image::read_step(Lock& lock, const RequestPtr& request, bool worker) {
  Run run;
  const uint64_t offset = request->offset + request->at;
  if (const int error = find_run(offset, request->length - request->at, run))
    return error == EAGAIN && worker ? load(lock, l1_index(offset)) : error;
  if (run.kind != Run::Kind::compressed) {
    read_run(lock, request, run);
    return 0;
  }
  std::shared_ptr<const std::vector<uint8_t>> cluster;
  for (const auto& unpacked : unpacked_)
    if (unpacked.cluster && unpacked.word == run.word) cluster = unpacked.cluster;
  if (!cluster) {
    if (!worker) return EAGAIN;
    if (const int error = read_compressed(lock, run.word, cluster)) return error;
  }
  const uint8_t* from = cluster->data() + (offset & (metadata_.cluster_size() - 1));
  for (const auto& buffer : slice(*request, request->at, run.length)) {
    std::memcpy(buffer.iov_base, from, buffer.iov_len);
    from += buffer.iov_len;
  }
  request->at += run.length;
  return 0;
}

void Qcow2Image::read_run(Lock& lock, const RequestPtr& request, const Run& run) {
  const uint64_t at = request->at;
  request->at += run.length;
  if (run.kind == Run::Kind::data) {
    const uint64_t epoch = metadata_.enter_epoch();
    request->pending++;
    lock.unlock();
    data().read(slice(*request, at, run.length), run.host, [this, request, epoch](int error) {
      {
        const std::lock_guard relock(metadata_.mutex());
        metadata_.leave_epoch(epoch);
      }
      part_ended(request, error);
    });
  } else {
    lock.unlock();
    if (run.kind == Run::Kind::unallocated && backing_) {
      read_backing(request, at, run.length);
    } else {
      for (const auto& buffer : slice(*request, at, run.length))
        std::memset(buffer.iov_base, 0, buffer.iov_len);
    }
  }
  lock.lock();
}

// A backing file may be smaller than the disk: zeros follow.
void Qcow2Image::read_backing(const RequestPtr& request, uint64_t at, uint64_t length) {
  const uint64_t offset = request->offset + at, size = backing_->size();
  const uint64_t there = offset >= size ? 0 : std::min(length, size - offset);
  if (there < length)
    for (const auto& buffer : slice(*request, at + there, length - there))
      std::memset(buffer.iov_base, 0, buffer.iov_len);
  if (there == 0) return;
  request->pending++;
  backing_->read(slice(*request, at, there), offset,
                 [this, request](int error) { part_ended(request, error); });
}

// Reads and unpacks it, or takes it from the clusters unpacked last.
int Qcow2Image::read_compressed(Lock& lock, uint64_t word,
                                std::shared_ptr<const std::vector<uint8_t>>& cluster) {
  for (const auto& unpacked : unpacked_)
    if (unpacked.cluster && unpacked.word == word) cluster = unpacked.cluster;
  if (cluster) return 0;
  const CompressedPlace place = compressed_place(header(), word);
  // Data that is not smaller than a cluster by much is possible, data of twice its size is not.
  if (place.size > 2 * metadata_.cluster_size() + 512) return EIO;
  const uint64_t epoch = metadata_.enter_epoch();
  lock.unlock();
  int error = 0;
  std::vector<uint8_t> packed(place.size);
  auto unpacked = std::make_shared<std::vector<uint8_t>>(metadata_.cluster_size());
  const uint64_t file_size = storage_->size();
  if (place.offset >= file_size)
    error = EIO;
  else
    error = storage_->read(packed.data(), packed.size(), place.offset);
  if (error == 0 && !decompress(header().compression, packed, *unpacked)) error = EIO;
  lock.lock();
  metadata_.leave_epoch(epoch);
  if (error) return error;
  cluster = unpacked;
  unpacked_[next_unpacked_++ % unpacked_.size()] = {word, std::move(unpacked)};
  return 0;
}

int Qcow2Image::read_old(Lock& lock, uint64_t offset, std::span<uint8_t> to) {
  while (!to.empty()) {
    Run run;
    int error = find_run(offset, to.size(), run);
    if (error == EAGAIN) {
      if ((error = load(lock, l1_index(offset))) == 0) continue;
    }
    if (error) return error;
    if (run.kind == Run::Kind::compressed) {
      std::shared_ptr<const std::vector<uint8_t>> cluster;
      if ((error = read_compressed(lock, run.word, cluster))) return error;
      std::memcpy(to.data(), cluster->data() + (offset & (metadata_.cluster_size() - 1)), run.length);
    } else {
      // Its place stays: the request that needs it holds the cluster busy.
      lock.unlock();
      std::memset(to.data(), 0, run.length);
      if (run.kind == Run::Kind::data) {
        error = data().read(to.data(), run.length, run.host);
      } else if (run.kind == Run::Kind::unallocated && backing_ && offset < backing_->size()) {
        const uint64_t there = std::min(run.length, backing_->size() - offset);
        error = block::read(*backing_, to.data(), there, offset);
      }
      lock.lock();
      if (error) return error;
    }
    offset += run.length;
    to = to.subspan(run.length);
  }
  return 0;
}

int Qcow2Image::map(uint64_t offset, uint64_t length, Extent& extent) noexcept {
  Lock lock(metadata_.mutex());
  for (;;) {
    if (offset > size_ || length > size_ - offset || length == 0) return EINVAL;
    Run run;
    int error = find_run(offset, length, run);
    if (error == EAGAIN)
      error = load(lock, l1_index(offset));
    else if (error == 0) {
      constexpr std::array contents{Content::unallocated, Content::zero, Content::data, Content::compressed};
      extent = {contents[static_cast<size_t>(run.kind)], run.length};
      return 0;
    }
    if (error) return error;
  }
}

uint64_t Qcow2Image::zeros_at(uint64_t offset, uint64_t length) noexcept {
  uint64_t zeros = 0;
  while (zeros < length) {
    Extent extent;
    if (map(offset + zeros, length - zeros, extent) != 0) break;
    uint64_t there = extent.content == Content::zero ? extent.length : 0;
    if (extent.content == Content::unallocated) {
      const uint64_t at = offset + zeros;
      const bool backed = backing_ && at < backing_->size();
      there = backed ? backing_->zeros_at(at, std::min(extent.length, backing_->size() - at)) : extent.length;
    }
    zeros += there;
    if (there < extent.length) break;
  }
  return zeros;
}

}  // namespace lodge::block::qcow2
