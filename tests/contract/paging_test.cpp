// Paging of 64-bit mode: page sizes, protection, accessed and dirty bits, page-fault error codes and CR2
// (SDM volume 3, chapter 4).
#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Paging);

constexpr uint64_t present = 1, write = 2, user = 4, accessed = 0x20, dirty = 0x40, large = 0x80,
                   nx = 1ull << 63;
constexpr uint64_t page_table = free_gpa;  // maps 0x200000..0x3fffff by 4 KiB pages
constexpr uint64_t window = 0x200000;      // linear address of its first page
constexpr uint64_t target = 0x50000;       // where the tests map it
constexpr uint64_t pf_present = 1, pf_write = 2, pf_user = 4, pf_reserved = 8, pf_fetch = 16;

// A guest in 64-bit mode whose 2 MiB at `window` are 4 KiB pages: identity, save the first, which has
// `entry`.
std::unique_ptr<Guest> windowed(Contract& test, std::span<const uint8_t> code, uint64_t entry) {
  auto guest = test.guest();
  guest->load(code);
  guest->enter(Mode::long64);
  for (uint64_t i = 0; i < 512; ++i) guest->at<uint64_t>(page_table + i * 8) = (window + i * 0x1000) | 7;
  guest->at<uint64_t>(page_table) = entry;
  guest->at<uint64_t>(pd_gpa + 8) = page_table | 7;
  guest->vm().note_write(pd_gpa, 0x1000);
  guest->vm().note_write(page_table, 0x1000);
  return guest;
}

void expect_page_fault(Guest& guest, uint64_t error, uint64_t address) {
  const Trap trap = guest.trap();
  EXPECT_EQ(trap.vector, 14u);
  EXPECT_EQ(trap.error, error);
  EXPECT_EQ(guest.vcpu().sregs().cr2, address);
}

GUEST_CODE(read_window, 64, "mov 0x200010, %rax; out %al, $0xe0");
GUEST_CODE(write_window, 64, "mov $0x77, %eax; mov %rax, 0x200010; out %al, $0xe0");
GUEST_CODE(fetch_window, 64, "mov $0x200000, %rax; jmp *%rax");

CONTRACT_TEST(Paging, SmallPagesTranslate) {
  auto guest = windowed(test, read_window, target | present | write);
  guest->at<uint64_t>(target + 0x10) = 0x1122334455667788;
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 0x1122334455667788u);
}

CONTRACT_TEST(Paging, AReadSetsAccessedOnly) {
  auto guest = windowed(test, read_window, target | present | write);
  guest->finish();
  EXPECT_EQ(guest->at<uint64_t>(page_table) & (accessed | dirty), accessed);
  EXPECT_NE(guest->at<uint64_t>(pd_gpa + 8) & accessed, 0u);
  EXPECT_NE(guest->at<uint64_t>(pdpt_gpa) & accessed, 0u);
  EXPECT_NE(guest->at<uint64_t>(pml4_gpa) & accessed, 0u);
  EXPECT_EQ(guest->at<uint64_t>(page_table + 8) & accessed, 0u) << "the neighbour was not touched";
}

CONTRACT_TEST(Paging, AWriteSetsDirty) {
  auto guest = windowed(test, write_window, target | present | write);
  guest->finish();
  EXPECT_EQ(guest->at<uint64_t>(page_table) & (accessed | dirty), accessed | dirty);
  EXPECT_EQ(guest->at<uint64_t>(target + 0x10), 0x77u);
}

GUEST_CODE(read_then_write, 64,
           "mov 0x200010, %rax; mov 0x30000, %rbx; mov %rax, 0x200010; mov 0x30000, %rcx; out %al, $0xe0");
CONTRACT_TEST(Paging, TheFirstWriteAfterAReadSetsDirtyInMemory) {
  auto guest = windowed(test, read_then_write, target | present | write);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx & dirty, 0u);
  EXPECT_EQ(guest->vcpu().regs().rcx & dirty, dirty);
}

GUEST_CODE(large_page, 64, "movq $0x1234, 0x250000; out %al, $0xe0");
CONTRACT_TEST(Paging, TwoMegabytePagesTranslate) {
  auto guest = test.guest();
  guest->result(Mode::long64, large_page);
  EXPECT_EQ(guest->at<uint64_t>(0x250000), 0x1234u);
  EXPECT_EQ(guest->at<uint64_t>(pd_gpa + 8) & (accessed | dirty), accessed | dirty);
}

GUEST_CODE(huge_page, 64, "movabs $0x40250008, %rax; movq $0x5678, (%rax); out %al, $0xe0");
CONTRACT_TEST(Paging, OneGigabytePagesTranslate) {
  test.needs_cpuid(0x80000001, &kvm_cpuid_entry2::edx, 26, "1 GiB pages");
  auto guest = test.guest();
  guest->load(huge_page);
  guest->enter(Mode::long64);
  guest->at<uint64_t>(pdpt_gpa + 8) = present | write | large;  // the second GiB shows the first again
  guest->vm().note_write(pdpt_gpa, 0x1000);
  guest->finish();
  EXPECT_EQ(guest->at<uint64_t>(0x250008), 0x5678u);
  EXPECT_EQ(guest->at<uint64_t>(pdpt_gpa + 8) & (accessed | dirty), accessed | dirty);
}

CONTRACT_TEST(Paging, ReadingAnAbsentPageFaultsWithCodeZero) {
  auto guest = windowed(test, read_window, 0);
  expect_page_fault(*guest, 0, window + 0x10);
}

CONTRACT_TEST(Paging, WritingAnAbsentPageFaultsWithWrite) {
  auto guest = windowed(test, write_window, 0);
  expect_page_fault(*guest, pf_write, window + 0x10);
}

CONTRACT_TEST(Paging, TheFaultingInstructionIsTheSavedOne) {
  auto guest = windowed(test, write_window, 0);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.rip, code_gpa + 5);
  EXPECT_EQ(trap.cs, code64);
  EXPECT_EQ(trap.rsp, stack);
  EXPECT_NE(trap.rflags & 0x10000, 0u) << "faults push RF set";
}

CONTRACT_TEST(Paging, AWriteToAReadOnlyPageFaultsUnderWriteProtect) {
  auto guest = windowed(test, write_window, target | present);
  expect_page_fault(*guest, pf_present | pf_write, window + 0x10);
}

CONTRACT_TEST(Paging, TheKernelWritesReadOnlyPagesWithoutWriteProtect) {
  auto guest = windowed(test, write_window, target | present);
  auto sregs = guest->vcpu().sregs();
  sregs.cr0 &= ~0x10000ull;
  guest->vcpu().set_sregs(sregs);
  guest->finish();
  EXPECT_EQ(guest->at<uint64_t>(target + 0x10), 0x77u);
}

CONTRACT_TEST(Paging, FetchingFromANoExecutePageFaultsWithFetch) {
  auto guest = windowed(test, fetch_window, target | present | write | nx);
  expect_page_fault(*guest, pf_present | pf_fetch, window);
}

CONTRACT_TEST(Paging, NoExecuteInAnUpperLevelCounts) {
  auto guest = windowed(test, fetch_window, target | present | write);
  guest->at<uint64_t>(pd_gpa + 8) |= nx;
  expect_page_fault(*guest, pf_present | pf_fetch, window);
}

CONTRACT_TEST(Paging, NoExecuteIsReservedWhileEferLacksIt) {
  auto guest = windowed(test, read_window, target | present | write | nx);
  auto sregs = guest->vcpu().sregs();
  sregs.efer &= ~0x800ull;
  guest->vcpu().set_sregs(sregs);
  expect_page_fault(*guest, pf_present | pf_reserved, window + 0x10);
}

CONTRACT_TEST(Paging, AReservedBitFaultsWithReserved) {
  auto guest = windowed(test, read_window, target | present | write);
  guest->at<uint64_t>(pd_gpa + 8) = 0x200000 | present | write | large | 0x2000;  // bit 13 of a 2 MiB entry
  expect_page_fault(*guest, pf_present | pf_reserved, window + 0x10);
}

CONTRACT_TEST(Paging, AUserReadOfASupervisorPageFaultsWithUser) {
  auto guest = windowed(test, read_window, target | present | write);
  guest->to_user();
  expect_page_fault(*guest, pf_present | pf_user, window + 0x10);
}

CONTRACT_TEST(Paging, AUserWriteOfAnAbsentPageFaultsWithUserAndWrite) {
  auto guest = windowed(test, write_window, 0);
  guest->to_user();
  expect_page_fault(*guest, pf_write | pf_user, window + 0x10);
}

CONTRACT_TEST(Paging, AUserWriteOfAReadOnlyPageFaultsWithoutWriteProtectToo) {
  auto guest = windowed(test, write_window, target | present | user);
  auto sregs = guest->vcpu().sregs();
  sregs.cr0 &= ~0x10000ull;
  guest->vcpu().set_sregs(sregs);
  guest->to_user();
  expect_page_fault(*guest, pf_present | pf_write | pf_user, window + 0x10);
}

CONTRACT_TEST(Paging, SmepForbidsTheKernelToRunUserPages) {
  test.needs_cpuid(7, &kvm_cpuid_entry2::ebx, 7, "SMEP");
  auto guest = windowed(test, fetch_window, target | present | write | user);
  auto sregs = guest->vcpu().sregs();
  sregs.cr4 |= 1ull << 20;
  guest->vcpu().set_sregs(sregs);
  for (uint64_t i = 0; i < 2048; ++i) guest->at<uint64_t>(pd_gpa + i * 8) &= i == 1 ? ~0ull : ~user;
  expect_page_fault(*guest, pf_present | pf_fetch, window);
}

GUEST_CODE(smap_read, 64, "mov 0x200010, %rax; out %al, $0xe0");
GUEST_CODE(smap_stac, 64, "stac; mov 0x200010, %rax; clac; mov 0x200010, %rbx; out %al, $0xe0");

std::unique_ptr<Guest> smap_guest(Contract& test, std::span<const uint8_t> code) {
  test.needs_cpuid(7, &kvm_cpuid_entry2::ebx, 20, "SMAP");
  auto guest = windowed(test, code, target | present | write | user);
  auto sregs = guest->vcpu().sregs();
  sregs.cr4 |= 1ull << 21;
  guest->vcpu().set_sregs(sregs);
  for (uint64_t i = 0; i < 2048; ++i) guest->at<uint64_t>(pd_gpa + i * 8) &= i == 1 ? ~0ull : ~user;
  guest->at<uint64_t>(target + 0x10) = 0x99;
  return guest;
}

CONTRACT_TEST(Paging, SmapForbidsTheKernelToReadUserPages) {
  auto guest = smap_guest(test, smap_read);
  expect_page_fault(*guest, pf_present, window + 0x10);
}

CONTRACT_TEST(Paging, StacLiftsSmapAndClacRestoresIt) {
  auto guest = smap_guest(test, smap_stac);
  expect_page_fault(*guest, pf_present, window + 0x10);
  EXPECT_EQ(guest->vcpu().regs().rax, 0x99u) << "between STAC and CLAC the read was allowed";
}

GUEST_CODE(noncanonical, 64, "movabs $0x800000000000, %rax; mov (%rax), %rbx");
CONTRACT_TEST(Paging, ANonCanonicalAddressIsAGeneralProtectionFault) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, noncanonical);
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.error, 0u);
}

GUEST_CODE(noncanonical_stack, 64, "movabs $0x800000000000, %rbp; mov (%rbp), %rbx");
CONTRACT_TEST(Paging, ANonCanonicalStackAddressIsAStackFault) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, noncanonical_stack);
  EXPECT_EQ(trap.vector, 12u);
  EXPECT_EQ(trap.error, 0u);
}

GUEST_CODE(remap, 64,
           "mov 0x200010, %rax; movq $0x51003, 0x30000; invlpg 0x200000; mov 0x200010, %rbx;"
           "movq $0x52003, 0x30000; mov %cr3, %rdx; mov %rdx, %cr3; mov 0x200010, %rcx; out %al, $0xe0");
CONTRACT_TEST(Paging, InvlpgAndCr3LoadsShowChangedTables) {
  auto guest = windowed(test, remap, target | present | write);
  guest->at<uint64_t>(0x50010) = 1;
  guest->at<uint64_t>(0x51010) = 2;
  guest->at<uint64_t>(0x52010) = 3;
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rax, 1u);
  EXPECT_EQ(regs.rbx, 2u);
  EXPECT_EQ(regs.rcx, 3u);
}

GUEST_CODE(global_flush, 64,
           "mov %cr4, %rdx; or $0x80, %rdx; mov %rdx, %cr4; mov 0x200010, %rax; movq $0x51103, 0x30000;"
           "and $~0x80, %rdx; mov %rdx, %cr4; mov 0x200010, %rbx; out %al, $0xe0");
CONTRACT_TEST(Paging, ClearingPgeFlushesGlobalPages) {
  auto guest = windowed(test, global_flush, target | present | write | 0x100);
  guest->at<uint64_t>(0x50010) = 1;
  guest->at<uint64_t>(0x51010) = 2;
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 1u);
  EXPECT_EQ(guest->vcpu().regs().rbx, 2u);
}

GUEST_CODE(crossing, 64, "movabs $0x1122334455667788, %rax; mov %rax, 0x200ffc; out %al, $0xe0");
CONTRACT_TEST(Paging, AnAccessMayCrossIntoAPageElsewhere) {
  auto guest = windowed(test, crossing, target | present | write);
  guest->at<uint64_t>(page_table + 8) = 0x60000 | present | write;
  guest->finish();
  EXPECT_EQ(guest->at<uint32_t>(target + 0xffc), 0x55667788u);
  EXPECT_EQ(guest->at<uint32_t>(0x60000), 0x11223344u);
}

CONTRACT_TEST(Paging, ACrossingWriteThatFaultsWritesNothing) {
  auto guest = windowed(test, crossing, target | present | write);
  guest->at<uint64_t>(page_table + 8) = 0;
  expect_page_fault(*guest, pf_write, window + 0x1000);
  if (guest->at<uint32_t>(target + 0xffc) != 0)
    test.deviates("a faulting write across pages wrote its first half");
}

CONTRACT_TEST(Paging, AnInstructionMayCrossPages) {
  auto guest = windowed(test, fetch_window, target | present | write);
  guest->at<uint64_t>(page_table + 8) = 0x60000 | present | write;
  auto regs = guest->vcpu().regs();
  regs.rip = window + 0xffd;
  guest->vcpu().set_regs(regs);
  const uint8_t tail[] = {0xb8, 0x78, 0x56, 0x34, 0x12, 0xe6, 0xe0};  // mov $0x12345678, %eax; out
  guest->load(std::span(tail).first(3), target + 0xffd);
  guest->load(std::span(tail).subspan(3), 0x60000);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 0x12345678u);
}

CONTRACT_TEST(Paging, AnInstructionWhoseTailIsAbsentFaultsAtThatPage) {
  auto guest = windowed(test, fetch_window, target | present | write);
  guest->at<uint64_t>(page_table + 8) = 0;
  auto regs = guest->vcpu().regs();
  regs.rip = window + 0xffd;
  guest->vcpu().set_regs(regs);
  const uint8_t head[] = {0xb8, 0x78, 0x56};
  guest->load(head, target + 0xffd);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 14u);
  EXPECT_EQ(trap.rip, window + 0xffd);
  EXPECT_EQ(guest->vcpu().sregs().cr2, window + 0x1000);
}

GUEST_CODE(compare_exchange, 64, "mov $1, %eax; mov $2, %ecx; cmpxchg %rcx, 0x200010; out %al, $0xe0");
CONTRACT_TEST(Paging, CmpxchgIsAWriteEvenWhenItDoesNotStore) {
  auto guest = windowed(test, compare_exchange, target | present);
  expect_page_fault(*guest, pf_present | pf_write, window + 0x10);
}

GUEST_CODE(drop_pae, 64, "mov %cr4, %rax; and $~0x20, %rax; mov %rax, %cr4");
CONTRACT_TEST(Paging, PaeCannotBeDroppedInLongMode) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, drop_pae).vector, 13u);
}

GUEST_CODE(paging_without_protection, 16, "mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0");
CONTRACT_TEST(Paging, PagingNeedsProtection) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::real, paging_without_protection).vector, 13u);
}

GUEST_CODE(paged32_use, 32, "mov 0x400010, %eax; movl $0x99, 0x400014; movl $1, 0x800000; out %al, $0xe0");
CONTRACT_TEST(Paging, ThirtyTwoBitPagingTranslatesSmallAndLargePages) {
  test.needs(Mode::paged32);
  auto guest = test.guest();
  guest->load(paged32_use);
  guest->enter(Mode::paged32);
  guest->at<uint32_t>(pml4_gpa + 4) = static_cast<uint32_t>(page_table) | 3;
  guest->at<uint32_t>(page_table) = static_cast<uint32_t>(target) | 3;
  guest->at<uint32_t>(pml4_gpa + 8) = 0x83;  // 4 MiB page over address 0
  guest->at<uint32_t>(target + 0x10) = 0x1234;
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 0x1234u);
  EXPECT_EQ(guest->at<uint32_t>(target + 0x14), 0x99u);
  EXPECT_EQ(guest->at<uint32_t>(page_table) & (accessed | dirty), accessed | dirty);
  EXPECT_EQ(guest->at<uint32_t>(0), 1u);
}

GUEST_CODE(pae_use, 32, "mov 0x200010, %eax; mov $0x201000, %ecx; jmp *%ecx");
CONTRACT_TEST(Paging, PaePagingTranslatesAndForbidsExecution) {
  test.needs(Mode::pae32);
  auto guest = test.guest();
  guest->load(pae_use);
  guest->enter(Mode::pae32);
  guest->at<uint64_t>(pd_gpa + 8) = page_table | 3;
  guest->at<uint64_t>(page_table) = target | 3;
  guest->at<uint64_t>(page_table + 8) = target | 3 | nx;
  guest->at<uint32_t>(target + 0x10) = 0x1234;
  const Trap trap = guest->trap();
  EXPECT_EQ(guest->vcpu().regs().rax, 0x1234u);
  EXPECT_EQ(trap.vector, 14u);
  EXPECT_EQ(trap.error, pf_present | pf_fetch);
  EXPECT_EQ(guest->vcpu().sregs().cr2, 0x201000u);
}

CONTRACT_TEST(Paging, TranslateWalksTheGuestsTables) {
  auto guest = windowed(test, read_window, target | present | write);
  const auto good = guest->vcpu().translate(window + 0x123);
  EXPECT_TRUE(good.valid);
  EXPECT_EQ(good.physical_address, target + 0x123);
  guest->at<uint64_t>(page_table) = 0;
  guest->vm().note_write(page_table, 8);
  EXPECT_FALSE(guest->vcpu().translate(window).valid);
}

GUEST_CODE(pcid, 64,
           "mov %cr4, %rax; or $0x20000, %eax; mov %rax, %cr4; mov $0x20001, %eax; mov %rax, %cr3; mov "
           "0x200010, %rbx;"
           "movq $0x51003, 0x30000; mov %rax, %cr3; mov 0x200010, %rcx; mov %cr3, %rdx; out %al, $0xe0");
CONTRACT_TEST(Paging, ACr3LoadWithAProcessContextFlushesThatContext) {
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 17, "PCID");
  auto guest = windowed(test, pcid, target | present | write);
  guest->at<uint64_t>(0x50010) = 1;
  guest->at<uint64_t>(0x51010) = 2;
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx, 1u);
  EXPECT_EQ(regs.rcx, 2u);
  EXPECT_EQ(regs.rdx, 0x20001u);
}

GUEST_CODE(
    invpcid_all, 64,
    "mov 0x200010, %rbx; movq $0x51003, 0x30000; mov $2, %eax; invpcid 0x40000, %rax; mov 0x200010, %rcx;"
    "out %al, $0xe0");
CONTRACT_TEST(Paging, InvpcidDropsEverything) {
  test.needs_cpuid(7, &kvm_cpuid_entry2::ebx, 10, "INVPCID");
  auto guest = windowed(test, invpcid_all, target | present | write);
  guest->at<uint64_t>(0x50010) = 1;
  guest->at<uint64_t>(0x51010) = 2;
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 1u);
  EXPECT_EQ(guest->vcpu().regs().rcx, 2u);
}

}  // namespace
}  // namespace lodge::contract
