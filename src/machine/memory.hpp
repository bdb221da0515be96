// Guest RAM: a memfd mapped shared, laid out around the PCI hole, given to the accelerator as memory slots.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/fd.hpp"
#include "base/mapping.hpp"
#include "kvm/kvm.hpp"

namespace lodge::machine {

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
  // (machine/layout.hpp). Throws std::system_error when the host refuses.
  explicit GuestMemory(uint64_t size);

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
  // The memfd, for back-end processes; owned by this object.
  int fd() const noexcept { return fd_.get(); }

  // The host view of [gpa, gpa + size) if all of it is RAM and contiguous; empty otherwise. Callers that
  // write through it call note_write() afterwards. An empty range has an empty view.
  std::span<uint8_t> view(uint64_t gpa, uint64_t size) noexcept;
  // Copies; false (and nothing copied) when the range is not wholly RAM. write() also tells the accelerator.
  bool read(uint64_t gpa, std::span<uint8_t> out) noexcept;
  bool write(uint64_t gpa, std::span<const uint8_t> data) noexcept;
  void note_write(uint64_t gpa, uint64_t size) noexcept;
  // Gives the whole pages of [gpa, gpa + size) back to the host; they read as zeros from now on. Nothing
  // happens where the range is not wholly RAM. Returns how many bytes that were.
  uint64_t release(uint64_t gpa, uint64_t size) noexcept;
  // Takes the page at `gpa` out of the host's page tables (its contents stay in the memfd), so that the next
  // access to it faults on the host: what pc-testdev offers to tests of accelerators.
  void unmap_page(uint64_t gpa) noexcept;

 private:
  uint64_t size_;
  Fd fd_;
  Mapping mapping_;
  std::vector<RamRange> ranges_;
  kvm::Vm* vm_ = nullptr;
  uint32_t first_slot_ = 0;
};

}  // namespace lodge::machine
