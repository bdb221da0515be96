// A run of decoded instructions of one page (the last may reach into the next), and the vCPU's cache of them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvm/soft/interpret/op.hpp"

namespace lodge::kvm::soft {

struct AddressSpaces;
class Translation;

// Decoded instructions, made once and then only read: a vCPU's block and its translations share them.
class Ops {
 public:
  Ops() = default;
  explicit Ops(std::vector<Op> ops);

  const Op* data() const noexcept { return ops_->data(); }
  size_t size() const noexcept { return ops_ ? ops_->size() : 0; }
  const Op& operator[](size_t n) const noexcept { return (*ops_)[n]; }
  const Op& front() const noexcept { return ops_->front(); }
  auto begin() const noexcept { return ops_->begin(); }
  auto end() const noexcept { return ops_->end(); }

 private:
  std::shared_ptr<const std::vector<Op>> ops_;
};

struct DecodedBlock {
  uint64_t host = 0;  // host address of the first byte: two mappings of one page share their blocks
  uint32_t key = 0;   // the modes that decoding depends on (decode_key())
  uint32_t instructions = 0;
  // The code words (CodePages::word) of the page or pages that it was decoded from, and their values then.
  std::atomic<uint32_t>* word[2] = {nullptr, nullptr};
  uint32_t word_value[2] = {0, 0};
  uint64_t host_page[2] = {0, 0};            // host addresses of these pages; second 0: none
  std::shared_ptr<const AddressSpaces> map;  // keeps the code words
  uint32_t bytes = 0;
  Ops ops;  // the last one ends the block

  bool fresh() const noexcept {
    return word[0]->load(std::memory_order_acquire) == word_value[0] &&
           (word[1] == nullptr || word[1]->load(std::memory_order_acquire) == word_value[1]);
  }
  // Whether the first page of both had the same bytes and belongs to the same slot.
  bool same_page(const DecodedBlock& other) const noexcept {
    return host_page[0] == other.host_page[0] && word[0] == other.word[0] &&
           word_value[0] == other.word_value[0];
  }
  // Whether both were decoded from the same bytes of the same slots.
  bool same_code(const DecodedBlock& other) const noexcept {
    return host == other.host && word[0] == other.word[0] && word_value[0] == other.word_value[0] &&
           word[1] == other.word[1] && word_value[1] == other.word_value[1];
  }
};

struct Block : DecodedBlock {
  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Where control went from here: valid while the vCPU's flush count is still the same.
  struct Link {
    uint64_t linear = 0;
    uint32_t key = 0;
    uint32_t flushes = 0;
    Block* block = nullptr;
  };
  Link links[2];
  uint32_t next_link = 0;  // which one to replace

  // What the code cache has of it, by Boundary::index(), dead or not, as of a count of the times that memory
  // of dead ones expired (Translator::seen_).
  std::array<Translation*, 8> code{};
  uint64_t code_seen = 0;
  uint32_t runs = 0;  // by the interpreter
  bool untranslatable = false;
};

// Decoded blocks of one vCPU, by place and mode. Only its thread touches it.
class BlockCache {
 public:
  // The budget; reaching it empties the cache. What a block costs besides its ops is counted as ops.
  static constexpr size_t block_overhead = (sizeof(Block) + 64) / sizeof(Op);
  static constexpr size_t max_ops = (size_t{64} << 20) / sizeof(Op);

  BlockCache();
  Block* find(uint64_t host, uint32_t key) noexcept { return place_of(host << 16 ^ key).block.get(); }
  // `dropped`: pointers to other blocks, got before, are no longer valid.
  Block* insert(std::unique_ptr<Block> block, bool& dropped);
  void clear() noexcept;
  size_t ops() const noexcept { return ops_; }
  size_t size() const noexcept { return size_; }

 private:
  // After a flush of the TLB everything that runs is looked up here again, mostly out of reach of the
  // processor's caches: one line for the place and one for the block. Free places have no block.
  struct Place {
    uint64_t name = 0;
    std::unique_ptr<Block> block;
  };
  // Where `name` is, or would be put.
  Place& place_of(uint64_t name) noexcept {
    size_t i = name * 0x9e37'79b9'7f4a'7c15 >> shift_;
    while (places_[i].block != nullptr && places_[i].name != name) i = (i + 1) & (places_.size() - 1);
    return places_[i];
  }
  void resize(unsigned bits);

  std::vector<Place> places_;  // a power of two, at most half of them taken
  unsigned shift_ = 0;
  size_t size_ = 0;
  size_t ops_ = 0;
};

}  // namespace lodge::kvm::soft
