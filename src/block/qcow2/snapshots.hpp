// The table of internal snapshots in the file.
#pragma once

#include <string>
#include <vector>

#include "block/qcow2/format.hpp"

namespace lodge::block::qcow2 {

struct SnapshotInfo {
  std::string id, name;
  uint64_t seconds = 0;  // since 1970; the file has 32 bits
  uint32_t nanoseconds = 0;
  uint64_t vm_clock = 0;  // nanoseconds that the guest had been running
  uint64_t vm_state = 0;  // bytes
  uint64_t size = 0;      // of the disk then
  uint64_t l1_offset = 0;
  uint32_t l1_entries = 0;
  std::vector<uint8_t> extra;  // what a later version of the format has added behind the fields above
};

// Throws UsageError when the table or one of its L1 tables is not inside the file or too large.
std::vector<SnapshotInfo> read_snapshots(Storage& storage, const Header& header);
std::vector<uint8_t> snapshots_bytes(const std::vector<SnapshotInfo>& snapshots);

}  // namespace lodge::block::qcow2
