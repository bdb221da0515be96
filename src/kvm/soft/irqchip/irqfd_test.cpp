#include "kvm/soft/irqchip/irqfd.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <vector>

#include "kvm/soft/irqchip/irqchip.hpp"
#include "kvm/soft/irqchip/test_support.hpp"

namespace lodge::kvm::soft {
namespace {

class Irqfd : public testing::Test {
 protected:
  Irqfd() {
    chip.create_full();
    lapic = &chip.add_vcpu(0, port);
    lapic->mmio_write(0xf0, 0x1ff);
    ioapic_entry(10, 0x8051);
    std::vector<kvm_irq_routing_entry> routes{chip_route(10, KVM_IRQCHIP_IOAPIC, 10), msi_route(24, 0x61),
                                              msi_route(25, 0x62)};
    chip.set_gsi_routing(routes);
    while (take_event(port.event()) != 0) {
    }
  }
  void ioapic_entry(unsigned pin, uint32_t low) {
    const uint32_t select = 0x10 + pin * 2;
    chip.mmio_write(0xfec00000, &select, 4);
    chip.mmio_write(0xfec00010, &low, 4);
  }
  int set(const Fd& fd, uint32_t gsi, uint32_t flags = 0, const Fd* resample_fd = nullptr) {
    kvm_irqfd request{};
    request.fd = static_cast<uint32_t>(fd.get());
    request.gsi = gsi;
    request.flags = flags;
    if (resample_fd != nullptr) request.resamplefd = static_cast<uint32_t>(resample_fd->get());
    return error_of([&] { chip.irqfd(request); });
  }
  static bool readable(const Fd& fd) {
    pollfd poll{fd.get(), POLLIN, 0};
    return ::poll(&poll, 1, 0) == 1;
  }

  static constexpr uint32_t off = KVM_IRQFD_FLAG_DEASSIGN;
  static constexpr uint32_t resampling = KVM_IRQFD_FLAG_RESAMPLE;
  FakeClock clock;
  FakePort port{clock};
  Irqchip chip{clock};
  Lapic* lapic = nullptr;
  Fd event = Fd::event();
  Fd resample = Fd::event();
};

TEST_F(Irqfd, ASignalBecomesAnInterrupt) {
  ASSERT_EQ(set(event, 24), 0);
  signal_event(event.get());
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x61);
}

TEST_F(Irqfd, ASignalFromBeforeTheAssignmentCounts) {
  signal_event(event.get());
  ASSERT_EQ(set(event, 24), 0);
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x61);
}

TEST_F(Irqfd, AnEventfdServesOneGsiAtATime) {
  ASSERT_EQ(set(event, 24), 0);
  const Fd duplicate = Fd::duplicate(event.get());
  EXPECT_EQ(set(duplicate, 25), EBUSY);
  EXPECT_EQ(set(event, 25, off), 0);  // another GSI: nothing happens
  EXPECT_EQ(set(duplicate, 24, off), 0);
  EXPECT_EQ(set(event, 25), 0);
  signal_event(event.get());
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x62);
}

TEST_F(Irqfd, ADeassignedEventfdIsSilent) {
  Fd second = Fd::event();
  ASSERT_EQ(set(event, 24), 0);
  ASSERT_EQ(set(second, 25), 0);
  ASSERT_EQ(set(event, 24, off), 0);
  signal_event(event.get());
  signal_event(second.get());
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x62);
  EXPECT_EQ(lapic->acknowledge(), -1);
  EXPECT_TRUE(readable(event));  // nobody took it
}

TEST_F(Irqfd, RefusesBadRequests) {
  EXPECT_EQ(set(Fd(), 24), EBADF);
  EXPECT_EQ(set(Fd(::open("/dev/null", O_RDWR | O_CLOEXEC)), 24), EINVAL);
  EXPECT_EQ(set(event, 24, 4), EINVAL);
  EXPECT_EQ(set(event, 5000), EINVAL);
  const Fd none;
  EXPECT_EQ(set(event, 10, resampling, &none), EBADF);
  Irqchip empty(clock);
  kvm_irqfd request{};
  request.fd = static_cast<uint32_t>(event.get());
  EXPECT_EQ(error_of([&] { empty.irqfd(request); }), EINVAL);
  empty.create_split(24);
  request.flags = resampling;
  EXPECT_EQ(error_of([&] { empty.irqfd(request); }), EINVAL);
}

TEST_F(Irqfd, AResamplingIrqfdHoldsTheLineUntilTheEoiAndTellsItsOwner) {
  ASSERT_EQ(set(event, 10, resampling, &resample), 0);
  signal_event(event.get());
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x51);
  EXPECT_FALSE(readable(resample));
  lapic->mmio_write(0xb0, 0);
  EXPECT_TRUE(readable(resample));
  EXPECT_EQ(lapic->acknowledge(), -1);  // the line fell
  take_event(port.event());
  signal_event(event.get());  // the device wants more
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x51);
}

TEST_F(Irqfd, ResamplingIrqfdsShareALineWithOthers) {
  Fd event2 = Fd::event(), resample2 = Fd::event();
  ASSERT_EQ(set(event, 10, resampling, &resample), 0);
  ASSERT_EQ(set(event2, 10, resampling, &resample2), 0);
  chip.irq_line(10, true);
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x51);
  lapic->mmio_write(0xb0, 0);
  EXPECT_TRUE(readable(resample));
  EXPECT_TRUE(readable(resample2));
  EXPECT_EQ(lapic->acknowledge(), 0x51);  // KVM_IRQ_LINE still holds it
  chip.irq_line(10, false);
  lapic->mmio_write(0xb0, 0);
  EXPECT_EQ(lapic->acknowledge(), -1);
}

TEST_F(Irqfd, DeassigningTheLastResamplingIrqfdLowersTheLine) {
  ASSERT_EQ(set(event, 10, resampling, &resample), 0);
  signal_event(event.get());
  ASSERT_TRUE(port.wait());
  EXPECT_EQ(lapic->acknowledge(), 0x51);
  ASSERT_EQ(set(event, 10, off), 0);
  lapic->mmio_write(0xb0, 0);
  EXPECT_EQ(lapic->acknowledge(), -1);
}

}  // namespace
}  // namespace lodge::kvm::soft
