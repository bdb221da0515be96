// Locks on image files: open file description locks on single bytes, so that they end with the descriptor and
// hold between two users in one process too. The bytes and their meaning are those that QEMU's file driver
// uses, so that Lodge and QEMU exclude each other: byte 100 + p says "I use permission p", byte 200 + p says
// "I do not share permission p" (p: 0 consistent read, 1 write, 3 resize).
#pragma once

#include <string>

#include "base/fd.hpp"

namespace lodge::block {

enum class Use {
  read,   // the contents must not change meanwhile: any number of readers, no writer
  write,  // nobody else writes or reads
};

// Locks `fd` for its lifetime, or until locked anew for another use. Throws UsageError that names the image
// and who holds it.
void lock_image(const Fd& fd, const std::string& path, Use use);

}  // namespace lodge::block
