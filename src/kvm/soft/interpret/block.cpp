#include "kvm/soft/interpret/block.hpp"

#include <utility>

namespace lodge::kvm::soft {
namespace {

constexpr unsigned first_bits = 10;

}  // namespace

Ops::Ops(std::vector<Op> ops) : ops_(std::make_shared<const std::vector<Op>>(std::move(ops))) {}

BlockCache::BlockCache() {
  resize(first_bits);
}

Block* BlockCache::insert(std::unique_ptr<Block> block, bool& dropped) {
  const size_t cost = block->ops.size() + block_overhead;
  dropped = ops_ + cost > max_ops;
  if (dropped) clear();
  ops_ += cost;
  const uint64_t name = block->host << 16 ^ block->key;
  Place* place = &place_of(name);
  if (place->block != nullptr) {
    ops_ -= place->block->ops.size() + block_overhead;
    dropped = true;
  } else if (++size_ * 2 > places_.size()) {
    resize(64 - shift_ + 1);
    place = &place_of(name);
  }
  place->name = name;
  place->block = std::move(block);
  return place->block.get();
}

void BlockCache::resize(unsigned bits) {
  std::vector<Place> old = std::exchange(places_, std::vector<Place>(size_t{1} << bits));
  shift_ = 64 - bits;
  for (Place& place : old)
    if (place.block != nullptr) place_of(place.name) = std::move(place);
}

void BlockCache::clear() noexcept {
  for (Place& place : places_) place.block.reset();
  // An idle guest's memory goes back to the host.
  places_.resize(size_t{1} << first_bits);
  places_.shrink_to_fit();
  shift_ = 64 - first_bits;
  size_ = 0;
  ops_ = 0;
}

}  // namespace lodge::kvm::soft
