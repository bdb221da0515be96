// Work in a guest that finds out when it does not go on as it was: for guests that are saved, loaded and
// moved while they run (tests/preload/qemu_move_test.cpp). Prints a line for every round, and one that begins
// with "check: WRONG" and the end when anything is not what it was.
//
//   check [MiB]     memory of each worker (default 16)
//
// One worker for each processor. A round of each: pages, chosen by a generator, are compared with what was
// written into them last, and written anew; a function is written into memory, and called; a sum of floating
// point, kept in registers over many steps, is compared with that of the first round; and the clock is looked
// at, which must not be behind what any worker has seen. Rounds end at a barrier, so workers wake each other.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <optional>
#include <thread>
#include <vector>

namespace {

constexpr unsigned words = 512, pages_a_round = 512;
constexpr uint64_t stride = 0x0101010101010101;

[[noreturn]] void wrong(const char* what, unsigned worker, uint64_t expected, uint64_t found) {
  std::printf("check: WRONG: %s of worker %u: %#llx, not %#llx\n", what, worker,
              static_cast<unsigned long long>(found), static_cast<unsigned long long>(expected));
  std::_Exit(1);
}

uint64_t mix(uint64_t value) {
  value = (value ^ value >> 31) * 0x7fb5d329728ea185;
  value = (value ^ value >> 27) * 0x81dadef4bc2dd44d;
  return value ^ value >> 33;
}

uint64_t nanoseconds() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

uint8_t* map(size_t size, int protection) {
  void* const memory = ::mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory != MAP_FAILED) return static_cast<uint8_t*>(memory);
  std::perror("check: mmap");
  std::_Exit(1);
}

class Worker {
 public:
  Worker(unsigned number, size_t size)
      : number_(number),
        versions_(size / (words * 8)),
        memory_(reinterpret_cast<uint64_t*>(map(size, PROT_READ | PROT_WRITE))),
        code_(map(4096, PROT_READ | PROT_WRITE | PROT_EXEC)),
        random_(number + 1) {
    for (size_t page = 0; page < versions_.size(); ++page) write(page);
  }

  void round(std::atomic<uint64_t>& latest) {
    for (unsigned i = 0; i < pages_a_round; ++i) {
      random_ = mix(random_ + 0x9e3779b97f4a7c15);
      const size_t page = random_ % versions_.size();
      compare(page);
      ++versions_[page];
      write(page);
    }
    call();
    add_up();
    look_at_the_clock(latest);
  }

 private:
  uint64_t seed(size_t page) const { return mix(uint64_t{number_} << 48 | page << 32 | versions_[page]); }

  void write(size_t page) {
    const uint64_t first = seed(page);
    for (unsigned i = 0; i < words; ++i) memory_[page * words + i] = first + i * stride;
  }
  void compare(size_t page) const {
    const uint64_t first = seed(page);
    for (unsigned i = 0; i < words; ++i)
      if (const uint64_t found = memory_[page * words + i]; found != first + i * stride)
        wrong("memory", number_, first + i * stride, found);
  }

  // mov $number, %eax; ret
  void call() {
    const auto answer = static_cast<uint32_t>(random_);
    code_[0] = 0xb8;
    std::memcpy(code_ + 1, &answer, sizeof answer);
    code_[5] = 0xc3;
    const auto function = reinterpret_cast<uint32_t (*)()>(code_);
    if (const uint32_t found = function(); found != answer) wrong("code", number_, answer, found);
  }

  void add_up() {
    double sum = 0;
    for (unsigned i = 1; i < 20'000; ++i) sum += std::sqrt(i) / (i + number_);
    uint64_t bits = 0;
    std::memcpy(&bits, &sum, sizeof bits);
    if (!sum_) sum_ = bits;
    if (*sum_ != bits) wrong("sum", number_, *sum_, bits);
  }

  void look_at_the_clock(std::atomic<uint64_t>& latest) const {
    for (unsigned i = 0; i < 1000; ++i) {
      uint64_t before = latest.load();
      const uint64_t now = nanoseconds();
      if (now < before) wrong("clock", number_, before, now);
      while (before < now && !latest.compare_exchange_weak(before, now)) continue;
    }
  }

  const unsigned number_;
  std::vector<uint32_t> versions_;
  uint64_t* const memory_;
  uint8_t* const code_;
  uint64_t random_;
  std::optional<uint64_t> sum_;
};

}  // namespace

int main(int count, char** arguments) {
  const size_t size = (count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 16) << 20;
  const auto processors = static_cast<unsigned>(::sysconf(_SC_NPROCESSORS_ONLN));
  std::setvbuf(stdout, nullptr, _IONBF, 0);
  std::atomic<uint64_t> latest{0};
  unsigned rounds = 0;
  std::barrier rendezvous(processors, [&]() noexcept { std::printf("check: round %u\n", ++rounds); });
  std::vector<std::jthread> threads;
  for (unsigned number = 0; number < processors; ++number)
    threads.emplace_back([&, number] {
      Worker worker(number, size);
      for (;;) {
        worker.round(latest);
        rendezvous.arrive_and_wait();
      }
    });
}
