// Coalesced I/O: writes to registered zones wait in the ring and cost no exit.
#include <cstring>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Coalesced);

constexpr uint64_t zone_gpa = 0xd0000100;
constexpr uint16_t zone_port = 0x80;
constexpr uint32_t capacity = (4096 - 8) / sizeof(kvm_coalesced_mmio);

// The ring as the VMM sees it.
class Ring {
 public:
  Ring(kvm::System& system, Guest& guest)
      : page_(reinterpret_cast<uint8_t*>(&guest.vcpu().shared()) +
              4096 * static_cast<size_t>(system.check_extension(KVM_CAP_COALESCED_MMIO))) {}
  uint32_t& first() { return reinterpret_cast<uint32_t*>(page_)[0]; }
  uint32_t& last() { return reinterpret_cast<uint32_t*>(page_)[1]; }
  kvm_coalesced_mmio& entry(uint32_t index) {
    return reinterpret_cast<kvm_coalesced_mmio*>(page_ + 8)[index];
  }
  uint32_t count() { return (last() + capacity - first()) % capacity; }
  uint64_t value(uint32_t index) {
    uint64_t value = 0;
    std::memcpy(&value, entry(index).data, entry(index).len);
    return value;
  }

 private:
  uint8_t* page_;
};

std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code) {
  test.needs_capability(KVM_CAP_COALESCED_MMIO, "coalesced I/O");
  test.needs_capability(KVM_CAP_COALESCED_PIO, "coalesced I/O");
  auto guest = test.guest();
  guest->load(code);
  guest->enter(Mode::long64);
  return guest;
}

kvm_coalesced_mmio_zone zone(uint64_t address, uint32_t size, bool pio = false) {
  kvm_coalesced_mmio_zone zone{};
  zone.addr = address;
  zone.size = size;
  zone.pio = pio ? 1 : 0;
  return zone;
}

GUEST_CODE(
    coalesced_writes, 64,
    "mov $0xd0000100, %ebx; movl $0x11223344, (%rbx); movb $0x55, 4(%rbx); mov $0x1234, %eax; out %ax, $0x80;"
    "mov 4(%rbx), %al; out %al, $0xe0");
CONTRACT_TEST(Coalesced, WritesWaitInTheRingInOrder) {
  auto guest = started(test, coalesced_writes);
  guest->vm().register_coalesced(zone(zone_gpa, 8));
  guest->vm().register_coalesced(zone(zone_port, 2, true));
  Ring ring(test.system(), *guest);
  const auto exit = guest->run();  // a read is never coalesced
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  EXPECT_FALSE(exit.mmio().write);
  ASSERT_EQ(ring.count(), 3u);
  EXPECT_EQ(ring.entry(0).phys_addr, zone_gpa);
  EXPECT_EQ(ring.entry(0).len, 4u);
  EXPECT_EQ(ring.entry(0).pio, 0u);
  EXPECT_EQ(ring.value(0), 0x11223344u);
  EXPECT_EQ(ring.entry(1).phys_addr, zone_gpa + 4);
  EXPECT_EQ(ring.value(1), 0x55u);
  EXPECT_EQ(ring.entry(2).phys_addr, zone_port);
  EXPECT_EQ(ring.entry(2).pio, 1u);
  EXPECT_EQ(ring.entry(2).len, 2u);
  EXPECT_EQ(ring.value(2), 0x1234u);
  guest->finish();
  EXPECT_EQ(ring.count(), 3u);
}

GUEST_CODE(coalesced_edges, 64,
           "mov $0xd0000100, %ebx; movl $1, 5(%rbx); movl $2, -1(%rbx); movl $3, 4(%rbx); out %al, $0xe0");
CONTRACT_TEST(Coalesced, AWriteThatReachesBeyondTheZoneExits) {
  auto guest = started(test, coalesced_edges);
  guest->vm().register_coalesced(zone(zone_gpa, 8));
  Ring ring(test.system(), *guest);
  for (const uint64_t address : {zone_gpa + 5, zone_gpa - 1}) {
    const auto exit = guest->run();
    ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
    EXPECT_EQ(exit.mmio().gpa, address);
  }
  guest->finish();
  ASSERT_EQ(ring.count(), 1u);
  EXPECT_EQ(ring.value(0), 3u);
}

GUEST_CODE(coalesced_many, 64,
           "mov $0xd0000100, %ebx; xor %ecx, %ecx; 1: mov %rcx, (%rbx); inc %ecx; cmp $400, %ecx; jb 1b;"
           "out %al, $0xe0");
CONTRACT_TEST(Coalesced, AFullRingIsLeftToTheVmmAndNothingIsLost) {
  auto guest = started(test, coalesced_many);
  guest->vm().register_coalesced(zone(zone_gpa, 8));
  Ring ring(test.system(), *guest);
  ring.first() = ring.last() = capacity - 3;  // it wraps
  uint64_t next = 0;
  const auto drain = [&] {
    for (; ring.first() != ring.last(); ring.first() = (ring.first() + 1) % capacity)
      ASSERT_EQ(ring.value(ring.first()), next++);
  };
  for (unsigned exits = 0;; ++exits) {
    const auto exit = guest->run();
    if (next == 0) {
      EXPECT_EQ(ring.count(), capacity - 1);
    }
    drain();
    if (Guest::is_out(exit, done_port)) {
      EXPECT_EQ(exits, 2u);
      break;
    }
    ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
    uint64_t value = 0;
    std::memcpy(&value, exit.mmio().data.data(), 8);
    ASSERT_EQ(value, next++);
  }
  EXPECT_EQ(next, 400u);
}

GUEST_CODE(coalesced_string, 64,
           "mov $0xd0000100, %edi; mov $0x40000, %esi; mov $5, %ecx; cld; rep movsw; out %al, $0xe0");
CONTRACT_TEST(Coalesced, EachItemOfAStringIsOneWrite) {
  auto guest = started(test, coalesced_string);
  for (uint16_t i = 0; i < 5; ++i) guest->at<uint16_t>(0x40000 + 2 * i) = static_cast<uint16_t>(100 + i);
  guest->vm().register_coalesced(zone(zone_gpa, 16));
  Ring ring(test.system(), *guest);
  guest->finish();
  ASSERT_EQ(ring.count(), 5u);
  for (uint32_t i = 0; i < 5; ++i) EXPECT_EQ(ring.value(i), 100u + i);
}

// The upper half leaves the guest: the lower is in the ring once, though the instruction runs twice.
GUEST_CODE(
    coalesced_split, 64,
    "mov $0xd0000100, %ebx; movabs $0x1122334455667788, %rax; movq %rax, %xmm0; punpcklqdq %xmm0, %xmm0;"
    "movdqu %xmm0, (%rbx); out %al, $0xe0");
CONTRACT_TEST(Coalesced, AWriteThatIsHalfInAZoneHappensOnce) {
  auto guest = started(test, coalesced_split);
  auto sregs = guest->vcpu().sregs();
  sregs.cr4 |= 0x600;  // OSFXSR, OSXMMEXCPT
  sregs.cr0 &= ~uint64_t{0xc};
  guest->vcpu().set_sregs(sregs);
  guest->vm().register_coalesced(zone(zone_gpa, 8));
  Ring ring(test.system(), *guest);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  EXPECT_EQ(exit.mmio().gpa, zone_gpa + 8);
  guest->finish();
  ASSERT_EQ(ring.count(), 1u);
  EXPECT_EQ(ring.value(0), 0x1122334455667788u);
}

GUEST_CODE(coalesced_two, 64,
           "mov $0xd0000100, %ebx; movl $1, (%rbx); out %al, $0xe1; movl $2, (%rbx); out %al, $0xe0");
CONTRACT_TEST(Coalesced, AZoneThatIsGoneExitsAgain) {
  auto guest = started(test, coalesced_two);
  guest->vm().register_coalesced(zone(zone_gpa, 8));
  Ring ring(test.system(), *guest);
  ASSERT_TRUE(Guest::is_out(guest->run(), 0xe1));
  EXPECT_EQ(ring.count(), 1u);
  guest->vm().unregister_coalesced(zone(zone_gpa, 8));
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_MMIO);
  guest->finish();
  EXPECT_EQ(ring.count(), 1u);
}

GUEST_CODE(coalesced_one, 64, "mov $0xd0000100, %ebx; movl $7, (%rbx); out %al, $0xe0");
CONTRACT_TEST(Coalesced, TheRingIsOneForAllVcpusAndMayHoldAnything) {
  started(test, coalesced_one);
  auto guest = test.guest({.vcpus = 2});
  guest->load(coalesced_one);
  guest->vm().register_coalesced(zone(zone_gpa, 8));
  Ring ring(test.system(), *guest);
  guest->enter(Mode::long64, 0);
  guest->enter(Mode::long64, 1);
  guest->finish(1);
  EXPECT_EQ(ring.count(), 1u);
  EXPECT_EQ(ring.value(0), 7u);
  ring.last() = 0xffffffff;  // no place in the ring: the write is the VMM's
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_MMIO);
}

CONTRACT_TEST(Coalesced, AZoneOfNeitherMemoryNorPortsIsRefused) {
  auto guest = started(test, coalesced_one);
  auto bad = zone(zone_gpa, 8);
  bad.pio = 2;
  EXPECT_THROW(guest->vm().register_coalesced(bad), std::system_error);
}

}  // namespace
}  // namespace lodge::contract
