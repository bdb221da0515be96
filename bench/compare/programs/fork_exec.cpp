// A child process that becomes another program (this one, with `--exit STATUS`), which ends at once.
#include <array>
#include <cstring>
#include <string>

#include "child.hpp"

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--exit") == 0) return std::atoi(argv[2]);
  return compare::measure("fork-exec", argc, argv, [&](uint64_t iterations) {
    compare::Checksum sum;
    while (iterations--) {
      std::string status = std::to_string(iterations & 0x7f), option = "--exit";
      const std::array<char*, 4> arguments = {argv[0], option.data(), status.data(), nullptr};
      const pid_t child = compare::start_child([&] {
        execv(argv[0], arguments.data());
        return 255;
      });
      sum.add(static_cast<uint64_t>(compare::exit_status(child)));
    }
    return sum.value();
  });
}
