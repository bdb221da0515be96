#include "kvm/soft/interpret/block.hpp"

namespace lodge::kvm::soft {

Block* BlockCache::insert(std::unique_ptr<Block> block, bool& dropped) {
  dropped = ops_ + block->ops.size() > max_ops;
  if (dropped) clear();
  ops_ += block->ops.size();
  std::unique_ptr<Block>& place = blocks_[block->host << 8 ^ block->key];
  if (place) {
    ops_ -= place->ops.size();
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
