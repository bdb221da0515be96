// Runs what was loaded: the registers and tables of a BootState on a real vCPU of every accelerator that is
// there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <system_error>

#include "kvm/host/host.hpp"
#include "kvm/soft/soft.hpp"
#include "machine/boot/boot.hpp"
#include "machine/boot/test_kernels.hpp"
#include "machine/layout.hpp"

// The guests report 32-bit values through port 0x10. Each loads segment registers and walks the stack on its
// way: both fail when the descriptor table or the memory is not what it should be.
asm(R"(
  .pushsection .rodata
  .globl long_guest, long_guest_end, protected_guest, protected_guest_end
long_guest:
  .code64
  mov %esi, %eax
  out %eax, $0x10
  mov 0x202(%rsi), %eax
  out %eax, $0x10
  mov $0x18, %eax
  mov %eax, %ds
  mov %eax, %ss
  mov $0x180000, %esp
  push $0x77
  pop %rax
  out %eax, $0x10
  mov $1, %rax
  shl $32, %rax
  shr $32, %rax
  out %eax, $0x10
  hlt
long_guest_end:
  .code32
protected_guest:
  out %eax, $0x10
  mov %ebx, %eax
  out %eax, $0x10
  mov (%ebx), %eax
  out %eax, $0x10
  mov $0x18, %eax
  mov %eax, %ds
  mov %eax, %ss
  mov $0x180000, %esp
  pushl $0x77
  pop %eax
  out %eax, $0x10
  hlt
protected_guest_end:
  .code64
  .popsection
)");
extern "C" const uint8_t long_guest[], long_guest_end[], protected_guest[], protected_guest_end[];

namespace lodge::machine::boot {
namespace {

using namespace test_kernels;
constexpr uint64_t MiB = layout::MiB;

class EnterTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    try {
      system_ = GetParam() == std::string("kvm") ? kvm::host::open() : kvm::soft::open();
    } catch (const std::system_error& error) {
      GTEST_SKIP() << error.what();
    }
  }

  // Puts `code` at the begin of the kernel's segment.
  static Data with_code(Data kernel, std::span<const uint8_t> code) {
    std::copy(code.begin(), code.end(), kernel.begin() + 1024);
    return kernel;
  }

  // What the guest reported until it halted.
  std::vector<uint32_t> run(const Data& kernel, BootState& state) {
    GuestMemory memory(16 * MiB);
    const auto vm = system_->create_vm();
    if (vm->check_extension(KVM_CAP_SET_TSS_ADDR) > 0) vm->set_tss_addr(layout::tss_base);
    memory.attach(*vm, 0);
    std::vector<uint32_t> reports;
    {
      const auto vcpu = vm->create_vcpu(0);
      vcpu->set_cpuid2(system_->supported_cpuid());
      state = load_bytes(kernel, {.kernel = "k"}, memory);
      state.apply(*vcpu);
      for (int exits = 0; exits < 100; ++exits) {
        const kvm::Exit exit = vcpu->run();
        if (exit.reason() != KVM_EXIT_IO || exit.status() != 0) {
          EXPECT_EQ(exit.reason(), KVM_EXIT_HLT) << exit.describe();
          break;
        }
        uint32_t value = 0;
        std::memcpy(&value, exit.io().data.data(), std::min<size_t>(exit.io().data.size(), sizeof value));
        reports.push_back(value);
      }
    }
    memory.detach();
    return reports;
  }

  std::unique_ptr<kvm::System> system_;
};

TEST_P(EnterTest, LongModeRunsWithBootParameters) {
  BootState state;
  const Data kernel =
      with_code(elf64({.paddr = MiB, .vaddr = MiB, .entry = MiB}), {long_guest, long_guest_end});
  const auto reports = run(kernel, state);
  EXPECT_THAT(reports, testing::ElementsAre(static_cast<uint32_t>(state.regs.rsi), 0x53726448u, 0x77u, 1u));
}

TEST_P(EnterTest, PvhRunsWithStartInformation) {
  BootState state;
  const Data kernel = with_code(elf64({.paddr = MiB, .entry = MiB, .pvh_entry = MiB}),
                                {protected_guest, protected_guest_end});
  const auto reports = run(kernel, state);
  EXPECT_THAT(reports, testing::ElementsAre(0u, static_cast<uint32_t>(state.regs.rbx), 0x336ec578u, 0x77u));
}

TEST_P(EnterTest, MultibootRunsWithItsInformation) {
  BootState state;
  Data kernel = elf32({.paddr = MiB, .entry = MiB + 16, .multiboot_flags = 0});
  std::copy(protected_guest, protected_guest_end, kernel.begin() + 1024 + 16);
  const auto reports = run(kernel, state);
  EXPECT_THAT(reports,
              testing::ElementsAre(0x2badb002u, static_cast<uint32_t>(state.regs.rbx), 0x245u, 0x77u));
}

INSTANTIATE_TEST_SUITE_P(Accelerators, EnterTest, testing::Values("kvm", "soft"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace lodge::machine::boot
