// A qcow2 image in use.
//
// A request is planned under the metadata's lock and split into transfers that need none. What the tables in
// memory can answer is planned on the caller's thread; what has to read tables, unpack, or copy old contents
// goes to a worker. A write that needs space writes data first and enters it into the tables when the data's
// transfer has ended; meanwhile its clusters are "busy", and others who would change their entries wait.
#pragma once

#include <array>
#include <atomic>
#include <unordered_set>

#include "block/qcow2/metadata.hpp"
#include "block/qcow2/snapshots.hpp"
#include "block/requests.hpp"
#include "block/transfer.hpp"

namespace lodge::block::qcow2 {

class Qcow2Image final : public Image {
 public:
  struct Parts {
    std::unique_ptr<Storage> storage;
    std::unique_ptr<Storage> data;   // the external data file, or null
    std::unique_ptr<Image> backing;  // or null
    Header header;
    CacheLimits cache = {};
  };
  // Opens what the parts describe. An image whose counts are untrue (the dirty bit) is repaired first. Throws
  // UsageError.
  Qcow2Image(Parts parts, bool read_only);
  ~Qcow2Image() override;

  void read(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void write(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void flush(Completion done) noexcept override;
  void discard(uint64_t offset, uint64_t length, Completion done) noexcept override;
  void write_zeroes(uint64_t offset, uint64_t length, bool unmap, Completion done) noexcept override;
  void resize(uint64_t size, Completion done) noexcept override;
  void plug() noexcept override { data().plug(); }
  void unplug() noexcept override { data().unplug(); }
  uint64_t size() const noexcept override { return size_; }
  bool read_only() const noexcept override { return read_only_; }
  std::string_view format() const noexcept override { return "qcow2"; }
  uint32_t discard_granularity() const noexcept override {
    return static_cast<uint32_t>(metadata_.cluster_size());
  }
  uint64_t zeros_at(uint64_t offset, uint64_t length) noexcept override;
  int close() noexcept override;

  const Header& header() const { return metadata_.header(); }  // while nothing changes it
  const Storage& storage() const { return *storage_; }
  Image* backing() const { return backing_.get(); }

  // What a range of the disk is made of. Blocking; not on a thread that runs completions.
  enum class Content { unallocated, zero, data, compressed };
  struct Extent {
    Content content = Content::unallocated;
    uint64_t length = 0;
  };
  int map(uint64_t offset, uint64_t length, Extent& extent) noexcept;

  // Writes a whole cluster (or the disk's last part of one) compressed, where it has no contents yet.
  // Blocking; no other write may be in flight. Falls back to a plain write when it does not get smaller.
  int write_compressed(std::span<const uint8_t> cluster, uint64_t offset) noexcept;

  // Internal snapshots. Blocking, on a thread that runs no completions; requests wait meanwhile. Errors:
  // EEXIST, ENOENT, ENOTSUP (external data file), EOVERFLOW (counts too narrow), and I/O.
  const std::vector<SnapshotInfo>& snapshots() const { return snapshots_; }
  int create_snapshot(const std::string& name) noexcept;
  int apply_snapshot(const std::string& name) noexcept;  // contents and size of then
  int delete_snapshot(const std::string& name) noexcept;

  // For `lodge image rebase`: names another backing file. Nothing may be in flight.
  int set_backing(const std::optional<std::string>& file, const std::string& format);

 private:
  struct Request {
    enum class Kind { read, write, zeroes, discard };
    Kind kind;
    std::vector<iovec> buffers;
    uint64_t offset, length;
    bool unmap;
    Completion done;
    uint64_t at = 0;  // bytes that have been planned
    std::atomic<int> error = 0;
    std::atomic<unsigned> pending = 1;  // transfers, and the planning itself
  };
  using RequestPtr = std::shared_ptr<Request>;
  using Lock = std::unique_lock<std::mutex>;
  struct Run;    // a part of the disk that is the same kind of thing
  struct Piece;  // a cluster that a write has to provide
  struct Provision;

  Storage& data() const { return data_ ? *data_ : *storage_; }
  void start(Request::Kind kind, std::span<const iovec> buffers, uint64_t offset, uint64_t length, bool unmap,
             Completion done) noexcept;
  bool direct(Request::Kind kind, std::span<const iovec> buffers, uint64_t offset, uint64_t length,
              Completion& done) noexcept;
  void proceed(RequestPtr request, bool worker) noexcept;
  void to_worker(RequestPtr request) noexcept;
  void part_ended(const RequestPtr& request, int error) noexcept;
  // The piece of the request's memory for [at, at + length) of the request.
  std::vector<iovec> slice(const Request& request, uint64_t at, uint64_t length) const;

  // Steps of planning: 0, an errno, EAGAIN (needs a worker), EBUSY (waits for a busy cluster). They move
  // request->at and may unlock.
  int read_step(Lock& lock, const RequestPtr& request, bool worker);
  int write_step(Lock& lock, const RequestPtr& request, uint64_t limit, bool worker);
  int change_step(Lock& lock, const RequestPtr& request, bool worker);
  int load(Lock& lock, uint64_t l1_index);

  uint64_t l1_index(uint64_t offset) const { return (offset >> metadata_.cluster_bits()) / l2_entries_; }
  uint64_t l2_index(uint64_t offset) const { return (offset >> metadata_.cluster_bits()) % l2_entries_; }
  int find_run(uint64_t offset, uint64_t length, Run& run);
  bool same_run(const Run& run, const Run& next) const;
  Run describe(const Entry& entry, uint64_t offset) const;

  // read.cpp
  void read_run(Lock& lock, const RequestPtr& request, const Run& run);
  void read_backing(const RequestPtr& request, uint64_t at, uint64_t length);
  int read_compressed(Lock& lock, uint64_t word, std::shared_ptr<const std::vector<uint8_t>>& cluster);
  // Blocking, on a worker; the range is inside the disk.
  int read_old(Lock& lock, uint64_t offset, std::span<uint8_t> to);

  // write.cpp
  bool may_write(const Run& run) const;
  int overwrite(Lock& lock, const RequestPtr& request, uint64_t limit);
  int provide(Lock& lock, const RequestPtr& request, uint64_t limit, bool worker);
  int plan_piece(L2Table& table, uint64_t from, uint64_t to, Piece& piece);
  bool needs_old(const Piece& piece, uint64_t from, uint64_t to) const;
  int copy_old(Lock& lock, Provision& provision);
  void transfer(Lock& lock, const RequestPtr& request, std::shared_ptr<Provision> provision);
  void enter(const std::shared_ptr<Provision>& provision) noexcept;
  void abandon(Provision& provision);
  std::vector<RequestPtr> take_waiting();
  void commit_in_background();

  void forget_unpacked();

  // compressed.cpp
  int place_compressed(uint64_t size, uint64_t& offset);

  // zero.cpp
  int change_cluster(Lock& lock, const RequestPtr& request, uint64_t offset);
  std::optional<Entry> changed_entry(const Request& request, const Entry& old) const;
  bool reads_as_zeros(uint64_t offset, uint64_t length, int& error);

  // Runs `change` while no request is in flight.
  int exclusively(const std::function<int(Lock&)>& change) noexcept;
  int resize_now(Lock& lock, uint64_t size);
  int grow(uint64_t size);
  int shrink(Lock& lock, uint64_t size);
  void flush_queued() noexcept;

  // snapshot.cpp
  void load_snapshots();
  int store_snapshots(Lock& lock, const std::vector<SnapshotInfo>& snapshots);
  int each_table(Lock& lock, const std::vector<uint64_t>& l1,
                 const std::function<int(std::vector<uint64_t>&)>& visit);
  int add_references(Lock& lock, const std::vector<uint64_t>& l1);
  int list_references(Lock& lock, const std::vector<uint64_t>& l1, std::vector<uint64_t>& list);
  int clear_copied_flags(Lock& lock);
  int correct_copied_flags(Lock& lock);
  int create_now(Lock& lock, const std::string& name);
  int apply_now(Lock& lock, const SnapshotInfo& snapshot);
  int delete_now(Lock& lock, size_t index);
  int change_snapshots(const std::function<int(Lock&)>& change) noexcept;
  int commit(Lock& lock);
  int allocate_row(Lock& lock, uint64_t bytes, uint64_t& offset);

  // bitmaps.cpp
  int mark_bitmaps_in_use();

  std::unique_ptr<Storage> storage_, data_;
  std::unique_ptr<Image> backing_;
  const bool read_only_;
  Metadata metadata_;
  const uint64_t l2_entries_;
  const unsigned subcluster_bits_;
  const std::vector<uint8_t> zeros_;  // a cluster
  std::atomic<uint64_t> size_;
  std::vector<SnapshotInfo> snapshots_;
  std::mutex bitmaps_mutex_;
  std::atomic<bool> bitmaps_marked_;  // or there are none

  // Under the metadata's lock:
  std::unordered_set<uint64_t> busy_;  // guest clusters
  std::vector<RequestPtr> waiting_;    // for a busy cluster
  std::vector<RequestPtr> gated_;      // until a change of the whole is over
  uint64_t active_ = 0;                // requests that have begun and not ended
  bool exclusive_ = false;
  std::condition_variable idle_;
  bool committing_ = false;
  std::vector<Completion> flushes_;
  struct Unpacked {
    uint64_t word = 0;
    std::shared_ptr<const std::vector<uint8_t>> cluster;
  };
  std::array<Unpacked, 4> unpacked_;  // the compressed clusters read last
  unsigned next_unpacked_ = 0;
  uint64_t compressed_at_ = 0;  // where the next compressed cluster's data may go

  std::mutex exclusive_mutex_;
  Inflight inflight_;
  bool closed_ = false;
  // Each waits for what runs on those behind it, so they are not one.
  WorkerPool workers_{4}, flusher_{1}, changer_{1};
};

}  // namespace lodge::block::qcow2
