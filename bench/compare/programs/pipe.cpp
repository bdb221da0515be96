// A byte to another process and back through two pipes.
#include <array>

#include "child.hpp"

namespace {

class Pipe {
 public:
  Pipe() {
    if (pipe(ends_.data()) != 0) compare::fail("pipe");
  }
  ~Pipe() {
    close(ends_[0]);
    close(ends_[1]);
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;

  bool receive(uint8_t& byte) const { return read(ends_[0], &byte, 1) == 1; }
  void send(uint8_t byte) const {
    if (write(ends_[1], &byte, 1) != 1) compare::fail("write");
  }

 private:
  std::array<int, 2> ends_;
};

constexpr uint8_t last = 0xff;

}  // namespace

int main(int argc, char** argv) {
  const Pipe there, back;
  const pid_t child = compare::start_child([&] {
    for (uint8_t byte; there.receive(byte) && byte != last;) back.send(static_cast<uint8_t>(byte + 1));
    return 0;
  });
  const int status = compare::measure("pipe", argc, argv, [&](uint64_t iterations) {
    compare::Checksum sum;
    while (iterations--) {
      there.send(static_cast<uint8_t>(iterations & 0x7f));
      uint8_t answer;
      if (!back.receive(answer)) compare::fail("read");
      sum.add(answer);
    }
    return sum.value();
  });
  there.send(last);
  return status ? status : compare::exit_status(child);
}
