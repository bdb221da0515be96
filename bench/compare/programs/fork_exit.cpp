// A child process that ends at once.
#include "child.hpp"

int main(int argc, char** argv) {
  return compare::measure("fork-exit", argc, argv, [](uint64_t iterations) {
    compare::Checksum sum;
    while (iterations--) {
      const int status = static_cast<int>(iterations & 0x7f);
      sum.add(static_cast<uint64_t>(compare::exit_status(compare::start_child([&] { return status; }))));
    }
    return sum.value();
  });
}
