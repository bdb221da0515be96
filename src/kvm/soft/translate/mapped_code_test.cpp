// Leads into code by linear address: what a flush takes out of use, and what a look-up brings back.
#include "kvm/soft/translate/mapped_code.hpp"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>

#include "kvm/soft/cpu/quiet_platform.hpp"
#include "kvm/soft/decode/decoder.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t host = 0x7000'0000'0000, linear = 0x40'0000'0000;
constexpr uint32_t user_key = key::user, supervisor_key = 1u << key::tlb_shift;

uint64_t page(uint64_t number) {
  return number << page_shift;
}

class MappedCodeTest : public testing::Test {
 protected:
  MappedCodeTest() : home_(platform_, 0), cpu(home_.cpu()), area(home_.area()), mapped(cpu, area) {
    cpu.decode_key = user_key;
    mapped.sync();
  }

  DecodedBlock block(uint64_t host_page, uint64_t offset, uint32_t decode_key) {
    DecodedBlock b;
    b.host = host + page(host_page) + offset;
    b.key = decode_key;
    b.host_page[0] = host + page(host_page);
    return b;
  }
  // A translation of the code at an offset in a page of the host's.
  Translation& make(uint64_t host_page, uint64_t offset, uint32_t decode_key = user_key, uint8_t level = 0) {
    Translation& t = made_.emplace_back(block(host_page, offset, decode_key), 0u,
                                        Boundary{.native_flags = false, .level = level}, Hints{}, memory_);
    t.begin = t.body = code_.data() + next_code_++;
    t.end = t.begin + 1;
    return t;
  }
  // A branch of `owner` to code that is so many pages away.
  DirectExit& branch(Translation& owner, int distance) {
    DirectExit& exit = owner.exits.emplace_back();
    exit.owner = &owner;
    exit.offset = distance * static_cast<int>(page_size);
    exit.slot = next_slot_++;
    exit.has_slot = true;
    exit.stub = code_.data() + next_code_++;
    area.slot[exit.slot] = exit.stub;
    return exit;
  }
  void enter(uint64_t host_page, uint64_t linear_page) {
    mapped.enter(block(host_page, 0, cpu.decode_key), linear + page(linear_page));
  }
  void flush_user() {
    cpu.user_code_flushed = true;
    mapped.sync();
  }
  bool leads(const DirectExit& exit, const Translation& target) {
    EXPECT_TRUE(area.slot[exit.slot] == exit.stub || area.slot[exit.slot] == target.begin);
    return area.slot[exit.slot] == target.begin;
  }

  QuietPlatform platform_;
  CpuHome home_;
  Cpu& cpu;
  TranslatorArea& area;
  MappedCode mapped;

 private:
  std::pmr::memory_resource& memory_ = *std::pmr::new_delete_resource();
  std::deque<Translation> made_;
  std::array<uint8_t, 4096> code_{};
  uint32_t next_code_ = 0, next_slot_ = 0;
};

TEST_F(MappedCodeTest, AFlushTakesJumpsOutOfUseAndOneLookUpBringsThemBack) {
  const Translation &one = make(5, 0x10), &other = make(5, 0x20);
  enter(5, 50);
  mapped.remember_jump(one, linear + page(50) + 0x10);
  mapped.remember_jump(other, linear + page(50) + 0x20);
  EXPECT_EQ(mapped.jump(linear + page(50) + 0x10, 0), one.begin);
  flush_user();
  EXPECT_EQ(mapped.jump(linear + page(50) + 0x10, 0), nullptr);
  enter(5, 70);  // mapped elsewhere now
  EXPECT_EQ(mapped.jump(linear + page(70) + 0x10, 0), one.begin);
  EXPECT_EQ(mapped.jump(linear + page(70) + 0x20, 0), other.begin);
  EXPECT_EQ(mapped.jump(linear + page(50) + 0x10, 0), nullptr);
  EXPECT_EQ(mapped.jump(linear + page(70) + 0x10, 1), nullptr) << "code for another level";
}

TEST_F(MappedCodeTest, ABranchLeadsSomewhereWhenBothPagesWereLookedUp) {
  Translation &from = make(1, 0), &to = make(2, 0);
  DirectExit& exit = branch(from, 3);
  enter(1, 10);
  EXPECT_FALSE(mapped.link(exit, to)) << "nobody has looked where the target is";
  enter(2, 13);
  EXPECT_TRUE(mapped.link(exit, to));
  EXPECT_TRUE(leads(exit, to));
  flush_user();
  EXPECT_FALSE(leads(exit, to));
  enter(2, 23);
  EXPECT_FALSE(leads(exit, to));
  enter(1, 20);
  EXPECT_TRUE(leads(exit, to));
  flush_user();
  enter(1, 20);
  enter(2, 24);
  EXPECT_FALSE(leads(exit, to)) << "another page is three pages from the branch now";
}

TEST_F(MappedCodeTest, AnEntryLeadsToItsOwnSecondPage) {
  Translation& t = make(1, 0xff0);
  const_cast<DecodedBlock&>(t.block).host_page[1] = host + page(9);
  DirectExit& entry = branch(t, 0);
  entry.is_entry = true;
  DecodedBlock whole = t.block;
  mapped.enter(whole, linear + page(10) + 0xff0);
  EXPECT_TRUE(mapped.link(entry, t));
  EXPECT_FALSE(mapped.link(entry, make(1, 0xff0)));
  flush_user();
  enter(1, 10);
  EXPECT_FALSE(leads(entry, t));
  enter(9, 12);
  EXPECT_FALSE(leads(entry, t)) << "the second page is somewhere else";
  flush_user();
  enter(1, 30);
  enter(9, 31);
  EXPECT_TRUE(leads(entry, t));
}

TEST_F(MappedCodeTest, CodeUnderASecondAddressIsNotKnownUnderTheFirst) {
  const Translation& t = make(5, 0);
  enter(5, 50);
  mapped.remember_jump(t, linear + page(50));
  enter(5, 60);
  EXPECT_EQ(mapped.jump(linear + page(50), 0), nullptr);
  EXPECT_EQ(mapped.jump(linear + page(60), 0), t.begin);
  EXPECT_TRUE(cpu.user_code_pages.contains((linear >> page_shift) + 60));
}

TEST_F(MappedCodeTest, WhatIsGoneIsNotBroughtBack) {
  Translation &from = make(1, 0), &to = make(2, 0), &stays = make(2, 8);
  DirectExit &exit = branch(from, 1), &kept = branch(from, 1);
  const auto enter_both = [&] { enter(1, 1), enter(2, 2); };
  enter_both();
  ASSERT_TRUE(mapped.link(exit, to) && mapped.link(kept, stays));
  mapped.remember_jump(to, linear + page(2));
  mapped.remember_jump(stays, linear + page(2) + 8);
  mapped.forget(to);
  EXPECT_FALSE(leads(exit, to));
  EXPECT_EQ(mapped.jump(linear + page(2), 0), nullptr);
  flush_user();
  enter_both();
  EXPECT_FALSE(leads(exit, to));
  EXPECT_EQ(mapped.jump(linear + page(2), 0), nullptr);
  EXPECT_TRUE(leads(kept, stays));
  EXPECT_EQ(mapped.jump(linear + page(2) + 8, 0), stays.begin);
  mapped.forget(from);
  EXPECT_FALSE(leads(kept, stays));
  // Its slot belongs to somebody else next.
  Translation& next = make(1, 0);
  DirectExit& reused = branch(next, 1);
  reused.slot = kept.slot;
  area.slot[kept.slot] = reused.stub;
  flush_user();
  enter_both();
  EXPECT_EQ(area.slot[reused.slot], reused.stub);
  EXPECT_TRUE(mapped.link(reused, stays));
  flush_user();
  EXPECT_EQ(area.slot[reused.slot], reused.stub);
}

TEST_F(MappedCodeTest, TwoAddressesWithOneEntryAreBothKnown) {
  const Translation &one = make(1, 0), &other = make(2, 0);
  const uint64_t far = (uint64_t{1} << 18) / page_size;  // only the low 18 bits choose the entry
  enter(1, 0);
  enter(2, far);
  ASSERT_EQ(JumpTable::offset(linear), JumpTable::offset(linear + page(far)));
  mapped.remember_jump(one, linear);
  mapped.remember_jump(other, linear + page(far));
  for (int turn = 0; turn < 3; ++turn) {
    EXPECT_EQ(mapped.jump(linear, 0), one.begin);
    EXPECT_EQ(mapped.jump(linear + page(far), 0), other.begin);
  }
}

TEST_F(MappedCodeTest, UserAndSupervisorCodeAreFlushedApart) {
  const Translation &user = make(1, 0), &supervisor = make(2, 0, supervisor_key);
  enter(1, 1);
  mapped.remember_jump(user, linear + page(1));
  cpu.decode_key = supervisor_key;
  mapped.sync();
  enter(2, 2);
  mapped.remember_jump(supervisor, linear + page(2));
  flush_user();
  EXPECT_EQ(mapped.jump(linear + page(2), 0), supervisor.begin);
  cpu.decode_key = user_key;
  mapped.sync();
  EXPECT_EQ(mapped.jump(linear + page(1), 0), nullptr);
}

TEST_F(MappedCodeTest, AViewsTablesAreOfOneDecodeKey) {
  const Translation& t = make(1, 0);
  enter(1, 1);
  mapped.remember_jump(t, linear + page(1));
  cpu.decode_key = user_key | key::avx;  // the same view
  mapped.sync();
  EXPECT_EQ(mapped.jump(linear + page(1), 0), nullptr);
  cpu.decode_key = user_key;
  mapped.sync();
  EXPECT_EQ(mapped.jump(linear + page(1), 0), t.begin);
}

TEST_F(MappedCodeTest, GivenBackNothingLeadsAnywhere) {
  Translation &from = make(1, 0), &to = make(2, 0);
  DirectExit& exit = branch(from, 1);
  enter(1, 1), enter(2, 2);
  ASSERT_TRUE(mapped.link(exit, to));
  mapped.remember_jump(to, linear + page(2));
  mapped.give_back();
  mapped.sync();
  area.slot[exit.slot] = exit.stub;
  enter(1, 1), enter(2, 2);
  EXPECT_EQ(area.slot[exit.slot], exit.stub);
  EXPECT_EQ(mapped.jump(linear + page(2), 0), nullptr);
}

// Any order of everything: a branch leads somewhere only where the last look-ups say so, and always there
// when it was linked before.
TEST_F(MappedCodeTest, AgreesWithASlowModel) {
  constexpr unsigned host_pages = 6, linear_pages = 12, rounds = 40'000;
  std::minstd_rand random(1);
  const auto pick = [&](unsigned below) { return static_cast<unsigned>(random() >> 8) % below; };
  struct Branch {
    DirectExit* exit;
    Translation* target = nullptr;  // once linked
    unsigned from = 0, to = 0;
    int distance = 0;
  };
  std::vector<Branch> branches;
  std::vector<Translation*> targets;
  for (unsigned i = 0; i < host_pages; ++i) targets.push_back(&make(i, 0));
  for (unsigned i = 0; i < 40; ++i) {
    const int distance = static_cast<int>(pick(5)) - 2;
    branches.push_back({.exit = &branch(*targets[pick(host_pages)], distance), .distance = distance});
    branches.back().from =
        static_cast<unsigned>((branches.back().exit->owner->block.host - host) >> page_shift);
  }
  std::map<unsigned, unsigned> at;  // linear page of each host page that was looked up
  unsigned led = 0;
  for (unsigned round = 0; round < rounds; ++round) {
    const unsigned what = pick(20);
    if (what == 0) {
      flush_user();
      at.clear();
    } else if (what < 8) {
      const unsigned which = pick(host_pages), where = pick(linear_pages);
      if (const auto it = at.find(which); it != at.end() && it->second != where) at.clear();
      at[which] = where;
      enter(which, where);
    } else {
      Branch& b = branches[pick(static_cast<unsigned>(branches.size()))];
      const unsigned to = pick(host_pages);
      const bool fits = at.contains(b.from) && at.contains(to) &&
                        static_cast<int>(at[b.from]) + b.distance == static_cast<int>(at[to]);
      ASSERT_EQ(mapped.link(*b.exit, *targets[to]), fits);
      if (fits) b.target = targets[to], b.to = to;
    }
    for (const Branch& b : branches) {
      const bool leads = b.target != nullptr && at.contains(b.from) && at.contains(b.to) &&
                         static_cast<int>(at[b.from]) + b.distance == static_cast<int>(at[b.to]);
      led += leads;
      ASSERT_EQ(area.slot[b.exit->slot], leads ? b.target->begin : b.exit->stub) << "round " << round;
    }
  }
  EXPECT_GT(led, rounds / 10) << "the test has shown little";
}

}  // namespace
}  // namespace lodge::kvm::soft
