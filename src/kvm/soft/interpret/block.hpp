// A run of decoded instructions of one page (the last may reach into the next), and the vCPU's cache of them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "kvm/soft/interpret/op.hpp"

namespace lodge::kvm::soft {

class Translation;

struct Block {
  Block() noexcept;
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  uint64_t host = 0;  // host address of the first byte: two mappings of one page share their blocks
  uint32_t key = 0;   // the modes that decoding depends on (decode_key())
  uint32_t instructions = 0;
  // The code words (Slot::code) of the page or pages that it was decoded from, and their values then.
  std::atomic<uint32_t>* word[2] = {nullptr, nullptr};
  uint32_t word_value[2] = {0, 0};
  uint64_t host_page[2] = {0, 0};  // host addresses of these pages; second 0: none
  uint32_t bytes = 0;
  std::vector<Op> ops;  // the last one ends the block

  // Where control went from here: valid while the vCPU's flush count is still the same.
  struct Link {
    uint64_t linear = 0;
    uint32_t key = 0;
    uint32_t flushes = 0;
    Block* block = nullptr;
  };
  Link links[2];
  uint32_t next_link = 0;  // which one to replace

  // What the translator has made of it, by Boundary::index(), and what it should know.
  std::array<std::unique_ptr<Translation>, 8> code;
  uint32_t runs = 0;       // by the interpreter
  uint32_t crossings = 0;  // runs of accesses that met a page's end
  bool untranslatable = false, runs_are_poor = false;

  bool fresh() const noexcept {
    return word[0]->load(std::memory_order_acquire) == word_value[0] &&
           (word[1] == nullptr || word[1]->load(std::memory_order_acquire) == word_value[1]);
  }
};

// Decoded blocks of one vCPU, by place and mode. Only its thread touches it.
class BlockCache {
 public:
  // The budget; reaching it empties the cache. What a block costs besides its ops is counted as ops.
  static constexpr size_t block_overhead = (sizeof(Block) + 64) / sizeof(Op);
  static constexpr size_t max_ops = (size_t{64} << 20) / sizeof(Op);

  Block* find(uint64_t host, uint32_t key) noexcept {
    const auto it = blocks_.find(host << 16 ^ key);
    return it == blocks_.end() ? nullptr : it->second.get();
  }
  // `dropped`: pointers to other blocks, got before, are no longer valid.
  Block* insert(std::unique_ptr<Block> block, bool& dropped);
  void clear() noexcept;
  size_t ops() const noexcept { return ops_; }
  size_t size() const noexcept { return blocks_.size(); }

 private:
  std::unordered_map<uint64_t, std::unique_ptr<Block>> blocks_;
  size_t ops_ = 0;
};

}  // namespace lodge::kvm::soft
