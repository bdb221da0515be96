// What the soft accelerator tells about itself: counts, and the map for perf.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>

#include "base/mapping.hpp"
#include "base/temporary_directory.hpp"
#include "kvm/soft/idle_watch.hpp"
#include "kvm/soft/soft.hpp"
#include "kvm/soft/translate/perf_map.hpp"

namespace lodge::kvm::soft {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr uint64_t ram_size = 1 << 20, code_at = 0x8000, data_at = 0xa000;

// A 32-bit guest with flat segments and no paging.
class Guest {
 public:
  Guest(const Options& options, std::initializer_list<uint8_t> code, bool irqchip = false)
      : system_(open(options)), vm_(system_->create_vm()) {
    std::copy(code.begin(), code.end(), ram_.data() + code_at);
    kvm_userspace_memory_region region{};
    region.memory_size = ram_size;
    region.userspace_addr = reinterpret_cast<uint64_t>(ram_.data());
    vm_->set_user_memory_region(region);
    if (irqchip) vm_->create_irqchip();
    vcpu_ = vm_->create_vcpu(0);
    vcpu_->set_cpuid2(system_->supported_cpuid());
    kvm_sregs sregs = vcpu_->sregs();
    kvm_segment segment{};
    segment.limit = 0xffffffff;
    segment.present = 1, segment.s = 1, segment.g = 1, segment.db = 1;
    segment.type = 3, segment.selector = 0x10;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment;
    segment.type = 11, segment.selector = 0x8;
    sregs.cs = segment;
    sregs.cr0 = 0x11;  // PE, ET
    vcpu_->set_sregs(sregs);
  }

  // From the start of the code to its OUT.
  void run(uint64_t count) {
    kvm_regs regs{};
    vcpu_->set_mp_state({KVM_MP_STATE_RUNNABLE});  // whatever it halts in
    regs.rip = code_at, regs.rsi = data_at, regs.rcx = count, regs.rflags = 2;
    vcpu_->set_regs(regs);
    const Exit exit = vcpu_->run();
    ASSERT_EQ(exit.status(), 0);
    ASSERT_EQ(exit.reason(), unsigned{KVM_EXIT_IO}) << exit.describe();
  }

  // Behind the OUT, for so long.
  void halt(std::chrono::milliseconds time) {
    std::thread kicker([&] {
      std::this_thread::sleep_for(time);
      vcpu_->kick();
    });
    EXPECT_TRUE(vcpu_->run().interrupted());
    kicker.join();
  }

  std::map<std::string, uint64_t> counted() {
    std::map<std::string, uint64_t> all;
    for (const Statistic& s : vcpu_->statistics()) all[s.group + "." + s.name] += s.value;
    return all;
  }
  uint8_t* code() { return ram_.data() + code_at; }
  Vm& vm() { return *vm_; }

 private:
  std::unique_ptr<System> system_;
  Mapping ram_ = Mapping::anonymous(ram_size);
  std::unique_ptr<Vm> vm_;
  std::unique_ptr<Vcpu> vcpu_;
};

// 1: mov (%esi),%eax; add %ecx,%eax; mov %eax,4096(%esi); dec %ecx; jnz 1b; out %al,$0x80
const std::initializer_list<uint8_t> loop = {0x8b, 0x06, 0x01, 0xc8, 0x89, 0x86, 0x00, 0x10,
                                             0x00, 0x00, 0x49, 0x75, 0xf3, 0xe6, 0x80};

TEST(SoftStatistics, CountsInstructionsAndLookUpsOfTranslatedCode) {
  Guest guest({.count = true}, loop);
  guest.run(100'000);
  const auto counted = guest.counted();
  const uint64_t all = counted.at("instructions.interpreted") + counted.at("instructions.translated");
  // OUT runs again, alone, when its answer is there; the count of a block that ends early is corrected.
  EXPECT_GE(all, 500'000u);
  EXPECT_LE(all, 500'100u);
  EXPECT_GT(counted.at("instructions.translated"), 499'000u);
  // Two accesses off ESI that lie too far apart for one look-up.
  EXPECT_GT(counted.at("soft_tlb.lookups"), 199'000u);
  EXPECT_LE(counted.at("soft_tlb.lookups"), 200'000u);
  EXPECT_LT(counted.at("soft_tlb.misses"), 10u);
  EXPECT_GE(counted.at("blocks.translated"), 1u);
  EXPECT_GT(counted.at("code_cache.used_bytes"), 0u);
}

TEST(SoftStatistics, CountsNothingInTranslatedCodeUnlessAsked) {
  Guest guest({}, loop);
  guest.run(100'000);
  const auto counted = guest.counted();
  EXPECT_FALSE(counted.contains("instructions.translated"));
  EXPECT_FALSE(counted.contains("soft_tlb.lookups"));
  EXPECT_GE(counted.at("blocks.translated"), 1u);
}

TEST(SoftStatistics, CountsAreTheSameByTheInterpreter) {
  Guest guest({.engine = Engine::interpret, .count = true}, loop);
  guest.run(1000);
  const auto counted = guest.counted();
  EXPECT_GE(counted.at("instructions.interpreted"), 5000u);
  EXPECT_LE(counted.at("instructions.interpreted"), 5010u);
  EXPECT_FALSE(counted.contains("instructions.translated"));
}

TEST(SoftStatistics, NamesWhatIsLeftToTheInterpreter) {
  // 1: mov %ecx,%edi; str %eax; mov %edi,%ecx; dec %ecx; jnz 1b; out
  Guest guest({.count = true}, {0x89, 0xcf, 0x0f, 0x00, 0xc8, 0x89, 0xf9, 0x49, 0x75, 0xf6, 0xe6, 0x80});
  guest.run(1000);
  const auto counted = guest.counted();
  EXPECT_GT(counted.at("left_to_interpreter.str"), 900u);
  EXPECT_LE(counted.at("left_to_interpreter.str"), 1000u);
  const uint64_t all = counted.at("instructions.interpreted") + counted.at("instructions.translated");
  EXPECT_GE(all, 5000u);
  EXPECT_LE(all, 5010u);
}

TEST(SoftStatistics, TellsAPageCrossingFromAFill) {
  // 1: mov 4094(%esi),%eax; dec %ecx; jnz 1b; out
  Guest guest({.count = true}, {0x8b, 0x86, 0xfe, 0x0f, 0x00, 0x00, 0x49, 0x75, 0xf7, 0xe6, 0x80});
  guest.run(1000);
  const auto counted = guest.counted();
  EXPECT_GT(counted.at("slow_paths.page_crossing"), 900u);
  EXPECT_LE(counted.at("slow_paths.filled"), 2u);
  EXPECT_EQ(counted.at("slow_paths.native_fault"), 0u);
  EXPECT_EQ(counted.at("soft_tlb.misses"), counted.at("slow_paths.page_crossing") +
                                               counted.at("slow_paths.filled") +
                                               counted.at("slow_paths.guarded"));
}

TEST(IdleWatch, TellsAnIdleWindowFromABusyOne) {
  IdleWatch watch(1000);
  const auto used = [](uint64_t ns) { return [ns] { return ns; }; };
  EXPECT_FALSE(watch.idle(5000, used(4000)));  // nothing is known yet
  EXPECT_EQ(watch.left(5400), 600u);
  EXPECT_FALSE(watch.idle(5999, used(4000)));  // not over
  EXPECT_FALSE(watch.idle(6000, used(4020)));  // a fiftieth
  EXPECT_TRUE(watch.idle(7000, used(4039)));
  EXPECT_FALSE(watch.idle(7001, used(4039)));  // once
  EXPECT_TRUE(watch.idle(100'000, used(4039)));
}

// With irqchip, because without it HLT leaves the accelerator.
TEST(SoftIdle, AHaltedVcpuGivesBackWhatItHasTranslated) {
  // loop; out; hlt
  Guest guest(
      {.idle_ms = 200},
      {0x8b, 0x06, 0x01, 0xc8, 0x89, 0x86, 0x00, 0x10, 0x00, 0x00, 0x49, 0x75, 0xf3, 0xe6, 0x80, 0xf4}, true);
  while (guest.counted().at("code_cache.used_bytes") < 1200u << 10) {
    guest.vm().note_write(code_at, 16);
    guest.run(40);
  }
  EXPECT_EQ(guest.counted().at("code_cache.given_back"), 0u);
  const auto start = std::chrono::steady_clock::now();
  guest.halt(std::chrono::seconds(1));
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  const auto counted = guest.counted();
  EXPECT_EQ(counted.at("code_cache.given_back"), 1u);
  EXPECT_EQ(counted.at("code_cache.evictions"), 0u);
  EXPECT_LT(counted.at("code_cache.used_bytes"), 64u << 10);
  EXPECT_LE(counted.at("events.halts"), 5u);  // it slept
  guest.run(100'000);
  EXPECT_GT(guest.counted().at("blocks.translated"), counted.at("blocks.translated"));
}

std::string read(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Piece {
  uint64_t begin, size;
  std::string name;
};

std::vector<Piece> parse(const std::string& text) {
  std::vector<Piece> pieces;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    Piece piece{};
    words >> std::hex >> piece.begin >> piece.size >> piece.name;
    EXPECT_FALSE(words.fail()) << line;
    EXPECT_TRUE(words.eof()) << line;
    pieces.push_back(piece);
  }
  return pieces;
}

bool is_executable(uint64_t address) {
  std::istringstream lines(read("/proc/self/maps"));
  for (std::string line; std::getline(lines, line);) {
    uint64_t begin = 0, end = 0;
    char mode[5] = {};
    if (std::sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, mode) == 3 && address >= begin &&
        address < end)
      return mode[2] == 'x';
  }
  return false;
}

void expect_no_overlap(std::vector<Piece> pieces) {
  std::ranges::sort(pieces, {}, &Piece::begin);
  for (size_t i = 1; i < pieces.size(); ++i)
    EXPECT_GE(pieces[i].begin, pieces[i - 1].begin + pieces[i - 1].size) << pieces[i].name;
}

TEST(PerfMapOfGuest, NamesTranslatedCodeByGuestAddress) {
  const std::string path = "/tmp/perf-" + std::to_string(::getpid()) + ".map";
  {
    Guest guest({.perf_map = true}, loop);
    guest.run(1000);
    const auto pieces = parse(read(path));
    ASSERT_GE(pieces.size(), 2u);
    EXPECT_EQ(pieces[0].name, "lodge_stubs");
    EXPECT_THAT(read(path), HasSubstr("guest_kernel32_0x8000\n"));
    expect_no_overlap(pieces);
    for (const Piece& piece : pieces) {
      EXPECT_GT(piece.size, 0u);
      EXPECT_TRUE(is_executable(piece.begin) && is_executable(piece.begin + piece.size - 1)) << piece.name;
    }
  }
  EXPECT_THAT(read(path), HasSubstr("guest_kernel32_0x8000\n"));  // for a report after the run
  ::unlink(path.c_str());
}

// Code that changes with every round fills the smallest cache.
TEST(PerfMapOfGuest, HasNoStaleLinesAfterTheCacheWasUsedUp) {
  const std::string path = "/tmp/perf-" + std::to_string(::getpid()) + ".map";
  {
    Guest guest({.code_cache = size_t{1} << 20, .perf_map = true}, loop);
    for (uint64_t round = 0; guest.counted().at("code_cache.made_bytes") < 3u << 20; ++round) {
      ASSERT_LT(round, 100'000u);
      guest.vm().note_write(code_at, 16);
      guest.run(40);
    }
    guest.vm().note_write(code_at, 16);
    guest.run(1000);
    expect_no_overlap(parse(read(path)));
    EXPECT_THAT(read(path), HasSubstr("guest_kernel32_0x8000\n"));
  }
  ::unlink(path.c_str());
}

TEST(PerfMap, ForgetsOneOwnerOnly) {
  const TemporaryDirectory directory;
  const std::string path = directory / "map";
  PerfMap map(path);
  const uint8_t code[64] = {};
  const int a = 0, b = 0;
  map.add(&a, code, code + 16, "one");
  map.add(&b, code + 32, code + 64, "two");
  EXPECT_EQ(parse(read(path)).size(), 2u);
  map.forget(&a);
  const auto pieces = parse(read(path));
  ASSERT_EQ(pieces.size(), 1u);
  EXPECT_EQ(pieces[0].name, "two");
  EXPECT_EQ(pieces[0].begin, reinterpret_cast<uintptr_t>(code + 32));
  EXPECT_EQ(pieces[0].size, 32u);
  map.add(&a, code, code + 8, "three");
  EXPECT_EQ(parse(read(path)).size(), 2u);
}

// /tmp is everybody's: a link that waits there must not be followed.
TEST(PerfMap, DoesNotWriteThroughALink) {
  const TemporaryDirectory directory;
  const std::string victim = directory / "victim", path = directory / "link";
  std::ofstream(victim) << "precious";
  std::filesystem::create_symlink(victim, path);
  {
    PerfMap map(path);
    const uint8_t code[1] = {};
    map.add(&map, code, code + 1, "x");
  }
  EXPECT_EQ(read(victim), "precious");
  EXPECT_THAT(read(path), Not(HasSubstr("precious")));
}

TEST(PerfMap, SaysWhyItCannotBeWritten) {
  EXPECT_THROW(PerfMap("/nonexistent/perf.map"), std::system_error);
}

}  // namespace
}  // namespace lodge::kvm::soft
