// Two threads that wake each other in turn by futex: two context switches for each iteration on one
// processor.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "program.hpp"

namespace {

// Whose turn it is. A thread sleeps until the word has its own value.
class Turn {
 public:
  void await(uint32_t who) {
    for (uint32_t seen = word_.load(); seen != who; seen = word_.load())
      syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  }
  void give(uint32_t who) {
    word_.store(who);
    syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  }

 private:
  std::atomic<uint32_t> word_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  return compare::measure("context-switch", argc, argv, [](uint64_t iterations) {
    Turn turn;
    uint64_t answers = 0;
    std::thread other([&] {
      for (uint64_t i = 0; i < iterations; i++) {
        turn.await(1);
        answers += i & 3;
        turn.give(0);
      }
    });
    for (uint64_t i = 0; i < iterations; i++) {
      turn.give(1);
      turn.await(0);
    }
    other.join();
    return answers;
  });
}
