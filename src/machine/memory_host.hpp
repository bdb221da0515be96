// What the host is asked to do for guest RAM when it is made: the backing, and the advice, placement and
// locks on it.
#pragma once

#include "base/fd.hpp"
#include "base/mapping.hpp"
#include "machine/memory.hpp"

namespace lodge::machine {

// A memfd of `size` bytes, or none for private memory. Throws UsageError or std::system_error.
Fd create_backing(uint64_t size, const MemoryOptions& options);
// All of it, mapped. Throws UsageError when there are not so many huge pages, std::system_error.
Mapping map_backing(uint64_t size, const MemoryOptions& options, const Fd& fd);
// Places, advises, locks and fills `memory` in this order. Throws UsageError naming the option that the host
// refuses.
void prepare(const Mapping& memory, const MemoryOptions& options, const MemoryProgress& progress);

}  // namespace lodge::machine
