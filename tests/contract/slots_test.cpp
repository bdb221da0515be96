// Memory slots: also read-only ones, and changed while a vCPU runs; the dirty log.
#include <atomic>
#include <chrono>
#include <cstring>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Slots);

constexpr uint64_t high = 0x10000000;  // where the tests put a second slot

void set_slot(Guest& guest, uint32_t slot, uint64_t gpa, const Mapping& memory, uint32_t flags = 0) {
  guest.vm().set_user_memory_region({.slot = slot,
                                     .flags = flags,
                                     .guest_phys_addr = gpa,
                                     .memory_size = memory.size(),
                                     .userspace_addr = reinterpret_cast<uint64_t>(memory.data())});
}
void remove_slot(Guest& guest, uint32_t slot, uint64_t gpa) {
  guest.vm().set_user_memory_region(
      {.slot = slot, .flags = 0, .guest_phys_addr = gpa, .memory_size = 0, .userspace_addr = 0});
}

CONTRACT_TEST(Slots, OverlappingSlotsAreRefused) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  EXPECT_EQ(refusal([&] { set_slot(*guest, 1, 0x3ff000, memory); }), EEXIST);
}

CONTRACT_TEST(Slots, UnalignedSlotsAreRefused) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  EXPECT_EQ(refusal([&] { set_slot(*guest, 1, high + 0x800, memory); }), EINVAL);
}

CONTRACT_TEST(Slots, MemoryThatNoProcessCanHaveIsRefused) {
  auto guest = test.guest();
  const auto refused = [&](uint64_t address, uint64_t size) {
    return refusal([&] {
      guest->vm().set_user_memory_region(
          {.slot = 1, .flags = 0, .guest_phys_addr = high, .memory_size = size, .userspace_addr = address});
    });
  };
  EXPECT_EQ(refused(~uint64_t{0xfff}, 0x2000), EINVAL) << "it wraps";
  EXPECT_EQ(refused(uint64_t{1} << 63, 0x2000), EINVAL) << "the kernel's";
  EXPECT_EQ(refused(0x10000, uint64_t{1} << 43), EINVAL) << "2^31 pages";
}

CONTRACT_TEST(Slots, AddressesThatNoGuestCanHaveAreRefused) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  constexpr uint64_t end = uint64_t{1} << 52;
  EXPECT_EQ(refusal([&] { set_slot(*guest, 1, end, memory); }), EINVAL);
  EXPECT_EQ(refusal([&] { set_slot(*guest, 1, end - 0x1000, memory); }), EINVAL) << "its second page";
  if (test.soft()) {  // a host's second-level paging may have fewer bits
    EXPECT_EQ(refusal([&] { set_slot(*guest, 1, end - 0x2000, memory); }), 0);
  }
}

CONTRACT_TEST(Slots, ASlotCannotChangeItsSize) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  set_slot(*guest, 1, high, memory);
  const auto larger = Mapping::anonymous(0x4000);
  EXPECT_EQ(refusal([&] { set_slot(*guest, 1, high, larger); }), EINVAL);
}

GUEST_CODE(touch_high, 64, "mov $0x10000000, %ebx; mov (%rbx), %rax; movq $0x55, 8(%rbx); out %al, $0xe0");
CONTRACT_TEST(Slots, ASecondSlotIsMemory) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  memory.data()[0] = 0x42;
  set_slot(*guest, 1, high, memory);
  EXPECT_EQ(guest->result(Mode::long64, touch_high).rax, 0x42u);
  EXPECT_EQ(memory.data()[8], 0x55);
}

CONTRACT_TEST(Slots, ARemovedSlotIsADeviceAgain) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  set_slot(*guest, 1, high, memory);
  guest->result(Mode::long64, touch_high);
  remove_slot(*guest, 1, high);
  guest->enter(Mode::long64);
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_MMIO);
}

CONTRACT_TEST(Slots, AMovedSlotAnswersAtItsNewPlace) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  memory.data()[0] = 0x42;
  set_slot(*guest, 1, high + 0x100000, memory);
  set_slot(*guest, 1, high, memory);
  EXPECT_EQ(guest->result(Mode::long64, touch_high).rax, 0x42u);
}

GUEST_CODE(reports, 64, "out %al, $0x91");
CONTRACT_TEST(Slots, AnExceptionOfTheVmmsIsDeliveredByTodaysTable) {
  auto guest = test.guest();
  const auto before = Mapping::anonymous(0x1000), now = Mapping::anonymous(0x1000);
  constexpr unsigned undefined = 6;
  guest->load(reports);
  guest->enter(Mode::long64);
  std::memcpy(before.data(), guest->memory(idt_gpa), before.size());
  guest->set_gate(undefined, code64, code_gpa);
  std::memcpy(now.data(), guest->memory(idt_gpa), now.size());
  kvm_sregs sregs = guest->vcpu().sregs();
  sregs.idt.base = high;
  guest->vcpu().set_sregs(sregs);
  set_slot(*guest, 1, high, before);
  kvm_vcpu_events events{};
  events.exception.injected = 1;
  events.exception.nr = undefined;
  guest->vcpu().set_vcpu_events(events);
  remove_slot(*guest, 1, high);
  set_slot(*guest, 1, high, now);
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x91));
}

// KVM_CAP_MULTI_ADDRESS_SPACE: the numbers' upper half.
void needs_second_space(Guest& guest) {
  if (guest.vm().check_extension(KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
    throw Unable("there is one address space only");
}

CONTRACT_TEST(Slots, ASlotOfTheOtherAddressSpaceIsNotSeen) {
  auto guest = test.guest();
  needs_second_space(*guest);
  const auto memory = Mapping::anonymous(0x2000);
  set_slot(*guest, 1 << 16 | 1, high, memory);
  guest->load(touch_high);
  guest->enter(Mode::long64);
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_MMIO);
}

CONTRACT_TEST(Slots, AddressSpacesHaveTheirOwnNumbersAndPlaces) {
  auto guest = test.guest();
  needs_second_space(*guest);
  const auto first = Mapping::anonymous(0x2000);
  const auto second = Mapping::anonymous(0x4000);
  first.data()[0] = 1;
  second.data()[0] = 2;
  set_slot(*guest, 1, high, first);
  set_slot(*guest, 1 << 16 | 1, high, second, KVM_MEM_LOG_DIRTY_PAGES);
  EXPECT_EQ(guest->result(Mode::long64, touch_high).rax, 1u);
  uint64_t bitmap = 1;
  guest->vm().get_dirty_log(1 << 16 | 1, {&bitmap, 1});
  EXPECT_EQ(bitmap, 0u);
  remove_slot(*guest, 1 << 16 | 1, high);
  EXPECT_EQ(guest->result(Mode::long64, touch_high).rax, 1u);
  EXPECT_EQ(refusal([&] { remove_slot(*guest, 1 << 16 | 1, high); }), EINVAL);
  EXPECT_EQ(refusal([&] { set_slot(*guest, 2 << 16 | 1, high, first); }), EINVAL);
}

// Calls the same code again and again and changes its constant between, where another slot shows it.
GUEST_CODE(write_alias, 64,
           "mov $0x10000000, %ebx; mov $0x20000000, %esi; xor %edx, %edx; xor %ecx, %ecx;"
           "1: call *%rbx; add %eax, %edx; test $31, %cl; jne 2f; incl 1(%rsi); 2: inc %ecx; cmp $256, %ecx; "
           "jb 1b; out %al, $0xe0");
CONTRACT_TEST(Slots, CodeWrittenThroughAnotherSlotOfTheSameMemoryIsNoticed) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  const uint8_t code[] = {0xb8, 0, 0, 0, 0, 0xc3};  // mov $0, %eax; ret
  std::memcpy(memory.data(), code, sizeof code);
  set_slot(*guest, 1, high, memory);
  set_slot(*guest, 2, 2 * high, memory);
  // Once with 0, then 31 more times with 1, 32 times with 2 ... 7, 31 times with 8.
  unsigned wanted = 0;
  for (unsigned i = 0; i < 256; ++i) wanted += (i + 31) / 32;
  EXPECT_EQ(guest->result(Mode::long64, write_alias).rdx, wanted);
}

CONTRACT_TEST(Slots, AReadOnlySlotIsReadDirectlyAndItsWritesExit) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  memory.data()[0] = 0x42;
  set_slot(*guest, 1, high, memory, KVM_MEM_READONLY);
  guest->load(touch_high);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  EXPECT_TRUE(exit.mmio().write);
  EXPECT_EQ(exit.mmio().gpa, high + 8);
  EXPECT_EQ(exit.mmio().data.size(), 8u);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 0x42u);
  EXPECT_EQ(memory.data()[8], 0);
}

GUEST_CODE(call_high, 64, "mov $0x10000000, %ebx; call *%rbx; out %al, $0xe0");
CONTRACT_TEST(Slots, CodeRunsFromAReadOnlySlot) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x2000);
  const uint8_t code[] = {0xb8, 0x07, 0, 0, 0, 0xc3};  // mov $7, %eax; ret
  std::memcpy(memory.data(), code, sizeof code);
  set_slot(*guest, 1, high, memory, KVM_MEM_READONLY);
  EXPECT_EQ(guest->result(Mode::long64, call_high).rax, 7u);
}

GUEST_CODE(poll_high, 64,
           "mov $0x10000000, %ebx; 1: mov (%rbx), %rax; cmp $42, %rax; jne 1b; out %al, $0xe0");
CONTRACT_TEST(Slots, ASlotAddedWhileTheVcpuRunsBecomesVisible) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x1000);
  memory.data()[0] = 42;
  guest->load(poll_high);
  guest->enter(Mode::long64);
  std::atomic<bool> polled{false};
  guest->together(
      [&] {
        for (;;) {
          const auto exit = guest->run();
          if (Guest::is_out(exit, done_port)) return;
          if (exit.reason() != KVM_EXIT_MMIO) throw std::runtime_error(guest->describe(exit));
          std::memset(exit.mmio().data.data(), 0, 8);
          polled = true;
        }
      },
      [&] {
        while (!polled) std::this_thread::yield();
        set_slot(*guest, 1, high, memory);
      });
}

CONTRACT_TEST(Slots, ASlotRemovedWhileTheVcpuRunsExits) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x1000);
  set_slot(*guest, 1, high, memory);
  guest->load(poll_high);
  guest->enter(Mode::long64);
  guest->together(
      [&] {
        const auto exit = guest->run();
        if (exit.reason() != KVM_EXIT_MMIO) throw std::runtime_error(guest->describe(exit));
      },
      [&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        remove_slot(*guest, 1, high);
      });
}

CONTRACT_TEST(Slots, MemoryExchangedUnderARunningVcpuShowsTheNewContents) {
  auto guest = test.guest();
  const auto before = Mapping::anonymous(0x1000), after = Mapping::anonymous(0x1000);
  after.data()[0] = 42;
  set_slot(*guest, 1, high, before);
  guest->load(poll_high);
  guest->enter(Mode::long64);
  guest->together(
      [&] {
        for (;;) {
          const auto exit = guest->run();
          if (Guest::is_out(exit, done_port)) return;
          if (exit.reason() != KVM_EXIT_MMIO) throw std::runtime_error(guest->describe(exit));
          std::memset(exit.mmio().data.data(), 0, 8);
        }
      },
      [&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        remove_slot(*guest, 1, high);
        set_slot(*guest, 1, high, after);
      });
}

GUEST_CODE(dirty_pages, 64,
           "mov $0x10000000, %ebx; movb $1, 0x3000(%rbx); mov 0x4000(%rbx), %al; movq $1, 0x46ffc(%rbx); "
           "lock incl (%rbx);"
           "out %al, $0xe0; movb $1, 0x3000(%rbx); out %al, $0xe0");
std::unique_ptr<Guest> dirtying(Contract& test, const Mapping& memory) {
  auto guest = test.guest();
  set_slot(*guest, 1, high, memory, KVM_MEM_LOG_DIRTY_PAGES);
  guest->load(dirty_pages);
  guest->enter(Mode::long64);
  return guest;
}

CONTRACT_TEST(Slots, TheDirtyLogNamesTheWrittenPages) {
  const auto memory = Mapping::anonymous(0x80000);
  auto guest = dirtying(test, memory);
  guest->finish();
  uint64_t log[2] = {};
  guest->vm().get_dirty_log(1, log);
  EXPECT_EQ(log[0], 0b1001u);
  EXPECT_EQ(log[1], 0b11000000u) << "a write across pages dirties both (0x46 and 0x47)";
}

CONTRACT_TEST(Slots, ReadingTheDirtyLogClearsItAndLaterWritesAreSeen) {
  const auto memory = Mapping::anonymous(0x80000);
  auto guest = dirtying(test, memory);
  guest->finish();
  uint64_t log[2] = {};
  guest->vm().get_dirty_log(1, log);
  guest->vm().get_dirty_log(1, log);
  EXPECT_EQ(log[0] | log[1], 0u);
  guest->finish();
  guest->vm().get_dirty_log(1, log);
  EXPECT_EQ(log[0], 0b1000u);
  EXPECT_EQ(log[1], 0u);
}

CONTRACT_TEST(Slots, WithManualProtectOnlyClearingClears) {
  test.needs_capability(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
  const auto memory = Mapping::anonymous(0x80000);
  auto guest = test.guest();
  kvm_enable_cap cap{};
  cap.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
  cap.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
  guest->vm().enable_cap(cap);
  set_slot(*guest, 1, high, memory, KVM_MEM_LOG_DIRTY_PAGES);
  guest->load(dirty_pages);
  guest->enter(Mode::long64);
  guest->finish();
  uint64_t log[2] = {};
  guest->vm().get_dirty_log(1, log);
  EXPECT_EQ(log[0], 0b1001u);
  guest->vm().get_dirty_log(1, log);
  EXPECT_EQ(log[0], 0b1001u) << "reading alone clears nothing";
  const uint64_t clear[1] = {0b1000};
  guest->vm().clear_dirty_log(1, 0, 64, clear);
  guest->vm().get_dirty_log(1, log);
  EXPECT_EQ(log[0], 0b0001u);
  guest->finish();
  guest->vm().get_dirty_log(1, log);
  EXPECT_EQ(log[0], 0b1001u);
}

CONTRACT_TEST(Slots, ASlotWithoutLoggingHasNoLog) {
  auto guest = test.guest();
  std::vector<uint64_t> log(16);
  EXPECT_EQ(refusal([&] { guest->vm().get_dirty_log(0, log); }), ENOENT);
}

GUEST_CODE(above_four, 64, "movabs $0x100000010, %rbx; movq $0x77, (%rbx); mov (%rbx), %rax; out %al, $0xe0");
CONTRACT_TEST(Slots, MemoryAboveFourGigabytesWorks) {
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x1000);
  set_slot(*guest, 1, 0x100000000, memory);
  guest->load(above_four);
  guest->enter(Mode::long64);
  guest->at<uint64_t>(pdpt_gpa + 32) = free_gpa | 7;
  guest->at<uint64_t>(free_gpa) = 0x100000000 | 0x87;
  guest->vm().note_write(pdpt_gpa, 0x1000);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 0x77u);
  EXPECT_EQ(memory.data()[0x10], 0x77);
}

}  // namespace
}  // namespace lodge::contract
