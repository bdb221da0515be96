// What can be tested without a guest; guests run in tests/contract. Without a usable /dev/kvm these tests
// skip.
#include "kvm/host/host.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <thread>

#include "base/mapping.hpp"

namespace lodge::kvm::host {
namespace {

using ::testing::HasSubstr;

int open_error(const std::string& path, std::string* what = nullptr) {
  try {
    open(path);
  } catch (const std::system_error& error) {
    if (what != nullptr) *what = error.what();
    return error.code().value();
  }
  return 0;
}

TEST(Open, NamesTheRemedyWhenTheDeviceIsMissing) {
  std::string what;
  EXPECT_EQ(open_error("/nonexistent/kvm", &what), ENOENT);
  EXPECT_THAT(what, HasSubstr("/nonexistent/kvm"));
  EXPECT_THAT(what, HasSubstr("--accel soft"));
}

TEST(Open, RefusesADeviceThatIsNotKvm) {
  std::string what;
  EXPECT_EQ(open_error("/dev/null", &what), ENOTSUP);
  EXPECT_THAT(what, HasSubstr("not a KVM device"));
}

TEST(Open, ExplainsMissingPermission) {
  EXPECT_THAT(explain_open_error("/dev/kvm", EACCES), HasSubstr("join the group kvm"));
}

TEST(Open, ExplainsABusyProcessor) {
  EXPECT_THAT(explain_open_error("/dev/kvm", EBUSY), HasSubstr("another hypervisor"));
}

class Host : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      system_ = open();
      vm_ = system_->create_vm();
    } catch (const std::system_error& error) {
      GTEST_SKIP() << error.what();
    }
  }

  // RAM of `pages` pages at 0.
  void give_memory(size_t pages, uint32_t flags = 0) {
    memory_ = Mapping::anonymous(pages * 4096);
    vm_->set_user_memory_region({.slot = 0,
                                 .flags = flags,
                                 .guest_phys_addr = 0,
                                 .memory_size = memory_.size(),
                                 .userspace_addr = reinterpret_cast<uint64_t>(memory_.data())});
  }

  // A vCPU at the real-mode instruction bytes `code`.
  std::unique_ptr<kvm::Vcpu> make_vcpu(std::initializer_list<uint8_t> code) {
    give_memory(16);
    std::copy(code.begin(), code.end(), memory_.data() + 0x1000);
    auto vcpu = vm_->create_vcpu(0);
    auto sregs = vcpu->sregs();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu->set_sregs(sregs);
    kvm_regs regs{};
    regs.rip = 0x1000;
    regs.rflags = 2;
    vcpu->set_regs(regs);
    return vcpu;
  }

  Mapping memory_;  // outlives the VM that maps it
  std::unique_ptr<kvm::System> system_;
  std::unique_ptr<kvm::Vm> vm_;
};

TEST_F(Host, CallsItselfKvm) {
  EXPECT_EQ(system_->name(), "kvm");
}

TEST_F(Host, ListsTheCpuidLeavesOfTheProcessor) {
  const auto leaves = system_->supported_cpuid();
  EXPECT_TRUE(
      std::ranges::any_of(leaves, [](const auto& leaf) { return leaf.function == 0 && leaf.eax >= 1; }));
}

TEST_F(Host, ListsTheMsrsThatMakeUpAVcpu) {
  EXPECT_THAT(system_->msr_index_list(), ::testing::Contains(0x174u));  // IA32_SYSENTER_CS
}

TEST_F(Host, ReadsFeatureMsrs) {
  const auto indices = system_->msr_feature_index_list();
  if (indices.empty()) GTEST_SKIP() << "this kernel reports no feature MSRs";
  kvm_msr_entry entry{.index = indices.front()};
  EXPECT_EQ(system_->feature_msrs({&entry, 1}), 1u);
}

TEST_F(Host, ReportsARefusedCallWithItsErrno) {
  auto vcpu = vm_->create_vcpu(0);
  try {
    vm_->create_vcpu(0);
    FAIL() << "a second vCPU 0 was accepted";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), EEXIST);
    EXPECT_THAT(error.what(), HasSubstr("KVM_CREATE_VCPU"));
  }
}

TEST_F(Host, RefusesABitmapShorterThanItsSlot) {
  give_memory(65, KVM_MEM_LOG_DIRTY_PAGES);
  std::vector<uint64_t> one(1);
  EXPECT_THROW(vm_->get_dirty_log(0, one), std::system_error);
  std::vector<uint64_t> two(2);
  EXPECT_NO_THROW(vm_->get_dirty_log(0, two));
}

TEST_F(Host, StopsMsrTransferAtTheFirstRefusal) {
  auto vcpu = vm_->create_vcpu(0);
  kvm_msr_entry entries[] = {{.index = 0x174}, {.index = 0xdeadbeef}, {.index = 0x175}};
  EXPECT_EQ(vcpu->msrs(entries), 1u);
}

TEST_F(Host, TransfersMoreMsrsThanOneCallTakes) {
  auto vcpu = vm_->create_vcpu(0);
  std::vector<kvm_msr_entry> entries(300, kvm_msr_entry{.index = 0x174});
  EXPECT_EQ(vcpu->msrs(entries), 300u);
}

TEST_F(Host, RunsAGuestToItsHalt) {
  auto vcpu = make_vcpu({0xf4});  // hlt
  const Exit exit = vcpu->run();
  EXPECT_EQ(exit.status(), 0);
  EXPECT_EQ(exit.reason(), KVM_EXIT_HLT) << exit.describe();
}

TEST_F(Host, AKickBeforeRunStopsTheNextRunOnce) {
  auto vcpu = make_vcpu({0xf4});
  vcpu->kick();
  EXPECT_EQ(vcpu->run().status(), -EINTR);
  EXPECT_EQ(vcpu->run().reason(), KVM_EXIT_HLT);
}

TEST_F(Host, AKickReachesASpinningVcpuWhoseThreadBlocksSignals) {
  auto vcpu = make_vcpu({0xeb, 0xfe});  // jmp .
  int status = 0;
  std::thread thread([&] {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    status = vcpu->run().status();
  });
  ::usleep(20000);  // so that the guest most likely spins; a kick that comes first must work as well
  vcpu->kick();
  thread.join();
  EXPECT_EQ(status, -EINTR);
}

TEST_F(Host, TheVmmsOwnImmediateExitStays) {
  auto vcpu = make_vcpu({0xf4});
  vcpu->shared().immediate_exit = 1;
  EXPECT_EQ(vcpu->run().status(), -EINTR);
  EXPECT_EQ(vcpu->run().status(), -EINTR);
  vcpu->shared().immediate_exit = 0;
  EXPECT_EQ(vcpu->run().reason(), KVM_EXIT_HLT);
}

TEST_F(Host, ConcurrentKicksNeitherGetLostNorStick) {
  auto vcpu = make_vcpu({0xeb, 0xfe});
  std::atomic<unsigned> returns{0};
  std::thread thread([&] {
    while (returns < 1000) {
      if (vcpu->run().status() == -EINTR) ++returns;
    }
  });
  // One more kick only after the last was seen: a lost one would hang here (and in the test's time limit).
  for (unsigned i = 0; i < 1000; ++i) {
    vcpu->kick();
    while (returns <= i) std::this_thread::yield();
  }
  thread.join();
  EXPECT_GE(returns, 1000u);
}

}  // namespace
}  // namespace lodge::kvm::host
