// A page-fault storm: map 1 MiB, touch each page, read each back, unmap.
#include <sys/mman.h>

#include <cerrno>

#include "program.hpp"

int main(int argc, char** argv) {
  return compare::measure("page-faults", argc, argv, [](uint64_t iterations) {
    constexpr size_t bytes = 1 << 20, page = 4096;
    compare::Checksum sum;
    while (iterations--) {
      void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapping == MAP_FAILED) compare::fail("mmap");
      if (madvise(mapping, bytes, MADV_NOHUGEPAGE) != 0 && errno != EINVAL) compare::fail("madvise");
      auto* const memory = static_cast<volatile uint8_t*>(mapping);
      for (size_t at = 0; at < bytes; at += page) memory[at] = static_cast<uint8_t>(memory[at] + at / page);
      uint64_t total = 0;
      for (size_t at = 0; at < bytes; at += page) total += memory[at];
      sum.add(total);
      munmap(mapping, bytes);
    }
    return sum.value();
  });
}
