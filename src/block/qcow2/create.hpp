// New qcow2 images.
#pragma once

#include "block/qcow2/format.hpp"

namespace lodge::block::qcow2 {

struct CreateOptions {
  uint64_t size = 0;  // bytes, a multiple of 512
  unsigned version = 3;
  unsigned cluster_bits = 16;
  unsigned refcount_order = 4;
  bool lazy_refcounts = false, extended_l2 = false;
  Compression compression = Compression::zlib;
  std::optional<std::string> backing_file;
  std::string backing_format;
  std::string data_file;  // the name that is written; the file is the caller's to make
  bool raw_data = false;
};

// Writes an empty image into empty storage. Throws UsageError for what the format cannot do.
void create(Storage& storage, const CreateOptions& options);

}  // namespace lodge::block::qcow2
