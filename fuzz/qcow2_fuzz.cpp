// A hostile qcow2 image: a good one of some shape with places overwritten, or anything at all. It is
// examined, read, written, snapshotted, resized and repaired; all of that may fail and none of it may crash,
// hang or ask for much memory. What has been repaired must then be found whole.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "base/error.hpp"
#include "block/memory_storage.hpp"
#include "block/qcow2/bitmaps.hpp"
#include "block/qcow2/check.hpp"
#include "block/qcow2/compression.hpp"
#include "block/qcow2/create.hpp"
#include "block/qcow2/image.hpp"

namespace {

using namespace lodge::block;
using Disk = MemoryStorage::Disk;

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return size_ == 0; }
  uint64_t take(unsigned bytes) {
    uint64_t value = 0;
    for (; bytes > 0; bytes--) {
      value = value << 8 | (size_ ? *data_ : 0);
      if (size_) data_++, size_--;
    }
    return value;
  }
  std::vector<uint8_t> rest() const { return {data_, data_ + size_}; }

 private:
  const uint8_t* data_;
  size_t size_;
};

std::unique_ptr<qcow2::Qcow2Image> open(const std::shared_ptr<Disk>& disk, bool writable) {
  qcow2::Qcow2Image::Parts parts;
  parts.storage = std::make_unique<MemoryStorage>(disk, writable);
  parts.header = qcow2::read_header(*parts.storage);
  if (parts.header.external_data()) {
    auto data = std::make_shared<Disk>();
    data->limit = 16 << 20;
    parts.data = std::make_unique<MemoryStorage>(data, writable);
  }
  return std::make_unique<qcow2::Qcow2Image>(std::move(parts), !writable);
}

// A small image with data, zeros, compressed clusters, a snapshot.
std::vector<uint8_t> good_image(unsigned shape) {
  auto disk = std::make_shared<Disk>();
  MemoryStorage storage(disk);
  qcow2::CreateOptions options;
  options.size = 300 << 10;
  options.version = shape % 4 == 3 ? 2 : 3;
  options.cluster_bits = shape % 3 == 0 ? 9 : shape % 3 == 1 ? 12 : 14;
  if (options.version == 3) {
    options.extended_l2 = options.cluster_bits == 14;
    options.refcount_order = 3 + shape / 4 % 4;
    options.lazy_refcounts = shape & 16;
    options.compression = shape & 32 ? qcow2::Compression::zstd : qcow2::Compression::zlib;
  }
  qcow2::create(storage, options);
  const auto image = open(disk, true);
  const std::vector<uint8_t> data(20000, 0x5a);
  write(*image, data.data(), data.size(), 1000);
  const uint64_t cluster = image->header().cluster_size();
  const auto packed = qcow2::compress(options.compression, std::vector<uint8_t>(cluster, 7));
  if (!packed.empty()) image->write_compressed(packed, (200 << 10) / cluster * cluster);
  image->create_snapshot("one");
  write(*image, data.data(), 9000, 5000);
  write_zeroes(*image, 10 << 10, 64 << 10, true);
  image->close();
  return disk->bytes;
}

const std::vector<uint8_t>& good(unsigned shape) {
  static std::array<std::vector<uint8_t>, 64> images;
  if (images[shape % 64].empty()) images[shape % 64] = good_image(shape % 64);
  return images[shape % 64];
}

void operate(qcow2::Qcow2Image& image, Input& input) {
  std::vector<uint8_t> buffer(40000);
  for (int i = 0; i < 16 && !input.empty(); i++) {
    const uint64_t offset = input.take(3) % std::max<uint64_t>(image.size(), 1),
                   length = input.take(2) % buffer.size();
    const uint64_t inside = std::min(length, image.size() - std::min(offset, image.size()));
    qcow2::Qcow2Image::Extent extent;
    switch (input.take(1) % 12) {
      case 0: write_zeroes(image, offset, inside, length & 1); break;
      case 1: discard(image, offset, inside); break;
      case 2: flush(image); break;
      case 3: image.create_snapshot(std::to_string(i)); break;
      case 4: image.apply_snapshot("one"); break;
      case 5: image.delete_snapshot("one"); break;
      case 6: resize(image, offset / 512 * 512); break;
      case 7: image.map(offset, std::max<uint64_t>(inside, 1), extent); break;
      case 8:
      case 9: read(image, buffer.data(), inside, offset); break;
      default: write(image, buffer.data(), inside, offset);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  auto disk = std::make_shared<Disk>();
  const auto shape = static_cast<unsigned>(input.take(1));
  if (shape == 255) {
    disk->bytes = input.rest();
  } else {
    disk->bytes = good(shape);
    for (uint64_t patches = input.take(1) % 16; patches > 0 && !input.empty(); patches--) {
      const auto width = static_cast<unsigned>(1u << input.take(1) % 4);
      const uint64_t at = input.take(3) % (disk->bytes.size() - width), value = input.take(width);
      for (unsigned i = 0; i < width; i++)
        disk->bytes[at + i] = static_cast<uint8_t>(value >> 8 * (width - 1 - i));
    }
  }
  disk->limit = 32 << 20;
  try {
    {
      MemoryStorage storage(disk, false);
      qcow2::read_bitmaps(storage, qcow2::read_header(storage));
      qcow2::check(storage, qcow2::Repair::none);
    }
    {
      const auto image = open(disk, false);
      std::vector<uint8_t> buffer(64 << 10);
      for (uint64_t at = 0; at < std::min<uint64_t>(image->size(), 512 << 10); at += buffer.size())
        read(*image, buffer.data(), std::min<uint64_t>(buffer.size(), image->size() - at), at);
    }
    operate(*open(disk, true), input);
  } catch (const std::exception&) {  // refused
  }
  try {
    MemoryStorage storage(disk);
    const auto mended = qcow2::check(storage, qcow2::Repair::all);
    if (mended.left() != 0) return 0;
    const auto again = qcow2::check(storage, qcow2::Repair::none);
    if (again.corruptions == 0) return 0;
    for (const auto& finding : mended.findings) std::fprintf(stderr, "mended: %s\n", finding.c_str());
    for (const auto& finding : again.findings) std::fprintf(stderr, "still: %s\n", finding.c_str());
    std::abort();  // said to be mended, and is not
  } catch (const std::exception&) {
  }
  return 0;
}
