// A count for each cluster of a file, sparse: a hostile image may refer to clusters anywhere.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>

#include "base/error.hpp"

namespace lodge::block::qcow2 {

class Counts {
 public:
  uint32_t get(uint64_t cluster) const {
    const auto found = chunks_.find(cluster / size);
    return found == chunks_.end() ? 0 : found->second[cluster % size];
  }
  void add(uint64_t cluster, uint32_t by) { at(cluster) += by; }
  void set(uint64_t cluster, uint32_t count) { at(cluster) = count; }
  // One past the last cluster that ever had a count.
  uint64_t end() const { return end_; }

 private:
  static constexpr size_t size = 64, maximum_chunks = 1 << 22;  // about 1 GiB of memory
  uint32_t& at(uint64_t cluster) {
    const auto [it, added] = chunks_.try_emplace(cluster / size);
    if (added && chunks_.size() > maximum_chunks)
      usage_error("the image refers to too many places to be checked in 1 GiB of memory");
    end_ = std::max(end_, cluster + 1);
    return it->second[cluster % size];
  }
  std::unordered_map<uint64_t, std::array<uint32_t, size>> chunks_;
  uint64_t end_ = 0;
};

}  // namespace lodge::block::qcow2
