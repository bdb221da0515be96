// What a VM is after memory ran out: each allocation of a call fails in turn, and the call is made again.
#include "kvm/soft/vm.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <new>
#include <optional>

#include "base/mapping.hpp"
#include "kvm/soft/vcpu.hpp"

namespace {

// Allocations of this thread until one fails; without a value none does.
thread_local std::optional<unsigned> allocations_left;

}  // namespace

void* operator new(size_t size) {
  if (allocations_left && (*allocations_left)-- == 0) {
    allocations_left.reset();
    throw std::bad_alloc();
  }
  if (void* const memory = std::malloc(size == 0 ? 1 : size); memory != nullptr) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace lodge::kvm::soft {
namespace {

// False: the allocation with this number failed.
template <class Call>
bool succeeds_with(unsigned allocations, const Call& call) {
  allocations_left = allocations;
  try {
    call();
  } catch (const std::bad_alloc&) {
    return false;
  }
  allocations_left.reset();
  return true;
}

constexpr uint32_t tsc_khz = 2'000'000;

TEST(VmWithoutMemory, AVcpuThatCannotBeMadeLeavesNothing) {
  for (unsigned left = 0;; ++left) {
    SoftVm vm(tsc_khz, {.engine = Engine::interpret});
    std::unique_ptr<Vcpu> vcpu;
    const bool made = succeeds_with(left, [&] { vcpu = vm.create_vcpu(0); });
    if (made) break;
    EXPECT_NO_THROW(vcpu = vm.create_vcpu(0)) << left;
  }
}

TEST(VmWithoutMemory, ASlotThatCannotBeDeletedIsStillGuarded) {
  const Mapping memory = Mapping::anonymous(page_size);
  kvm_userspace_memory_region region{};
  region.memory_size = page_size;
  region.userspace_addr = reinterpret_cast<uint64_t>(memory.data());
  for (unsigned left = 0;; ++left) {
    SoftVm vm(tsc_khz, {.engine = Engine::interpret, .guard_code = true});
    for (uint32_t slot = 0; slot < 2; ++slot) {
      region.slot = slot;
      region.guest_phys_addr = slot * page_size;
      vm.set_user_memory_region(region);
    }
    kvm_userspace_memory_region none{};
    if (succeeds_with(left, [&] { vm.set_user_memory_region(none); })) break;
    const auto spaces = vm.memory();
    Slot* const slot = spaces->space[0].find(0);
    ASSERT_NE(slot, nullptr) << left;
    ASSERT_TRUE(slot->mark_code(0));
    EXPECT_NE(slot->code(0).load() & Slot::has_code, 0u) << left;
    EXPECT_NO_THROW(vm.set_user_memory_region(none)) << left;
    EXPECT_EQ(vm.memory()->space[0].find(0), nullptr);
  }
}

}  // namespace
}  // namespace lodge::kvm::soft
