#include "machine/memory.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::machine {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;

// A Vm that knows memory slots and note_write, and nothing else.
class SlotVm : public kvm::Vm {
 public:
  std::map<uint32_t, kvm_userspace_memory_region> slots;
  std::vector<std::pair<uint64_t, uint64_t>> notes;
  uint32_t refused_slot = UINT32_MAX;

  void set_user_memory_region(const kvm_userspace_memory_region& region) override {
    if (region.slot == refused_slot) throw_errno(EINVAL, "slot");
    if (region.memory_size == 0)
      slots.erase(region.slot);
    else
      slots[region.slot] = region;
  }
  void note_write(uint64_t gpa, uint64_t size) noexcept override { notes.emplace_back(gpa, size); }

  int check_extension(uint32_t) const noexcept override { return 0; }
  void enable_cap(const kvm_enable_cap&) override {}
  void get_dirty_log(uint32_t, std::span<uint64_t>) override {}
  void clear_dirty_log(uint32_t, uint64_t, uint32_t, std::span<const uint64_t>) override {}
  std::unique_ptr<kvm::Vcpu> create_vcpu(unsigned) override { return nullptr; }
  void set_tss_addr(uint64_t) override {}
  void set_identity_map_addr(uint64_t) override {}
  void create_irqchip() override {}
  void create_pit2(const kvm_pit_config&) override {}
  kvm_irqchip irqchip(uint32_t) override { return {}; }
  void set_irqchip(const kvm_irqchip&) override {}
  kvm_pit_state2 pit2() override { return {}; }
  void set_pit2(const kvm_pit_state2&) override {}
  int irq_line(uint32_t, bool) noexcept override { return 0; }
  int signal_msi(const kvm_msi&) noexcept override { return 0; }
  void set_gsi_routing(std::span<const kvm_irq_routing_entry>) override {}
  void irqfd(const kvm_irqfd&) override {}
  void ioeventfd(const kvm_ioeventfd&) override {}
  void register_coalesced(const kvm_coalesced_mmio_zone&) override {}
  void unregister_coalesced(const kvm_coalesced_mmio_zone&) override {}
  void reinject_control(const kvm_reinject_control&) override {}
  void set_msr_filter(const kvm_msr_filter&) override {}
  Fd statistics_fd() override { return {}; }
  void set_boot_cpu_id(uint32_t) override {}
  uint32_t default_tsc_khz() override { return 0; }
  void set_default_tsc_khz(uint32_t) override {}
  kvm_clock_data clock() override { return {}; }
  void set_clock(const kvm_clock_data&) override {}
};

TEST(GuestMemory, SmallMemoryIsOneRangeFromZero) {
  GuestMemory memory(16 * layout::MiB);
  ASSERT_EQ(memory.ranges().size(), 1u);
  EXPECT_EQ(memory.ranges()[0].gpa, 0u);
  EXPECT_EQ(memory.ranges()[0].size, 16 * layout::MiB);
}

TEST(GuestMemory, MemoryBeyondTheHoleStartsAgainAtFourGiB) {
  GuestMemory memory(layout::low_ram_limit + 8192);
  ASSERT_EQ(memory.ranges().size(), 2u);
  EXPECT_EQ(memory.ranges()[1].gpa, layout::high_ram_base);
  EXPECT_EQ(memory.ranges()[1].size, 8192u);
  EXPECT_EQ(memory.ranges()[1].offset, layout::low_ram_limit);
  EXPECT_EQ(memory.view(layout::high_ram_base + 4096, 4096).data(),
            memory.view(0, 1).data() + layout::low_ram_limit + 4096);
}

TEST(GuestMemory, AViewThatLeavesRamIsEmpty) {
  GuestMemory memory(layout::low_ram_limit + 4096);
  EXPECT_TRUE(memory.view(layout::low_ram_limit - 1, 2).empty());
  EXPECT_TRUE(memory.view(layout::low_ram_limit, 1).empty());
  EXPECT_TRUE(memory.view(layout::high_ram_base - 1, 2).empty());
  EXPECT_TRUE(memory.view(layout::high_ram_base + 4096, 1).empty());
  EXPECT_TRUE(memory.view(0, ~uint64_t{0}).empty());
  EXPECT_TRUE(memory.view(~uint64_t{0}, 2).empty());
  EXPECT_EQ(memory.view(layout::low_ram_limit - 1, 1).size(), 1u);
}

TEST(GuestMemory, WhatIsWrittenReadsBackAndIsToldToTheAccelerator) {
  SlotVm vm;
  GuestMemory memory(layout::MiB);
  memory.attach(vm, 0);
  std::array<uint8_t, 3> in{1, 2, 3}, out{};
  EXPECT_TRUE(memory.write(0x1000, in));
  EXPECT_TRUE(memory.read(0x1000, out));
  EXPECT_EQ(in, out);
  EXPECT_THAT(vm.notes, ElementsAre(Pair(0x1000, 3)));
}

TEST(GuestMemory, ARefusedWriteCopiesNothing) {
  GuestMemory memory(layout::MiB);
  std::array<uint8_t, 2> data{7, 7};
  EXPECT_FALSE(memory.write(layout::MiB - 1, data));
  EXPECT_EQ(memory.view(layout::MiB - 1, 1)[0], 0);
  EXPECT_FALSE(memory.read(layout::MiB - 1, data));
}

TEST(GuestMemory, AttachRegistersASlotARangeAndDetachRemovesThem) {
  SlotVm vm;
  GuestMemory memory(layout::low_ram_limit + 4096);
  memory.attach(vm, 4);
  ASSERT_EQ(vm.slots.size(), 2u);
  EXPECT_EQ(vm.slots[4].memory_size, layout::low_ram_limit);
  EXPECT_EQ(vm.slots[5].guest_phys_addr, layout::high_ram_base);
  EXPECT_EQ(vm.slots[5].userspace_addr,
            reinterpret_cast<uint64_t>(memory.view(layout::high_ram_base, 1).data()));
  memory.detach();
  EXPECT_TRUE(vm.slots.empty());
}

TEST(GuestMemory, AFailedAttachLeavesNoSlotBehind) {
  SlotVm vm;
  vm.refused_slot = 1;
  GuestMemory memory(layout::low_ram_limit + 4096);
  EXPECT_THROW(memory.attach(vm, 0), std::system_error);
  EXPECT_TRUE(vm.slots.empty());
}

TEST(GuestMemory, AnUnmappedPageKeepsItsContents) {
  GuestMemory memory(layout::MiB);
  memory.view(0x3000, 1)[0] = 0x42;
  memory.unmap_page(0x3abc);
  memory.unmap_page(layout::MiB);
  EXPECT_EQ(memory.view(0x3000, 1)[0], 0x42);
}

TEST(GuestMemory, AnOddSizeIsRefused) {
  EXPECT_THROW(GuestMemory(4097), UsageError);
  EXPECT_THROW(GuestMemory(0), UsageError);
}

TEST(GuestMemoryRelease, WholePagesGoBackAndReadAsZeros) {
  GuestMemory memory(layout::MiB);
  const std::vector<uint8_t> ones(4 * 4096, 1);
  ASSERT_TRUE(memory.write(0x8000, ones));
  EXPECT_EQ(memory.release(0x8001, 3 * 4096), 2u * 4096);
  EXPECT_EQ(memory.view(0x8000, 1)[0], 1);
  EXPECT_EQ(memory.view(0x9000, 1)[0], 0);
  EXPECT_EQ(memory.view(0xafff, 1)[0], 0);
  EXPECT_EQ(memory.view(0xb000, 1)[0], 1);
  EXPECT_EQ(memory.release(0x8001, 4096), 0u);
  EXPECT_EQ(memory.release(layout::MiB - 4096, 8192), 0u);
  EXPECT_EQ(memory.release(~uint64_t{0}, 8192), 0u);
  EXPECT_EQ(memory.release(0, ~uint64_t{0}), 0u);
}

TEST(GuestMemory, WhatIsGivenBackIsZeroAndNotHeldAnyMore) {
  using Transparent = MemoryOptions::Transparent;
  for (const bool mergeable : {false, true}) {
    GuestMemory memory(4 * layout::MiB, {.mergeable = mergeable, .transparent_huge_pages = Transparent::off});
    EXPECT_EQ(memory.fd() < 0, mergeable);
    EXPECT_EQ(memory.resident(), 0u);
    memory.write(layout::MiB, std::vector<uint8_t>(layout::MiB, 7));
    EXPECT_EQ(memory.resident(), layout::MiB);
    EXPECT_EQ(memory.release(layout::MiB + 1, 8192), 4096u);  // the one page that is wholly in it
    EXPECT_EQ(memory.resident(), layout::MiB - 4096);
    EXPECT_EQ(memory.view(layout::MiB + 4096, 1)[0], 0);
    EXPECT_EQ(memory.view(layout::MiB, 1)[0], 7);
  }
}

TEST(GuestMemory, WhatWasPromisedIsNotGivenBack) {
  GuestMemory memory(4 * layout::MiB, {.preallocate = true});
  EXPECT_EQ(memory.resident(), 4 * layout::MiB);
  EXPECT_EQ(memory.release(0, layout::MiB), 0u);
  EXPECT_EQ(memory.resident(), 4 * layout::MiB);
}

TEST(GuestMemory, PreallocationTellsHowFarItIs) {
  std::vector<uint64_t> seen;
  const GuestMemory memory(160 * layout::MiB, {.preallocate = true}, [&](uint64_t taken, uint64_t size) {
    EXPECT_EQ(size, 160 * layout::MiB);
    seen.push_back(taken);
  });
  EXPECT_EQ(seen.size(), 3u);
  EXPECT_TRUE(std::ranges::is_sorted(seen));
  EXPECT_EQ(seen.back(), 160 * layout::MiB);
}

// A line of a process's or a host's account of its memory, "NAME: VALUE...".
std::string account_of(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(name)) return line.substr(name.size());
  return {};
}

// The flags of the mapping that has `address`, as the kernel shows them: "rd wr mr...".
std::string mapping_flags(const void* address) {
  std::ifstream smaps("/proc/self/smaps");
  const auto wanted = reinterpret_cast<unsigned long long>(address);
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long long begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%llx-%llx ", &begin, &end) == 2) inside = begin <= wanted && wanted < end;
    if (inside && line.starts_with("VmFlags:")) return line.substr(8);
  }
  return {};
}

// The kernel is asked to merge, and where somebody has switched that on it does: two machines whose pages are
// equal hold them once.
TEST(GuestMemory, EqualPagesAreOneWithKsm) {
  if (!std::filesystem::exists("/sys/kernel/mm/ksm")) GTEST_SKIP() << "this kernel merges no pages";
  using Transparent = MemoryOptions::Transparent;
  const MemoryOptions options{.mergeable = true, .transparent_huge_pages = Transparent::off};
  GuestMemory one(8 * layout::MiB, options), two(8 * layout::MiB, options), plain(8 * layout::MiB);
  EXPECT_THAT(mapping_flags(one.view(0, 1).data()), ::testing::HasSubstr(" mg"));
  EXPECT_THAT(mapping_flags(plain.view(0, 1).data()), ::testing::Not(::testing::HasSubstr(" mg")));
  if (account_of("/sys/kernel/mm/ksm/run", "") != "1")
    GTEST_SKIP() << "nobody has switched it on: echo 1 >/sys/kernel/mm/ksm/run";
  std::vector<uint8_t> bytes(8 * layout::MiB);
  for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<uint8_t>(i * 2654435761u >> 13 ^ i >> 12);
  one.write(0, bytes);
  two.write(0, bytes);
  const auto merged = [] {
    const std::string pages = account_of("/proc/self/ksm_merging_pages", "");
    return pages.empty() ? 0 : std::stoul(pages);
  };
  for (int i = 0; i < 1200 && merged() < 2 * bytes.size() / 4096; i++)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_GE(merged(), 2 * bytes.size() / 4096);
  two.write(4096, std::vector<uint8_t>{1, 2, 3});
  EXPECT_EQ(one.view(4096, 1)[0], bytes[4096]) << "what is written is no longer shared";
}

TEST(GuestMemory, OffsetsLeaveTheHoleOut) {
  GuestMemory memory(layout::low_ram_limit + 8192);
  EXPECT_EQ(memory.offset(4096), 4096u);
  EXPECT_EQ(memory.offset(layout::high_ram_base + 4096), layout::low_ram_limit + 4096);
  for (const uint64_t gpa : {layout::low_ram_limit, layout::high_ram_base + 8192, ~uint64_t{0}})
    EXPECT_EQ(memory.offset(gpa), std::nullopt);
}

std::string refusal(uint64_t size, const MemoryOptions& options) {
  try {
    check_memory(size, options);
    GuestMemory memory(size, options);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "taken";
}

TEST(MemoryOptionsOf, WhatDoesNotGoTogetherIsRefused) {
  using Transparent = MemoryOptions::Transparent;
  EXPECT_THAT(refusal(64 * layout::MiB, {.mergeable = true, .huge_page_size = 2 * layout::MiB}),
              ::testing::HasSubstr("--ksm"));
  EXPECT_THAT(refusal(64 * layout::MiB, {.mergeable = true, .lock = true}), ::testing::HasSubstr("--ksm"));
  EXPECT_THAT(refusal(63 * layout::MiB, {.huge_page_size = 2 * layout::MiB}),
              ::testing::HasSubstr("multiple"));
  EXPECT_THAT(refusal(64 * layout::MiB,
                      {.transparent_huge_pages = Transparent::on, .huge_page_size = 2 * layout::MiB}),
              ::testing::HasSubstr("--transparent-hugepages"));
}

// More than any host has: the pool is too small, or there is none of that size.
TEST(MemoryOptionsOf, AHostWithoutEnoughHugePagesSaysWhere) {
  EXPECT_THAT(refusal(uint64_t{1} << 44, {.huge_page_size = 2 * layout::MiB}),
              ::testing::HasSubstr("/sys/kernel/mm/hugepages/hugepages-2048kB"));
}

TEST(MemoryOptionsOf, ANodeThatIsNotThereIsRefused) {
  EXPECT_THAT(refusal(4 * layout::MiB, {.numa_node = 1000}), ::testing::HasSubstr("--numa-node 1000"));
}

}  // namespace
}  // namespace lodge::machine
