// A disk of a running machine, as the machine's owner steers it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace lodge::device {

// Any thread, save those that run completions of images.
class Disk {
 public:
  // What has come back to the guest since the machine's last reset. A request that failed counts in its kind
  // and as an error, without bytes.
  struct Counts {
    uint64_t reads = 0, read_bytes = 0, writes = 0, written_bytes = 0;
    uint64_t flushes = 0;
    uint64_t discards = 0, zeroes = 0;  // requests of several ranges count once
    uint64_t errors = 0;                // also requests that broke the rules
  };

  virtual ~Disk() = default;
  // What the owner calls it; empty: nothing in particular.
  virtual const std::string& name() const noexcept = 0;
  virtual uint64_t size() const noexcept = 0;            // bytes
  virtual std::string_view format() const noexcept = 0;  // of the image, as block::Image says
  virtual bool read_only() const noexcept = 0;
  virtual Counts counts() const noexcept = 0;
  // Makes the disk larger, in use, and tells the guest. Blocks until the image has its new size. Returns 0 or
  // a positive errno: EINVAL (smaller than it is: the guest would lose what lies there; or no multiple of
  // 512), EROFS, ENOTSUP, and what the image's file gives.
  virtual int resize(uint64_t bytes) noexcept = 0;
};

}  // namespace lodge::device
