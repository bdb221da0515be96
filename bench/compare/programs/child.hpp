// Child processes of the system programs.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include "program.hpp"

namespace compare {

// Forks; the child runs `body` and exits with its result.
template <typename Body>
pid_t start_child(Body body) {
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) _exit(body());
  return child;
}

inline int exit_status(pid_t child) {
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status)) fail("waitpid");
  return WEXITSTATUS(status);
}

}  // namespace compare
