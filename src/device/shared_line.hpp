// Several sources on one interrupt line: the line is high while any of them is (PCI pins, serial ports 1 and
// 3).
#pragma once

#include <deque>
#include <mutex>

#include "machine/io.hpp"

namespace lodge::device {

class SharedLine {
 public:
  // `out` must outlive this object.
  explicit SharedLine(machine::Interrupt& out) : out_(out) {}
  SharedLine(const SharedLine&) = delete;
  SharedLine& operator=(const SharedLine&) = delete;

  // A new source, low. Lives as long as this object. Any thread.
  machine::Interrupt& add_input() {
    std::lock_guard lock(mutex_);
    return inputs_.emplace_back(*this);
  }

 private:
  class Input final : public machine::Interrupt {
   public:
    explicit Input(SharedLine& line) : line_(line) {}
    void set(bool level) noexcept override { line_.change(level_, level); }

   private:
    SharedLine& line_;
    bool level_ = false;  // guarded by line_.mutex_
  };

  // The lock is held while the line is driven, so that two sources cannot overtake each other.
  void change(bool& input, bool level) noexcept {
    std::lock_guard lock(mutex_);
    if (input == level) return;
    input = level;
    unsigned before = high_;
    high_ += level ? 1 : -1;
    if ((before == 0) != (high_ == 0)) out_.set(high_ != 0);
  }

  machine::Interrupt& out_;
  std::mutex mutex_;
  std::deque<Input> inputs_;  // a deque: inputs keep their address
  unsigned high_ = 0;
};

// One source on two lines.
class SplitLine final : public machine::Interrupt {
 public:
  // Both must outlive this object.
  SplitLine(machine::Interrupt& first, machine::Interrupt& second) : first_(first), second_(second) {}
  void set(bool level) noexcept override {
    first_.set(level);
    second_.set(level);
  }

 private:
  machine::Interrupt& first_;
  machine::Interrupt& second_;
};

}  // namespace lodge::device
