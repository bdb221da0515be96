#include "block/transfer.hpp"

#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>

#include "base/error.hpp"

namespace lodge::block {
namespace {

// As container run-times do it: io_uring_setup fails with EPERM.
bool forbid_io_uring() {
  std::array<sock_filter, 4> filter{{
      {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(seccomp_data, nr)},
      {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, SYS_io_uring_setup},
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | EPERM},
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
  }};
  const sock_fprog program{filter.size(), filter.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(Engine, FallsBackToThreadsWhereIoUringIsForbidden) {
  const pid_t child = ::fork();
  if (child == 0) {
    if (!forbid_io_uring()) ::_exit(1);
    if (make_engine(Engine::automatic)->name() != "threads") ::_exit(2);
    try {
      make_engine(Engine::uring);
    } catch (const UsageError&) {
      ::_exit(0);
    }
    ::_exit(3);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(Transfer, DropFrontDropsWhatIsDone) {
  std::array<uint8_t, 10> memory{};
  std::vector<iovec> buffers{{memory.data(), 4}, {memory.data() + 4, 0}, {memory.data() + 4, 6}};
  drop_front(buffers, 5);
  ASSERT_EQ(buffers.size(), 1u);
  EXPECT_EQ(buffers[0].iov_base, memory.data() + 5);
  EXPECT_EQ(buffers[0].iov_len, 5u);
  drop_front(buffers, 5);
  EXPECT_TRUE(buffers.empty());
}

TEST(WorkerPool, RunsEverythingBeforeItEnds) {
  std::atomic<int> count = 0;
  {
    WorkerPool pool(3);
    for (int i = 0; i < 1000; i++) pool.run([&count] { count++; });
  }
  EXPECT_EQ(count, 1000);
}

}  // namespace
}  // namespace lodge::block
