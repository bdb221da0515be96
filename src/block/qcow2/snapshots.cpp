#include "block/qcow2/snapshots.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "block/storage.hpp"

namespace lodge::block::qcow2 {
namespace {

constexpr size_t fixed = 40, known_extra = 16;

class Reader {
 public:
  Reader(Storage& storage, const Header& header)
      : storage_(storage), header_(header), at_(header.snapshots_offset), file_size_(storage.size()) {}

  SnapshotInfo next() {
    uint8_t head[fixed];
    take(head, sizeof head);
    SnapshotInfo info;
    info.l1_offset = load_be<uint64_t>(head);
    info.l1_entries = load_be<uint32_t>(head + 8);
    const size_t id = load_be<uint16_t>(head + 12), name = load_be<uint16_t>(head + 14);
    info.seconds = load_be<uint32_t>(head + 16);
    info.nanoseconds = load_be<uint32_t>(head + 20);
    info.vm_clock = load_be<uint64_t>(head + 24);
    info.vm_state = load_be<uint32_t>(head + 32);
    const uint32_t extra_size = load_be<uint32_t>(head + 36);
    if (extra_size > 1024) bad("has a snapshot with more than 1 KiB of extra data");
    std::vector<uint8_t> extra(extra_size);
    take(extra.data(), extra.size());
    if (extra.size() >= 8) info.vm_state = load_be<uint64_t>(extra.data());
    info.size = extra.size() >= 16 ? load_be<uint64_t>(extra.data() + 8) : header_.size;
    if (extra.size() > known_extra) info.extra.assign(extra.begin() + known_extra, extra.end());
    info.id.resize(id);
    take(info.id.data(), id);
    info.name.resize(name);
    take(info.name.data(), name);
    at_ = (at_ + 7) & ~uint64_t{7};
    check(info);
    return info;
  }

 private:
  [[noreturn]] void bad(const std::string& what) const {
    usage_error("{}: {}; the image is damaged", storage_.path(), what);
  }

  void take(void* to, size_t size) {
    if (at_ - header_.snapshots_offset + size > maximum_snapshot_bytes)
      bad("has a snapshot table of more than 16 MiB");
    if (at_ + size > file_size_) bad("has a snapshot table outside the file");
    if (const int error = storage_.read(to, size, at_)) throw_errno(error, storage_.path());
    at_ += size;
  }

  void check(const SnapshotInfo& info) const {
    const uint64_t bytes = info.l1_entries * uint64_t{8};
    if (bytes > maximum_l1_bytes) bad("has a snapshot with an L1 table of more than 32 MiB");
    if (info.l1_offset % header_.cluster_size() != 0 || bytes > file_size_ ||
        info.l1_offset > file_size_ - bytes)
      bad("has a snapshot with an L1 table outside the file");
    if (info.size > uint64_t{1} << 61) bad("has a snapshot of more than 2 EiB");
  }

  Storage& storage_;
  const Header& header_;
  uint64_t at_;
  uint64_t file_size_;
};

}  // namespace

std::vector<SnapshotInfo> read_snapshots(Storage& storage, const Header& header) {
  std::vector<SnapshotInfo> snapshots;
  Reader reader(storage, header);
  for (uint32_t i = 0; i < header.snapshots; i++) snapshots.push_back(reader.next());
  return snapshots;
}

std::vector<uint8_t> snapshots_bytes(const std::vector<SnapshotInfo>& snapshots) {
  std::vector<uint8_t> bytes;
  for (const auto& info : snapshots) {
    const size_t start = bytes.size();
    bytes.resize(start + fixed + known_extra);
    uint8_t* at = bytes.data() + start;
    store_be(at, info.l1_offset);
    store_be(at + 8, info.l1_entries);
    store_be(at + 12, static_cast<uint16_t>(info.id.size()));
    store_be(at + 14, static_cast<uint16_t>(info.name.size()));
    store_be(at + 16, static_cast<uint32_t>(info.seconds));
    store_be(at + 20, info.nanoseconds);
    store_be(at + 24, info.vm_clock);
    store_be(at + 32, static_cast<uint32_t>(std::min<uint64_t>(info.vm_state, UINT32_MAX)));
    store_be(at + 36, static_cast<uint32_t>(known_extra + info.extra.size()));
    store_be(at + 40, info.vm_state);
    store_be(at + 48, info.size);
    bytes.insert(bytes.end(), info.extra.begin(), info.extra.end());
    bytes.insert(bytes.end(), info.id.begin(), info.id.end());
    bytes.insert(bytes.end(), info.name.begin(), info.name.end());
    bytes.resize((bytes.size() + 7) & ~size_t{7});
  }
  return bytes;
}

}  // namespace lodge::block::qcow2
