// Internal to qcow2's image: how requests are cut.
#pragma once

#include "block/qcow2/image.hpp"

namespace lodge::block::qcow2 {

// A part of the disk that is one kind of thing, in one row.
struct Qcow2Image::Run {
  enum class Kind { unallocated, zero, data, compressed, damaged };
  Kind kind = Kind::unallocated;
  uint64_t length = 0;
  uint64_t host = 0;      // data: where
  bool writable = false;  // data: in place
  uint64_t word = 0;      // compressed: the entry
};

// What a write does to one cluster that it cannot simply overwrite.
struct Qcow2Image::Piece {
  uint64_t guest = 0;           // offset of the cluster on the disk
  uint64_t from = 0, to = 0;    // what the request writes: offsets on the disk
  uint64_t begin = 0, end = 0;  // what has to be written, so that no old contents are lost
  uint64_t host = 0;
  bool allocated = false;    // host is new
  bool fresh = false;        // and reads as zeros
  bool take_old = false;     // begin..from and to..end have contents, not zeros
  std::optional<Entry> old;  // to be released
  Entry entry;               // when all is written
  std::vector<uint8_t> head, tail;
};

// Pieces of one L2 table that are written together.
struct Qcow2Image::Provision {
  RequestPtr request;
  uint64_t l1_index = 0;
  uint64_t first = 0;  // byte of the request that the first piece begins with
  std::vector<Piece> pieces;
  std::atomic<int> error = 0;
  std::atomic<unsigned> pending = 1;
};

}  // namespace lodge::block::qcow2
