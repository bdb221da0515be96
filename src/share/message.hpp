// One request on its way through a file server: what was asked and where the answer goes, wherever that lies.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <vector>

namespace lodge::share {

// Belongs to the thread that serves it. What it names may change at any time: it is copied before it is
// checked.
class Message {
 public:
  virtual ~Message() = default;
  virtual uint64_t request_size() const noexcept = 0;
  virtual uint64_t room() const noexcept = 0;  // for the answer
  // Copies from byte `offset` of the request, or into the answer; returns how many bytes there were.
  virtual size_t read(uint64_t offset, std::span<uint8_t> out) const noexcept = 0;
  virtual size_t write(uint64_t offset, std::span<const uint8_t> data) noexcept = 0;
  // The pieces of memory of [offset, offset + size) of request and answer, for file I/O without a copy. At
  // most 1024 (IOV_MAX).
  virtual void request_pieces(uint64_t offset, uint64_t size, std::vector<iovec>& out) const = 0;
  virtual void answer_pieces(uint64_t offset, uint64_t size, std::vector<iovec>& out) = 0;
};

}  // namespace lodge::share
