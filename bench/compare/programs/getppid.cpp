// A system call that does next to nothing.
#include <sys/syscall.h>
#include <unistd.h>

#include "program.hpp"

int main(int argc, char** argv) {
  return compare::measure("getppid", argc, argv, [](uint64_t iterations) {
    const pid_t parent = getppid();
    uint64_t same = 0;
    for (uint64_t i = 0; i < iterations; i++) same += syscall(SYS_getppid) == parent;
    return same;
  });
}
