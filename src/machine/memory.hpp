// Guest RAM: a memfd mapped shared (or, to be merged with other memory by KSM, private memory), laid out
// around the PCI hole, given to the accelerator as memory slots.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/fd.hpp"
#include "base/mapping.hpp"
#include "kvm/kvm.hpp"

namespace lodge::machine {

// What guest RAM is made of on the host. Several of these exclude each other; check_memory() says which.
struct MemoryOptions {
  enum class Transparent { automatic, on, off };
  bool mergeable = false;  // KSM: private memory instead of a memfd, which the kernel does not merge
  Transparent transparent_huge_pages = Transparent::automatic;
  uint64_t huge_page_size = 0;  // of explicit huge pages, 2 MiB or 1 GiB; 0: none
  bool preallocate = false;
  bool lock = false;  // no page is swapped out
  std::optional<unsigned> numa_node;
  bool operator==(const MemoryOptions&) const = default;
};

// How many of `size` bytes `preallocate` has taken, several times while it works. From several threads, one
// at a time.
using MemoryProgress = std::function<void(uint64_t taken, uint64_t size)>;

// Throws UsageError, naming the options of `lodge run`, when `size` bytes of such memory cannot be, or this
// host does not offer them.
void check_memory(uint64_t size, const MemoryOptions& options);

struct RamRange {
  uint64_t gpa;
  uint64_t size;
  uint64_t offset;  // in the memfd
};

// Set-up (constructor, attach, detach) from one thread; everything else from any thread. The guest runs at
// the same time: what is read may change between two reads, so copy a structure before checking it.
class GuestMemory {
 public:
  // `size` bytes of RAM, a multiple of 4096, in `ranges` of guest-physical space below and above the PCI hole
  // (machine/layout.hpp). Throws UsageError for what check_memory() refuses or when the host's huge pages do
  // not suffice, std::system_error when the host refuses.
  explicit GuestMemory(uint64_t size, const MemoryOptions& options = {}, const MemoryProgress& progress = {});

  GuestMemory(const GuestMemory&) = delete;
  GuestMemory& operator=(const GuestMemory&) = delete;
  ~GuestMemory() { detach(); }

  // Registers one slot a range, from number `first_slot` on. `vm` must outlive this object or detach() be
  // called before; no view may be in use by a vCPU when this object dies. Throws std::system_error.
  void attach(kvm::Vm& vm, uint32_t first_slot);
  // Removes the slots again. Nothing to do when not attached.
  void detach() noexcept;

  uint64_t size() const noexcept { return size_; }
  std::span<const RamRange> ranges() const noexcept { return ranges_; }
  // Bytes of it that the host holds at present.
  uint64_t resident() const noexcept;
  // The memfd, for back-end processes; owned by this object. -1: private memory.
  int fd() const noexcept { return fd_.get(); }

  // Where the page is in RAM without its holes; nothing when it is not RAM.
  std::optional<uint64_t> offset(uint64_t gpa) const noexcept;
  // The host view of [gpa, gpa + size) if all of it is RAM and contiguous; empty otherwise. Callers that
  // write through it call note_write() afterwards. An empty range has an empty view.
  std::span<uint8_t> view(uint64_t gpa, uint64_t size) noexcept;
  // Copies; false (and nothing copied) when the range is not wholly RAM. write() also tells the accelerator.
  bool read(uint64_t gpa, std::span<uint8_t> out) noexcept;
  bool write(uint64_t gpa, std::span<const uint8_t> data) noexcept;
  void note_write(uint64_t gpa, uint64_t size) noexcept;
  // Gives the whole pages of [gpa, gpa + size) back to the host; they read as zeros from now on. Nothing
  // happens where the range is not wholly RAM, nor with memory that was promised to be there (explicit huge
  // pages, preallocated, locked). Returns how many bytes that were.
  uint64_t release(uint64_t gpa, uint64_t size) noexcept;
  // Whether release() does anything.
  bool gives_back() const noexcept {
    return options_.huge_page_size == 0 && !options_.preallocate && !options_.lock;
  }
  // Takes the page at `gpa` out of the host's page tables (its contents stay in the memfd), so that the next
  // access to it faults on the host: what pc-testdev offers to tests of accelerators. Nothing with private
  // memory, which would lose them.
  void unmap_page(uint64_t gpa) noexcept;

 private:
  uint64_t size_;
  MemoryOptions options_;
  Fd fd_;
  Mapping mapping_;
  std::vector<RamRange> ranges_;
  kvm::Vm* vm_ = nullptr;
  uint32_t first_slot_ = 0;
};

}  // namespace lodge::machine
