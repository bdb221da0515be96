#include "kvm/soft/interpret/block.hpp"

namespace lodge::kvm::soft {

Ops::Ops(std::vector<Op> ops) : ops_(std::make_shared<const std::vector<Op>>(std::move(ops))) {}

Block* BlockCache::insert(std::unique_ptr<Block> block, bool& dropped) {
  const size_t cost = block->ops.size() + block_overhead;
  dropped = ops_ + cost > max_ops;
  if (dropped) clear();
  ops_ += cost;
  std::unique_ptr<Block>& place = blocks_[block->host << 16 ^ block->key];
  if (place) {
    ops_ -= place->ops.size() + block_overhead;
    dropped = true;
  }
  place = std::move(block);
  return place.get();
}

void BlockCache::clear() noexcept {
  blocks_.clear();
  ops_ = 0;
}

}  // namespace lodge::kvm::soft
