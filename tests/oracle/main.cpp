// The silicon oracle: random instructions on the processor and in the interpreter, equal state demanded.
//   lodge-oracle [--seed N] [--count N] [--domain all|integer|vector|x87] [--show N] [--mode 64|32]
// Exit status 0: all agree; 1: some differ (the first few are shown); 2: bad usage.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "compare.hpp"
#include "generator.hpp"
#include "interpreted.hpp"
#include "native.hpp"

namespace lodge::oracle {
namespace {

struct Options {
  uint64_t seed = 1, count = 200'000, show = 10;
  Domain domain = Domain::all;
  bool bits32 = false;
};

bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--seed") {
      options.seed = std::strtoull(value.c_str(), nullptr, 0);
    } else if (name == "--count") {
      options.count = std::strtoull(value.c_str(), nullptr, 0);
    } else if (name == "--show") {
      options.show = std::strtoull(value.c_str(), nullptr, 0);
    } else if (name == "--mode" && (value == "64" || value == "32")) {
      options.bits32 = value == "32";
    } else if (name == "--domain") {
      const std::map<std::string, Domain> domains = {{"all", Domain::all},
                                                     {"integer", Domain::integer},
                                                     {"vector", Domain::vector},
                                                     {"x87", Domain::x87}};
      const auto found = domains.find(value);
      if (found == domains.end()) return false;
      options.domain = found->second;
    } else {
      return false;
    }
  }
  return argc % 2 == 1;
}

int run(const Options& options) {
  std::printf("seed %lu, %lu instructions\n", options.seed, options.count);
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  Native native;
  Interpreted interpreted;
  Generator generator(options.seed, options.domain, options.bits32);
  std::vector<Case> cases(Native::batch);
  std::vector<Instruction> instructions(Native::batch);
  std::vector<Outcome> outcomes(Native::batch);
  std::array<uint8_t, window_size> memory;
  Outcome mine;
  uint64_t done = 0, different = 0, shown = 0;
  std::map<int, uint64_t> exceptions;
  std::map<std::string, uint64_t> culprits;
  while (done < options.count) {
    generator.fill_memory(memory);
    for (unsigned i = 0; i < Native::batch; ++i) generator.next(cases[i], instructions[i]);
    unsigned culprit = 0;
    const bool alive = native.run(cases, memory, outcomes, culprit);
    const unsigned usable = alive ? Native::batch : culprit;
    if (!alive) {
      ++different;
      std::printf("the child died or hung at\n%s", describe(cases[culprit], instructions[culprit]).c_str());
    }
    for (unsigned i = 0; i < usable; ++i) {
      if (!alive) break;  // outcomes are copied for whole batches only
      interpreted.run(cases[i], memory, mine);
      ++exceptions[outcomes[i].exception];
      const std::string text = differences(cases[i], instructions[i], outcomes[i], mine);
      if (text.empty()) continue;
      ++different;
      const char* const name = ZydisMnemonicGetString(instructions[i].insn.mnemonic);
      // A few of each kind, so that one defect does not hide the others.
      if (++culprits[name] <= 2 && shown++ < options.show)
        std::printf("%s%s", describe(cases[i], instructions[i]).c_str(), text.c_str());
    }
    done += Native::batch;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%lu instructions of %zu mnemonics in %.1f s: %lu differ\n", done, generator.mnemonics(),
              seconds, different);
  std::printf("exceptions:");
  for (const auto& [vector, count] : exceptions) std::printf(" %d:%lu", vector, count);
  std::printf("\n");
  for (const auto& [name, count] : culprits) std::printf("  %s %lu\n", name.c_str(), count);
  return different == 0 ? 0 : 1;
}

}  // namespace
}  // namespace lodge::oracle

int main(int argc, char** argv) {
  lodge::oracle::Options options;
  if (!lodge::oracle::parse(argc, argv, options)) {
    std::fprintf(stderr,
                 "usage: lodge-oracle [--seed N] [--count N] [--domain all|integer|vector|x87] [--show N] "
                 "[--mode 64|32]\n");
    return 2;
  }
  try {
    return lodge::oracle::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lodge-oracle: %s\n", error.what());
    return 1;
  }
}
