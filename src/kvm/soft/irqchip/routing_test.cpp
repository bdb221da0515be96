#include "kvm/soft/irqchip/routing.hpp"

#include <gtest/gtest.h>

#include "kvm/soft/irqchip/test_support.hpp"

namespace lodge::kvm::soft {
namespace {

using Entries = std::vector<kvm_irq_routing_entry>;

int build(const Entries& entries, bool chips = true, bool extended = false) {
  return error_of([&] { GsiRouting(entries, chips, extended); });
}

TEST(GsiRouting, StandardTableIsKvms) {
  const GsiRouting table = GsiRouting::standard();
  for (uint32_t gsi = 0; gsi < 24; ++gsi) {
    EXPECT_EQ(table.routes(gsi).size(), gsi < 16 ? 2u : 1u) << gsi;
    EXPECT_EQ(table.gsi_of_ioapic(gsi), static_cast<int>(gsi));
  }
  EXPECT_EQ(table.gsi_of_pic(12), 12);
  EXPECT_EQ(table.routes(12)[0].pin, 12);
  EXPECT_TRUE(table.routes(24).empty());
}

TEST(GsiRouting, AGsiReachesOneInputOfEachChip) {
  EXPECT_EQ(build({chip_route(0, KVM_IRQCHIP_PIC_MASTER, 0), chip_route(0, KVM_IRQCHIP_IOAPIC, 2)}), 0);
  EXPECT_EQ(build({chip_route(0, KVM_IRQCHIP_IOAPIC, 1), chip_route(0, KVM_IRQCHIP_IOAPIC, 2)}), EINVAL);
  EXPECT_EQ(build({chip_route(0, KVM_IRQCHIP_PIC_MASTER, 1), chip_route(0, KVM_IRQCHIP_PIC_MASTER, 2)}),
            EINVAL);
}

TEST(GsiRouting, AnMsiSharesItsGsiWithNothing) {
  EXPECT_EQ(build({msi_route(5, 0x31), msi_route(5, 0x32)}), EINVAL);
  EXPECT_EQ(build({msi_route(5, 0x31), chip_route(5, KVM_IRQCHIP_IOAPIC, 5)}), EINVAL);
  EXPECT_EQ(build({chip_route(5, KVM_IRQCHIP_IOAPIC, 5), msi_route(5, 0x31)}), EINVAL);
}

TEST(GsiRouting, RefusesWhatDoesNotExist) {
  EXPECT_EQ(build({chip_route(4096, KVM_IRQCHIP_IOAPIC, 0)}), EINVAL);
  EXPECT_EQ(build({chip_route(0, KVM_IRQCHIP_IOAPIC, 24)}), EINVAL);
  EXPECT_EQ(build({chip_route(0, KVM_IRQCHIP_PIC_SLAVE, 8)}), EINVAL);
  EXPECT_EQ(build({chip_route(0, 3, 0)}), EINVAL);
  kvm_irq_routing_entry entry = chip_route(0, KVM_IRQCHIP_IOAPIC, 0);
  entry.flags = 1;
  EXPECT_EQ(build({entry}), EINVAL);
  entry = msi_route(0, 0x31);
  entry.flags = 2;
  EXPECT_EQ(build({entry}), EINVAL);
  entry.flags = KVM_MSI_VALID_DEVID;
  EXPECT_EQ(build({entry}), 0);
  entry.type = KVM_IRQ_ROUTING_HV_SINT;
  EXPECT_EQ(build({entry}), EINVAL);
  EXPECT_EQ(build(Entries(4097, msi_route(1, 0x31))), EINVAL);
}

TEST(GsiRouting, ChipsExistOnlyInTheFullIrqchip) {
  EXPECT_EQ(build({chip_route(0, KVM_IRQCHIP_IOAPIC, 0)}, false), EINVAL);
  EXPECT_EQ(build({msi_route(0, 0x31)}, false), 0);
}

TEST(GsiRouting, UpperAddressesAreCheckedWhenTheyCount) {
  EXPECT_EQ(build({msi_route(0, 0x31, 0xfee00000, 0x1ff)}, true, false), 0);
  EXPECT_EQ(build({msi_route(0, 0x31, 0xfee00000, 0x1ff)}, true, true), EINVAL);
  EXPECT_EQ(build({msi_route(0, 0x31, 0xfee00000, 0x100)}, true, true), 0);
}

}  // namespace
}  // namespace lodge::kvm::soft
