// The probe's snippets (kvm/host/probe.hpp) judged by an accelerator that is known to run kernels: what fails
// there would be a mistake in the snippet, and a host's good /dev/kvm would be refused for it.
#include "kvm/host/probe.hpp"

#include <fmt/format.h>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Probing);

CONTRACT_TEST(Probing, NothingFailsOnAnAcceleratorThatBootsKernels) {
  const kvm::host::Probe measured = kvm::host::probe(test.system());
  if (!test.soft() && !measured.can_boot_stock_kernel) throw Unable(measured.reasons.front());
  ASSERT_TRUE(measured.available) << measured.error;
  EXPECT_GT(measured.kernel_mips, 0);
  EXPECT_GT(measured.user_mips, 0);
  for (const kvm::host::Ability& ability : measured.abilities)
    EXPECT_NE(ability.result, kvm::host::Ability::Result::fails) << ability.name << ": " << ability.detail;
  fmt::print("{}: ring 0 {:.1f}, ring 3 {:.1f} million instructions a second\n", test.system().name(),
             measured.kernel_mips, measured.user_mips);
}

}  // namespace
}  // namespace lodge::contract
