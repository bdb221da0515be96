#include "kvm/soft/irqchip/ioeventfd.hpp"

#include <gtest/gtest.h>

#include "base/fd.hpp"
#include "kvm/soft/irqchip/test_support.hpp"

namespace lodge::kvm::soft {
namespace {

class IoEventfd : public testing::Test {
 protected:
  static kvm_ioeventfd request(const Fd& fd, uint64_t address, uint32_t length, uint32_t flags = 0,
                               uint64_t value = 0) {
    kvm_ioeventfd request{};
    request.fd = fd.get();
    request.addr = address;
    request.len = length;
    request.flags = flags;
    request.datamatch = value;
    return request;
  }
  int set(const Fd& fd, uint64_t address, uint32_t length, uint32_t flags = 0, uint64_t value = 0) {
    return error_of([&] { events.set(request(fd, address, length, flags, value)); });
  }

  static constexpr uint32_t pio = KVM_IOEVENTFD_FLAG_PIO;
  static constexpr uint32_t match = KVM_IOEVENTFD_FLAG_DATAMATCH;
  static constexpr uint32_t off = KVM_IOEVENTFD_FLAG_DEASSIGN;
  IoEventfds events;
  Fd a = Fd::event();
  Fd b = Fd::event();
};

TEST_F(IoEventfd, SignalsAWriteOfItsAddressBusAndLength) {
  ASSERT_EQ(set(a, 0x1000, 2), 0);
  EXPECT_FALSE(events.signal(false, 0x1001, 2, 0));
  EXPECT_FALSE(events.signal(false, 0x1000, 4, 0));
  EXPECT_FALSE(events.signal(true, 0x1000, 2, 0));
  EXPECT_EQ(take_event(a.get()), 0u);
  EXPECT_TRUE(events.signal(false, 0x1000, 2, 0xffff));
  EXPECT_EQ(take_event(a.get()), 1u);
}

TEST_F(IoEventfd, LengthZeroTakesAnyLength) {
  ASSERT_EQ(set(a, 0x1000, 0, pio), 0);
  for (const unsigned size : {1u, 2u, 4u}) EXPECT_TRUE(events.signal(true, 0x1000, size, 7));
  EXPECT_EQ(take_event(a.get()), 3u);
}

TEST_F(IoEventfd, DatamatchTellsQueuesApartAndLooksAtTheWrittenBytesOnly) {
  ASSERT_EQ(set(a, 0x1000, 2, match, 0), 0);
  ASSERT_EQ(set(b, 0x1000, 2, match, 1), 0);
  EXPECT_TRUE(events.signal(false, 0x1000, 2, 0xdead0001));
  EXPECT_EQ(take_event(b.get()), 1u);
  EXPECT_EQ(take_event(a.get()), 0u);
  EXPECT_FALSE(events.signal(false, 0x1000, 2, 2));
}

TEST_F(IoEventfd, CollisionsAreRefused) {
  ASSERT_EQ(set(a, 0x1000, 2, match, 1), 0);
  EXPECT_EQ(set(b, 0x1000, 2, match, 1), EEXIST);
  EXPECT_EQ(set(b, 0x1000, 2), EEXIST);
  EXPECT_EQ(set(b, 0x1000, 0), EEXIST);
  EXPECT_EQ(set(b, 0x1000, 4), 0);
  EXPECT_EQ(set(b, 0x1000, 2, pio), 0);
  EXPECT_EQ(set(a, 0x2000, 0), 0);
  EXPECT_EQ(set(b, 0x2000, 4), EEXIST);
}

TEST_F(IoEventfd, DeassignmentNeedsTheSameDescription) {
  ASSERT_EQ(set(a, 0x1000, 2, match, 1), 0);
  EXPECT_EQ(set(b, 0x1000, 2, match | off, 1), ENOENT);
  EXPECT_EQ(set(a, 0x1000, 2, match | off, 2), ENOENT);
  EXPECT_EQ(set(a, 0x1000, 2, off), ENOENT);
  EXPECT_EQ(set(a, 0x1000, 4, match | off, 1), ENOENT);
  const Fd duplicate = Fd::duplicate(a.get());
  EXPECT_EQ(set(duplicate, 0x1000, 2, match | off, 1), 0);
  EXPECT_FALSE(events.signal(false, 0x1000, 2, 1));
}

TEST_F(IoEventfd, RefusesBadRequests) {
  EXPECT_EQ(set(a, 0x1000, 3), EINVAL);
  EXPECT_EQ(set(a, 0x1000, 16), EINVAL);
  EXPECT_EQ(set(a, UINT64_MAX, 2), EINVAL);
  EXPECT_EQ(set(a, 0x1000, 2, 1u << 3), EINVAL);  // CCW: another architecture's
  EXPECT_EQ(set(a, 0x1000, 0, match, 1), EINVAL);
  EXPECT_EQ(set(Fd(), 0x1000, 2), EBADF);
}

TEST_F(IoEventfd, KeepsWorkingWhenTheCallersDescriptorIsClosed) {
  const Fd mine = Fd::duplicate(a.get());
  ASSERT_EQ(set(a, 0x1000, 2), 0);
  a.reset();
  EXPECT_TRUE(events.signal(false, 0x1000, 2, 0));
  EXPECT_EQ(take_event(mine.get()), 1u);
}

}  // namespace
}  // namespace lodge::kvm::soft
