#include "kvm/soft/mmu/write_guard.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>

#include "base/mapping.hpp"
#include "kvm/soft/mmu/memory_map.hpp"
#include "kvm/soft/translate/host_signal.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t pages = 8;

class WriteGuard : public testing::Test, public GuardedMemory {
 protected:
  WriteGuard() {
    install_signal_handlers();
    map_->space[0].insert(slot_);
  }
  std::shared_ptr<const AddressSpaces> guarded_memory() noexcept override { return map_; }
  bool has_code(uint64_t page) const { return (slot_->code(page).load() & Slot::has_code) != 0; }
  volatile uint8_t& byte(uint64_t page) { return memory_.data()[page * page_size]; }

  Mapping memory_ = Mapping::anonymous(pages * page_size);
  CodeWatch watch_;
  std::shared_ptr<AddressSpaces> map_ = std::make_shared<AddressSpaces>();
  std::shared_ptr<Slot> slot_ = std::make_shared<Slot>(
      kvm_userspace_memory_region{.slot = 0,
                                  .flags = 0,
                                  .guest_phys_addr = 0x100000,
                                  .memory_size = pages * page_size,
                                  .userspace_addr = reinterpret_cast<uint64_t>(memory_.data())},
      watch_, true);
  GuardRegistration registration_{*this};
};

TEST_F(WriteGuard, AStoreMakesThePagesCodeStaleAndSucceeds) {
  ASSERT_TRUE(slot_->mark_code(2));
  ASSERT_TRUE(slot_->mark_code(3));
  EXPECT_EQ(watch_.guarded.load(), 2u);
  byte(2) = 7;
  EXPECT_EQ(byte(2), 7);
  EXPECT_FALSE(has_code(2));
  EXPECT_TRUE(has_code(3));
  EXPECT_EQ(watch_.epoch.load(), 1u);
  EXPECT_EQ(watch_.guarded.load(), 1u);
  byte(2) = 8;
  EXPECT_EQ(watch_.epoch.load(), 1u);
}

TEST_F(WriteGuard, ASystemCallNeedsThePageToBeAdmitted) {
  ASSERT_TRUE(slot_->mark_code(1));
  int pipes[2];
  ASSERT_EQ(::pipe(pipes), 0);
  ASSERT_EQ(::write(pipes[1], "x", 1), 1);
  auto* target = const_cast<uint8_t*>(&byte(1));
  EXPECT_EQ(::read(pipes[0], target, 1), -1);
  EXPECT_EQ(errno, EFAULT);
  EXPECT_TRUE(admit_write(reinterpret_cast<uint64_t>(target), 1));
  EXPECT_FALSE(admit_write(reinterpret_cast<uint64_t>(target), 1));
  EXPECT_EQ(::read(pipes[0], target, 1), 1);
  EXPECT_FALSE(has_code(1));
  ::close(pipes[0]);
  ::close(pipes[1]);
}

TEST_F(WriteGuard, ARangeAcrossPagesAndBeyondTheSlotIsAdmitted) {
  for (uint64_t page = 0; page < pages; ++page) ASSERT_TRUE(slot_->mark_code(page));
  EXPECT_TRUE(admit_write(reinterpret_cast<uint64_t>(memory_.data()) + 2 * page_size + 5, page_size));
  EXPECT_TRUE(has_code(1));
  EXPECT_FALSE(has_code(2));
  EXPECT_FALSE(has_code(3));
  EXPECT_TRUE(has_code(4));
  EXPECT_TRUE(admit_write(0, UINT64_MAX));
  EXPECT_EQ(watch_.guarded.load(), 0u);
}

// A store that comes between the guard of a page and the word that says so.
TEST_F(WriteGuard, AStoreWaitsForWhoIsGuardingThePage) {
  std::atomic<bool> done{false};
  std::thread guarding([&] {
    while (!done.load()) EXPECT_TRUE(slot_->mark_code(1));
  });
  while (watch_.epoch.load() < 20'000) byte(1) = 1;
  done.store(true);
  guarding.join();
}

// A child has one thread: nobody there would ever release what another thread of its parent held.
class SlowMemory : public GuardedMemory {
 public:
  std::shared_ptr<const AddressSpaces> guarded_memory() noexcept override {
    if (slow.exchange(false)) {
      inside.store(true);
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    return map_;
  }
  std::atomic<bool> slow{true}, inside{false};

 private:
  std::shared_ptr<AddressSpaces> map_ = std::make_shared<AddressSpaces>();
};
TEST(WriteGuardFork, AChildDoesNotWaitForWhoLookedForAPageMeanwhile) {
  SlowMemory memory;
  const GuardRegistration registration(memory);
  std::thread looking([] { admit_write(1, 1); });
  while (!memory.inside.load()) std::this_thread::yield();
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(5);
    ::_exit(admit_write(1, 1) ? 1 : 0);
  }
  looking.join();
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_F(WriteGuard, ASlotThatIsGoneLeavesItsMemoryWritable) {
  ASSERT_TRUE(slot_->mark_code(0));
  slot_->retire();
  map_->space[0].erase(*slot_);
  EXPECT_EQ(watch_.guarded.load(), 0u);
  byte(0) = 1;  // faults if it is not
  ASSERT_TRUE(slot_->mark_code(1));
  byte(1) = 1;
}

TEST_F(WriteGuard, NoMoreThanSoManyPagesAreGuarded) {
  watch_.guarded.store(CodeWatch::max_guarded);
  EXPECT_FALSE(slot_->mark_code(0));
  watch_.guarded.store(0);
  EXPECT_TRUE(slot_->mark_code(0));
}

}  // namespace
}  // namespace lodge::kvm::soft
