#include "machine/memory_host.hpp"

#include <linux/memfd.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::machine {
namespace {

using layout::KiB, layout::MiB;

constexpr unsigned max_numa_node = 1023;  // what the kernel can be built for

std::string huge_page_pool(uint64_t page_size) {
  return fmt::format("/sys/kernel/mm/hugepages/hugepages-{}kB", page_size / KiB);
}

[[noreturn]] void refuse_huge_pages(uint64_t size, uint64_t page_size) {
  usage_error(
      "--hugepages {}: the host has not enough of them free; give it {} by `echo N > {}/nr_hugepages` (2M "
      "also "
      "by sysctl vm.nr_hugepages)",
      page_size == 2 * MiB ? "2M" : "1G", size / page_size, huge_page_pool(page_size));
}

void check_node(unsigned node) {
  const std::filesystem::path nodes("/sys/devices/system/node");
  std::error_code missing;
  unsigned count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(nodes, missing)) {
    const std::string name = entry.path().filename().string();
    count += name.starts_with("node") && name.size() > 4 && name[4] >= '0' && name[4] <= '9';
  }
  if (count < 2)
    usage_error("--numa-node {}: this host has one memory node, so there is nothing to choose", node);
  if (node > max_numa_node || !std::filesystem::is_directory(nodes / fmt::format("node{}", node), missing))
    usage_error("--numa-node {}: this host has no such node; see {}/online", node, nodes.string());
}

// mbind(2), of which the C library has no wrapper.
void bind_to_node(const Mapping& memory, unsigned node) {
  std::array<unsigned long, (max_numa_node + 1) / (8 * sizeof(unsigned long)) + 1> mask{};
  constexpr unsigned bits = 8 * sizeof(unsigned long);
  mask[node / bits] = 1ul << node % bits;
  if (::syscall(SYS_mbind, memory.data(), memory.size(), MPOL_BIND, mask.data(), mask.size() * bits, 0) != 0)
    usage_error("--numa-node {}: the host does not permit it (mbind: {})", node, std::strerror(errno));
}

void advise(const Mapping& memory, const MemoryOptions& options) {
  using Transparent = MemoryOptions::Transparent;
  if (options.mergeable && ::madvise(memory.data(), memory.size(), MADV_MERGEABLE) != 0)
    usage_error("--ksm: this host's kernel does not merge memory (madvise: {})", std::strerror(errno));
  if (options.huge_page_size != 0) return;
  // Advice only: without huge pages the guest runs slower, not wrongly.
  const bool huge = options.transparent_huge_pages != Transparent::off;
  ::madvise(memory.data(), memory.size(), huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

// MADV_POPULATE_WRITE (Linux 5.14) says what is wrong where a store would be killed by SIGBUS.
void populate(const Mapping& memory, const MemoryProgress& progress) {
  constexpr uint64_t piece = 64 * MiB;
  std::atomic<uint64_t> next = 0;
  std::atomic<int> error = 0;
  std::mutex progress_mutex;
  uint64_t taken = 0;
  const auto report = [&](uint64_t more) {
    if (!progress) return;
    const std::lock_guard lock(progress_mutex);
    taken += more;
    progress(taken, memory.size());
  };
  const auto work = [&] {
    for (uint64_t at; error == 0 && (at = next.fetch_add(piece)) < memory.size();) {
      const uint64_t length = std::min<uint64_t>(piece, memory.size() - at);
      if (::madvise(memory.data() + at, length, MADV_POPULATE_WRITE) != 0)
        error = errno;
      else
        report(length);
    }
  };
  {
    std::vector<std::jthread> threads;
    const unsigned count = std::clamp(std::thread::hardware_concurrency(), 1u, 16u);
    for (unsigned i = 0; i < count; i++) threads.emplace_back(work);
  }
  if (error != 0)
    usage_error("--preallocate: the host does not give the machine all of its memory: {}",
                std::strerror(error));
}

}  // namespace

void check_memory(uint64_t size, const MemoryOptions& options) {
  using Transparent = MemoryOptions::Transparent;
  const uint64_t page = options.huge_page_size;
  if (page != 0) {
    if (options.mergeable) usage_error("--ksm: huge pages are not merged; leave --ksm or --hugepages out");
    if (options.transparent_huge_pages != Transparent::automatic)
      usage_error("--transparent-hugepages: with --hugepages all memory is in huge pages; leave one out");
    if (size % page != 0)
      usage_error("--memory: {} MiB is not a multiple of the huge pages' {} MiB", size / MiB, page / MiB);
    if (!std::filesystem::exists(huge_page_pool(page)))
      usage_error("--hugepages: this host has no huge pages of {} MiB ({} is missing)", page / MiB,
                  huge_page_pool(page));
  }
  if (options.mergeable && options.lock)
    usage_error("--ksm: locked memory is not merged; leave --ksm or --memory-lock out");
  if (options.numa_node) check_node(*options.numa_node);
}

Fd create_backing(uint64_t size, const MemoryOptions& options) {
  if (size == 0 || size % 4096 != 0 || size > (uint64_t{1} << 46))
    usage_error("guest memory of {} bytes: give a multiple of 4096 between 4 KiB and 64 TiB", size);
  if (options.mergeable) return {};
  unsigned flags = MFD_CLOEXEC;
  if (options.huge_page_size == 2 * MiB) flags |= MFD_HUGETLB | MFD_HUGE_2MB;
  if (options.huge_page_size == 1024 * MiB) flags |= MFD_HUGETLB | MFD_HUGE_1GB;
  Fd fd(memfd_create("lodge-ram", flags));
  if (!fd && options.huge_page_size != 0)
    usage_error("--hugepages: the host does not give any (memfd_create: {})", std::strerror(errno));
  if (!fd) throw_errno("cannot create guest memory (memfd_create)");
  if (ftruncate(fd.get(), static_cast<off_t>(size)) != 0) throw_errno("cannot size guest memory");
  return fd;
}

// MAP_NORESERVE: a guest rarely touches all its memory, and the host's overcommit policy should not refuse a
// machine for what it might touch. Huge pages are reserved: there a guest that touches one too many would end
// by a signal.
Mapping map_backing(uint64_t size, const MemoryOptions& options, const Fd& fd) {
  const int kind = fd ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  const int flags = kind | (options.huge_page_size == 0 ? MAP_NORESERVE : 0);
  try {
    return Mapping(size, PROT_READ | PROT_WRITE, flags, fd.get(), 0, "cannot map guest memory");
  } catch (const std::system_error& error) {
    if (options.huge_page_size != 0 && error.code().value() == ENOMEM)
      refuse_huge_pages(size, options.huge_page_size);
    throw;
  }
}

void prepare(const Mapping& memory, const MemoryOptions& options, const MemoryProgress& progress) {
  if (options.numa_node) bind_to_node(memory, *options.numa_node);
  advise(memory, options);
  if (options.lock && ::mlock2(memory.data(), memory.size(), MLOCK_ONFAULT) != 0)
    usage_error("--memory-lock: {}; `ulimit -l` must allow {} KiB", std::strerror(errno),
                memory.size() / KiB);
  if (options.preallocate) populate(memory, progress);
}

}  // namespace lodge::machine
