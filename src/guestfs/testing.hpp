// A small ext4 file system made by hand, for tests that want to damage one and for fuzzing.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "block/memory_storage.hpp"
#include "block/raw.hpp"

namespace lodge::guestfs::testing {

using Disk = block::MemoryStorage::Disk;

inline std::unique_ptr<block::Image> image_of(std::vector<uint8_t> bytes) {
  auto disk = std::make_shared<Disk>();
  disk->bytes = std::move(bytes);
  return std::make_unique<block::RawImage>(std::make_unique<block::MemoryStorage>(disk, false), false);
}

// One group of 1 KiB blocks. Blocks: 1 super block, 2 descriptors, 3 inode table (16 inodes of 128 bytes),
// 8 the root directory, 9 /boot, from 16 on the files.
class Ext4Maker {
 public:
  static constexpr size_t block_size = 1024, blocks = 256;

  Ext4Maker() : bytes_(block_size * blocks) {
    put32(1024 + 0x00, 16);
    put32(1024 + 0x04, blocks);
    put32(1024 + 0x14, 1);
    put32(1024 + 0x20, 8192);
    put32(1024 + 0x28, 16);
    put16(1024 + 0x38, 0xef53);
    put32(1024 + 0x4c, 1);
    put16(1024 + 0x58, 128);
    put32(1024 + 0x60, 0x42);  // entry types, extents
    put32(2048 + 8, 3);        // the inode table
    directory(2, 8, {{"boot", 12}, {"vmlinuz", 13}});
    directory(12, 9, {{"vmlinuz-1.0", 14}, {"initrd.img-1.0", 15}});
    link(13, "boot/vmlinuz-1.0");
    file(14, std::string(3000, 'k'));
    file(15, std::string(5000, 'i'), true);
  }

  const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  void put16(size_t at, unsigned value) { std::memcpy(&bytes_[at], &value, 2); }
  void put32(size_t at, uint32_t value) { std::memcpy(&bytes_[at], &value, 4); }
  static size_t inode(unsigned number) { return 3 * block_size + (number - 1) * 128; }

  size_t start(unsigned number, unsigned mode, size_t size) {
    const size_t at = inode(number);
    put16(at, mode);
    put32(at + 4, static_cast<uint32_t>(size));
    return at + 0x28;
  }
  void extent(size_t node, unsigned block, unsigned count) {
    put16(node, 0xf30a), put16(node + 2, 1), put16(node + 4, 4);
    put16(node + 16, count), put32(node + 20, block);
  }
  void directory(unsigned number, unsigned block,
                 const std::vector<std::pair<std::string, unsigned>>& names) {
    extent(start(number, 0x41ed, block_size), block, 1);
    put32(inode(number) + 0x20, 0x80000);
    size_t at = block * block_size;
    for (const auto& [name, node] : names) {
      const bool last = name == names.back().first;
      const size_t length = last ? block_size - at % block_size : (8 + name.size() + 3) / 4 * 4;
      put32(at, node), put16(at + 4, static_cast<unsigned>(length));
      bytes_[at + 6] = static_cast<uint8_t>(name.size());
      std::memcpy(&bytes_[at + 8], name.data(), name.size());
      at += length;
    }
  }
  void link(unsigned number, const std::string& target) {
    std::memcpy(&bytes_[start(number, 0xa1ff, target.size())], target.data(), target.size());
  }
  // With a block map, the way of ext2, or one extent.
  void file(unsigned number, const std::string& text, bool mapped = false) {
    const size_t map = start(number, 0x81a4, text.size());
    const auto count = static_cast<unsigned>((text.size() + block_size - 1) / block_size);
    if (mapped) {
      for (unsigned i = 0; i < count; i++) put32(map + i * 4, next_ + i);
    } else {
      extent(map, next_, count);
      put32(inode(number) + 0x20, 0x80000);
    }
    std::memcpy(&bytes_[next_ * block_size], text.data(), text.size());
    next_ += count;
  }

  std::vector<uint8_t> bytes_;
  unsigned next_ = 16;
};

}  // namespace lodge::guestfs::testing
