// Guest RAM: a memfd mapped shared, laid out around the PCI hole, given to the accelerator as memory slots.
#pragma once

#include <cstdint>
#include <optional>
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

class GuestMemory {
 public:
  // `size` bytes of RAM, a multiple of 4096, in `ranges` of guest-physical space below and above the PCI hole
  // (machine/layout.hpp). Throws std::system_error when the host refuses.
  explicit GuestMemory(uint64_t size);

  // Registers slots from number `first_slot` on. `vm` must outlive this object or detach() be called before.
  void attach(kvm::Vm& vm, uint32_t first_slot);

  uint64_t size() const noexcept { return size_; }
  std::span<const RamRange> ranges() const noexcept { return ranges_; }

  // The host view of [gpa, gpa + size) if all of it is RAM and contiguous; empty otherwise. Callers that write through
  // it call note_write() afterwards.
  std::span<uint8_t> view(uint64_t gpa, uint64_t size) noexcept;
  // Copies; false (and nothing copied) when the range is not wholly RAM. write() also tells the accelerator.
  bool read(uint64_t gpa, std::span<uint8_t> out) noexcept;
  bool write(uint64_t gpa, std::span<const uint8_t> data) noexcept;
  void note_write(uint64_t gpa, uint64_t size) noexcept;

 private:
  uint64_t size_;
  Fd fd_;
  Mapping mapping_;
  std::vector<RamRange> ranges_;
  kvm::Vm* vm_ = nullptr;
};

}  // namespace lodge::machine
