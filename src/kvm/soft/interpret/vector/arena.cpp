#include "kvm/soft/interpret/vector/arena.hpp"

#include <unistd.h>

namespace lodge::kvm::soft::simd {

Arena::~Arena() {
  for (const Chunk& chunk : chunks_) {
    munmap(chunk.writable, chunk_size);
    munmap(chunk.executable, chunk_size);
  }
}

bool Arena::grow() noexcept {
  if (chunks_.size() * chunk_size >= limit) return false;
  const int fd = memfd_create("lodge-vector-stubs", MFD_CLOEXEC);
  if (fd < 0) return false;
  void* writable = MAP_FAILED;
  void* executable = MAP_FAILED;
  if (ftruncate(fd, chunk_size) == 0) {
    writable = mmap(nullptr, chunk_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    executable = mmap(nullptr, chunk_size, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
  }
  close(fd);
  if (writable == MAP_FAILED || executable == MAP_FAILED) {
    if (writable != MAP_FAILED) munmap(writable, chunk_size);
    if (executable != MAP_FAILED) munmap(executable, chunk_size);
    return false;
  }
  chunks_.push_back({static_cast<uint8_t*>(writable), static_cast<uint8_t*>(executable)});
  used_ = 0;
  return true;
}

const void* Arena::add(std::span<const uint8_t> code) noexcept {
  const size_t size = (code.size() + 15) & ~size_t{15};
  if (size > chunk_size) return nullptr;
  if (used_ + size > chunk_size && !grow()) return nullptr;
  const Chunk& chunk = chunks_.back();
  std::memcpy(chunk.writable + used_, code.data(), code.size());
  const void* const result = chunk.executable + used_;
  used_ += size;
  return result;
}

}  // namespace lodge::kvm::soft::simd
