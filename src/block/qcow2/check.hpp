// Checking a qcow2 image: whether every cluster's reference count is what the tables say, and whether the
// tables make sense. Works on the file alone, so that it can look at what cannot be opened.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "block/qcow2/format.hpp"

namespace lodge::block::qcow2 {

enum class Repair {
  none,
  leaks,  // counts that are too high
  all,    // also counts that are too low, flags, and entries that point nowhere (their contents become zeros)
};

struct CheckResult {
  uint64_t leaks = 0;        // clusters that are counted but not used: space is lost, nothing else
  uint64_t corruptions = 0;  // anything through which data is or will be lost
  uint64_t flags = 0;        // "copied" flags that are clear though they could be set: harmless
  uint64_t leaks_fixed = 0, corruptions_fixed = 0, flags_fixed = 0;
  uint64_t clusters = 0, allocated = 0, compressed = 0;  // of the active disk
  uint64_t end = 0;                                      // of the last cluster in use, in the file
  std::vector<std::string> findings;                     // one line each; the first hundred
  uint64_t left() const { return corruptions - corruptions_fixed; }
};

// `progress` is called now and then with parts done and parts in all. Throws UsageError when the header
// cannot be read, std::system_error for I/O. Repairing needs writable storage that nobody else uses.
CheckResult check(Storage& storage, Repair repair,
                  const std::function<void(uint64_t, uint64_t)>& progress = nullptr);

}  // namespace lodge::block::qcow2
