// Runs cases on the processor itself, in a child that a seccomp filter confines to reading and writing two
// pipes. Registers are loaded and captured through signal frames: the handler of the trap behind one
// case fills the frame of the next.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <span>
#include <string>

#include "case.hpp"

namespace lodge::oracle {

class Native {
 public:
  static constexpr unsigned batch = 64;

  // `writable_code`: cases may write to themselves.
  explicit Native(bool writable_code = false);
  ~Native();
  Native(const Native&) = delete;
  Native& operator=(const Native&) = delete;

  // At most `batch` cases, each with this memory. False when the child died or hung: `culprit` is the case
  // that it was running, and the next call starts a new child.
  bool run(std::span<const Case> cases, std::span<const uint8_t> memory, std::span<Outcome> outcomes,
           unsigned& culprit);

  struct Shared;  // what parent and child see

 private:
  const bool writable_code_;
  void start();
  void stop();

  int memory_fd_ = -1;
  Shared* shared_ = nullptr;
  pid_t child_ = -1;
  int to_child_ = -1, from_child_ = -1;
};

}  // namespace lodge::oracle
