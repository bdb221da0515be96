// Names translated code for perf, in the file that it looks at for code without an ELF file:
// /tmp/perf-PID.map, a line "ADDRESS SIZE NAME" in hexadecimal for each piece. Shared by the translators of a
// VM; any thread.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "base/fd.hpp"

namespace lodge::kvm::soft {

class PerfMap {
 public:
  // Replaces the file of an earlier machine of this process. Throws std::system_error.
  PerfMap();
  // As `path`, for tests.
  explicit PerfMap(const std::string& path);

  // `owner` tells whose pieces forget() is about.
  void add(const void* owner, const uint8_t* begin, const uint8_t* end, const std::string& name) noexcept;
  // The code is gone and its place will be used again: no two lines of the file overlap.
  void forget(const void* owner) noexcept;

 private:
  void append(const std::string& lines) noexcept;

  Fd file_;
  std::mutex mutex_;
  std::map<const void*, std::string> lines_;
};

}  // namespace lodge::kvm::soft
