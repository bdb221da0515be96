// The functions by which the client changes its mappings, which may be its guest's memory: what is decoded of
// a page is stale afterwards, and a write-protection that is ours (soft::Options::guard_code) must not
// outlive the mapping that it was put on, nor replace the client's own.
//
// The accelerator's own mappings are no guest's: the linker sends its calls past all this (--wrap).
#undef _FORTIFY_SOURCE
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>

#include "kvm/preload/next.hpp"
#include "kvm/preload/table.hpp"
#include "kvm/soft/mmu/write_guard.hpp"

using namespace lodge::kvm::preload;

namespace {

void changes(const void* start, size_t size) noexcept {
  lodge::kvm::soft::admit_write(reinterpret_cast<uint64_t>(start), size);
}

using Map = void* (*)(void*, size_t, int, int, int, off_t);
constinit Next<Map> next_mmap("mmap"), next_mmap64("mmap64");
constinit Next<int (*)(void*, size_t)> next_munmap("munmap");
constinit Next<int (*)(void*, size_t, int)> next_mprotect("mprotect"), next_madvise("madvise");
constinit Next<void* (*)(void*, size_t, size_t, int, ...)> next_mremap("mremap");

// A vCPU's descriptor is a file that holds most of what its mapping shows; the File puts in the rest.
void* finish_mapping(int fd, void* mapping, size_t size, off_t offset) noexcept {
  const auto file = table().find(fd);
  if (!file || file->foreign() || file->mapped(mapping, size, static_cast<uint64_t>(offset))) return mapping;
  next_munmap.get()(mapping, size);
  errno = ENOMEM;
  return MAP_FAILED;
}

void* map(Next<Map>& next, void* start, size_t size, int protection, int flags, int fd,
          off_t offset) noexcept {
  if ((flags & MAP_FIXED) != 0) changes(start, size);
  void* const mapping = next.get()(start, size, protection, flags, fd, offset);
  return table().contains(fd) && mapping != MAP_FAILED ? finish_mapping(fd, mapping, size, offset) : mapping;
}

}  // namespace

LODGE_EXPORT void* mmap(void* start, size_t size, int protection, int flags, int fd, off_t offset) noexcept {
  return map(next_mmap, start, size, protection, flags, fd, offset);
}
LODGE_EXPORT void* mmap64(void* start, size_t size, int protection, int flags, int fd,
                          off_t offset) noexcept {
  return map(next_mmap64, start, size, protection, flags, fd, offset);
}

LODGE_EXPORT int munmap(void* start, size_t size) noexcept {
  changes(start, size);
  return next_munmap.get()(start, size);
}

LODGE_EXPORT int mprotect(void* start, size_t size, int protection) noexcept {
  changes(start, size);
  return next_mprotect.get()(start, size, protection);
}

LODGE_EXPORT int madvise(void* start, size_t size, int advice) noexcept {
  if (advice == MADV_DONTNEED || advice == MADV_REMOVE || advice == MADV_FREE) changes(start, size);
  return next_madvise.get()(start, size, advice);
}

LODGE_EXPORT void* mremap(void* start, size_t size, size_t new_size, int flags, ...) noexcept {
  va_list list;
  va_start(list, flags);
  void* const place = va_arg(list, void*);
  va_end(list);
  changes(start, size);
  if ((flags & MREMAP_FIXED) != 0) changes(place, new_size);
  return next_mremap.get()(start, size, new_size, flags, place);
}

// NOLINTBEGIN(bugprone-reserved-identifier): the linker's names
extern "C" {
void* __wrap_mmap(void* start, size_t size, int protection, int flags, int fd, off_t offset) noexcept {
  return next_mmap.get()(start, size, protection, flags, fd, offset);
}
int __wrap_munmap(void* start, size_t size) noexcept {
  return next_munmap.get()(start, size);
}
int __wrap_madvise(void* start, size_t size, int advice) noexcept {
  return next_madvise.get()(start, size, advice);
}
// Also called by handlers of signals, which must not look a function up.
int __wrap_mprotect(void* start, size_t size, int protection) noexcept {
  return static_cast<int>(::syscall(SYS_mprotect, start, size, protection));
}
}
// NOLINTEND(bugprone-reserved-identifier)
