// Partition tables: GPT (UEFI specification 2.10, chapter 5) read and written, the four primary partitions of
// an MBR read. A disk is hostile: a table whose checksums are wrong, or that leaves the disk, is not there.
//
// Sectors are 512 bytes, as they are for every disk that Lodge gives to a guest.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "guestfs/view.hpp"

namespace lodge::guestfs {

inline constexpr uint64_t sector_size = 512;

// As it lies in a table: the first three fields little-endian.
using Guid = std::array<uint8_t, 16>;
std::string to_string(const Guid& guid);  // "0fc63daf-8483-4772-8e79-3d69d8477de4"
// Of the host's random numbers, version 4. Throws std::system_error.
Guid random_guid();

struct Partition {
  unsigned number;       // from 1, as in vda1
  uint64_t begin, size;  // bytes
  std::string uuid;      // Linux's PARTUUID
};

// In the order of the table; none when the disk has no table. The backup of a GPT counts when the first copy
// is damaged.
std::vector<Partition> read_partitions(const View& disk);

// A GPT for a disk of `disk_size` bytes (a multiple of 512, at least 3 MiB) with one Linux partition from
// 1 MiB to 1 MiB before the end.
struct GptLayout {
  std::vector<uint8_t> start;  // to be written at byte 0
  std::vector<uint8_t> end;    // to be written so that it ends where the disk does
  Partition partition;
};
GptLayout make_gpt(uint64_t disk_size, const Guid& disk, const Guid& partition);

}  // namespace lodge::guestfs
