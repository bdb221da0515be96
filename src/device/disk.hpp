// A disk of a running machine, as the machine's owner steers it.
#pragma once

#include <cstdint>
#include <string>

namespace lodge::device {

// Any thread, save those that run completions of images.
class Disk {
 public:
  virtual ~Disk() = default;
  // What the owner calls it; empty: nothing in particular.
  virtual const std::string& name() const noexcept = 0;
  virtual uint64_t size() const noexcept = 0;  // bytes
  // Makes the disk larger, in use, and tells the guest. Blocks until the image has its new size. Returns 0 or
  // a positive errno: EINVAL (smaller than it is: the guest would lose what lies there; or no multiple of
  // 512), EROFS, ENOTSUP, and what the image's file gives.
  virtual int resize(uint64_t bytes) noexcept = 0;
};

}  // namespace lodge::device
