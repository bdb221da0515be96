// One code cache for several vCPUs: what they share, and what happens to the others when code goes.
#include "kvm/soft/translate/code_cache.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <map>
#include <thread>

#include "base/mapping.hpp"
#include "kvm/soft/soft.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t ram_size = 1 << 20, code_at = 0x8000, pages = 64;

// 32-bit guests with flat segments and no paging, which run the same code.
class Guests {
 public:
  Guests(const Options& options, unsigned count) : system_(open(options)), vm_(system_->create_vm()) {
    kvm_userspace_memory_region region{};
    region.memory_size = ram_size;
    region.userspace_addr = reinterpret_cast<uint64_t>(ram_.data());
    vm_->set_user_memory_region(region);
    for (unsigned id = 0; id < count; ++id) {
      vcpus_.push_back(vm_->create_vcpu(id));
      Vcpu& vcpu = *vcpus_.back();
      vcpu.set_cpuid2(system_->supported_cpuid());
      kvm_sregs sregs = vcpu.sregs();
      kvm_segment segment{};
      segment.limit = 0xffffffff;
      segment.present = 1, segment.s = 1, segment.g = 1, segment.db = 1;
      segment.type = 3, segment.selector = 0x10;
      sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment;
      segment.type = 11, segment.selector = 0x8;
      sregs.cs = segment;
      sregs.cr0 = 0x11;  // PE, ET
      vcpu.set_sregs(sregs);
    }
  }

  // A function in page `n`: xor eax,eax; 1: add $n,%eax; dec %ecx; jnz 1b; out %al,$0x80.
  void place(uint64_t n, uint8_t addend) {
    uint8_t* at = ram_.data() + code_at + n * 4096;
    const uint8_t loop[] = {0x31, 0xc0, 0x83, 0xc0, addend, 0x49, 0x75, 0xfa};
    std::memcpy(at, loop, sizeof loop);
    const uint8_t out[] = {0xe6, 0x80};
    std::memcpy(at + sizeof loop, out, sizeof out);
    make_stale(n);
  }
  void make_stale(uint64_t n) { vm_->note_write(code_at + n * 4096, 16); }
  uint64_t run(unsigned id, uint64_t page, uint64_t count) {
    const Exit exit = leave(id, page, count);
    EXPECT_TRUE(exit.status() == 0 && exit.reason() == KVM_EXIT_IO) << exit.describe();
    return rax(id);
  }
  // Runs the function until it leaves, and not for a signal.
  Exit leave(unsigned id, uint64_t page, uint64_t count) {
    Vcpu& vcpu = *vcpus_[id];
    kvm_regs regs{};
    regs.rip = code_at + page * 4096, regs.rcx = count, regs.rflags = 2;
    vcpu.set_regs(regs);
    for (;;)
      if (const Exit exit = vcpu.run(); !exit.interrupted()) return exit;
  }
  uint64_t rax(unsigned id) { return vcpus_[id]->regs().rax; }
  void limit_code(unsigned id, uint32_t limit) {
    kvm_sregs sregs = vcpus_[id]->sregs();
    sregs.cs.limit = limit, sregs.cs.g = 0;
    vcpus_[id]->set_sregs(sregs);
  }
  std::map<std::string, uint64_t> counted(unsigned id) {
    std::map<std::string, uint64_t> all;
    for (const Statistic& s : vcpus_[id]->statistics()) all[s.group + "." + s.name] += s.value;
    return all;
  }

 private:
  std::unique_ptr<System> system_;
  Mapping ram_ = Mapping::anonymous(ram_size);
  std::unique_ptr<Vm> vm_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
};

TEST(CodeCache, OneVcpuRunsWhatAnotherHasTranslated) {
  Guests guests({.count = true}, 2);
  guests.place(0, 3);
  EXPECT_EQ(guests.run(0, 0, 1000), 3000u);
  EXPECT_GT(guests.counted(0)["blocks.translated"], 0u);
  EXPECT_EQ(guests.run(1, 0, 1000), 3000u);
  EXPECT_EQ(guests.counted(1)["blocks.translated"], 0u);
  EXPECT_GT(guests.counted(1)["instructions.translated"], 2900u);
  // Told once.
  EXPECT_GT(guests.counted(0)["code_cache.used_bytes"], 0u);
  EXPECT_EQ(guests.counted(1)["code_cache.used_bytes"], 0u);
}

TEST(CodeCache, OneVcpuDoesNotDecodeWhatAnotherHasTranslated) {
  Guests guests({.count = true}, 2);
  guests.place(0, 3);
  for (int round = 0; round < 100; ++round) EXPECT_EQ(guests.run(0, 0, 100), 300u);
  ASSERT_GT(guests.counted(0)["blocks.decoded"], 1u);
  EXPECT_EQ(guests.run(1, 0, 100), 300u);
  // What leaves for the VMM is not translated, so it is decoded here, too.
  EXPECT_EQ(guests.counted(1)["blocks.decoded"], 1u);
  guests.place(0, 5);
  EXPECT_EQ(guests.run(1, 0, 100), 500u);
  EXPECT_GT(guests.counted(1)["blocks.decoded"], 1u);
}

// The loop of place() ends 7 bytes behind its beginning.
TEST(CodeCache, WhatAnotherHasTranslatedIsNotRunBeyondTheOwnLimit) {
  for (const uint32_t limit : {7u, 6u}) {
    Guests guests({}, 2);
    guests.place(0, 3);
    for (int round = 0; round < 100; ++round) EXPECT_EQ(guests.run(0, 0, 100), 300u);
    guests.limit_code(1, static_cast<uint32_t>(code_at + limit));
    const Exit exit = guests.leave(1, 0, 100);
    EXPECT_EQ(exit.reason(), KVM_EXIT_SHUTDOWN) << exit.describe();
    EXPECT_EQ(guests.rax(1), limit == 7 ? 300u : 3u);
  }
}

TEST(CodeCache, CodeThatWasReplacedRunsOnNoVcpu) {
  Guests guests({}, 2);
  for (uint8_t addend = 1; addend < 100; ++addend) {
    guests.place(0, addend);
    EXPECT_EQ(guests.run(addend & 1, 0, 1000), 1000u * addend);
    EXPECT_EQ(guests.run(~addend & 1, 0, 1000), 1000u * addend);
  }
}

// The smallest cache is used up again and again by two vCPUs, each of which makes code stale that both run.
TEST(CodeCache, IsSharedWhileItIsUsedUp) {
  Guests guests({.translate_after = 2, .code_cache = size_t{512} << 10}, 2);
  for (uint64_t n = 0; n < pages; ++n) guests.place(n, static_cast<uint8_t>(n + 1));
  std::atomic<uint64_t> wrong{0};
  const auto runner = [&](unsigned id) {
    for (uint64_t i = 0; i < 1500; ++i) {
      const uint64_t page = (2 * i + id) % pages;
      guests.make_stale(page);
      for (const uint64_t n : {page, page ^ 1})
        if (guests.run(id, n, 20) != 20 * (n + 1)) ++wrong;
    }
  };
  std::thread first(runner, 0), second(runner, 1);
  first.join();
  second.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_GT(guests.counted(0)["blocks.dropped"], 500u);
  // How much was translated depends on who met whom; one vCPU alone gets there in any case.
  for (uint64_t i = 0; i < 5000 && guests.counted(0)["code_cache.evictions"] == 0; ++i) {
    guests.make_stale(i % pages);
    EXPECT_EQ(guests.run(0, i % pages, 20), 20 * (i % pages + 1));
  }
  EXPECT_GT(guests.counted(0)["code_cache.evictions"], 0u);
}

}  // namespace
}  // namespace lodge::kvm::soft
