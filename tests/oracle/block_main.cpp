// The silicon oracle of the translator: random blocks on the processor and as translated code.
//   lodge-block-oracle [--seed N] [--count N] [--mode 64|32] [--show N] [--seconds N]
// Exit status 0: all agree; 1: some differ (the first few are shown); 2: bad usage. `count` blocks, each with
// several states; less when `seconds` are over.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "block_generator.hpp"
#include "compare.hpp"
#include "native.hpp"
#include "translated.hpp"

namespace lodge::oracle {
namespace {

constexpr unsigned states_per_block = 4, blocks_per_batch = Native::batch / states_per_block;

struct Options {
  uint64_t seed = 1, count = 20'000, show = 5, seconds = 0;
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
    } else if (name == "--seconds") {
      options.seconds = std::strtoull(value.c_str(), nullptr, 0);
    } else if (name == "--mode" && (value == "64" || value == "32")) {
      options.bits32 = value == "32";
    } else {
      return false;
    }
  }
  return argc % 2 == 1;
}

const Block::Part* faulting_part(const Block& block, const Outcome& native) {
  const uint64_t offset = native.state.rip - block.program.state.rip;
  for (const Block::Part& part : block.parts)
    if (part.offset == offset) return &part;
  return nullptr;
}

// Accesses that the two may take for different faults.
bool free_fault(const Block& block, const Outcome& native, const Outcome& mine) {
  constexpr int stack = 12, protection = 13, page_fault = 14;
  // A return to a changed address, or a store through it, made instructions that nobody has chosen.
  if (native.exception >= 0 && native.state.rip - code_base < code_size &&
      faulting_part(block, native) == nullptr)
    return true;
  if (mine.exception != page_fault || native.state.rip != mine.state.rip) return false;
  const Block::Part* part = faulting_part(block, native);
  if (native.exception == page_fault) return part != nullptr && has_large_area(part->decoded.insn.mnemonic);
  // Around the end of a flat 32-bit segment: a limit violation for this processor, two pages for the engine.
  constexpr uint64_t near = 64;
  return block.program.bits32 && (native.exception == stack || native.exception == protection) &&
         (mine.cr2 < near || mine.cr2 >= (uint64_t{1} << 32) - near);
}

// The flags that an exception's frame must hold.
uint64_t live_flags(const Block& block, const Outcome& native) {
  constexpr uint64_t arithmetic = 0x8d5;
  if (native.exception < 0) return arithmetic;
  if (const Block::Part* part = faulting_part(block, native); part != nullptr) return part->live;
  return arithmetic;
}

std::string differences(const Block& block, const Outcome& native, const Outcome& mine) {
  constexpr int page_fault = 14, simd_exception = 19;
  constexpr uint64_t linux_begins = 0x7fff'ffff'f000;
  constexpr uint64_t arithmetic = 0x8d5, resume = 0x10000;
  std::string out;
  if (free_fault(block, native, mine)) return out;
  uint64_t error = native.error;
  // Linux says of every address of its own that it is mapped. An access that begins there and wraps around is
  // a read or a write, as the processor likes.
  if (native.exception == page_fault && native.cr2 >= linux_begins)
    error = (error & ~uint64_t{3}) | (mine.error & 3);
  if (native.exception != mine.exception || error != mine.error || native.cr2 != mine.cr2)
    out += format("  exception: native %d error %lx cr2 %lx, here %d error %lx cr2 %lx\n", native.exception,
                  native.error, native.cr2, mine.exception, mine.error, mine.cr2);
  if (native.state.rip != mine.state.rip)
    out += format("  rip: native %lx, here %lx\n", native.state.rip, mine.state.rip);
  const uint64_t mask = (~arithmetic | live_flags(block, native)) & ~resume;
  if (((native.state.rflags ^ mine.state.rflags) & mask) != 0)
    out += format("  rflags: native %lx, here %lx (compared %lx)\n", native.state.rflags, mine.state.rflags,
                  mask & arithmetic);
  compare_registers(out, native, mine, block.program.bits32);
  compare_memory(out, native, mine);
  Freedom freedom;
  freedom.x87_pointers = true;
  if (native.exception == simd_exception) {
    freedom.mxcsr = 0x3f;
    freedom.x87 = true;
  }
  compare_vectors(out, native, mine, freedom, block.program.bits32);
  return out;
}

bool same_outcome(const Outcome& a, const Outcome& b) {
  constexpr uint64_t arithmetic = 0x8d5;
  const uint64_t flags = a.exception < 0 ? ~uint64_t{0} : ~arithmetic;
  return a.exception == b.exception && a.error == b.error && a.cr2 == b.cr2 && a.state.rip == b.state.rip &&
         a.state.gpr == b.state.gpr && ((a.state.rflags ^ b.state.rflags) & flags) == 0 &&
         a.memory == b.memory;
}

// What is running, for the report of a crash of this program: translated code that it should not have made.
const Block* running_block = nullptr;
const Case* running_case = nullptr;

void report_crash(int number) {
  std::printf("signal %d in translated code, at\n%s%s", number, describe(*running_block).c_str(),
              describe_state(running_case->state).c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

int run(const Options& options) {
  Native native(true);
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) std::signal(number, report_crash);
  std::printf("seed %lu, %lu blocks\n", options.seed, options.count);
  std::fflush(stdout);
  BlockGenerator generator(options.seed, options.bits32);
  Translated translated(kvm::soft::Engine::translate), interpreted(kvm::soft::Engine::interpret);
  std::vector<Block> blocks(blocks_per_batch);
  std::vector<Case> cases(Native::batch);
  std::vector<Outcome> outcomes(Native::batch);
  std::array<uint8_t, window_size> memory;
  Outcome mine, reference;
  const Block* shown = nullptr;
  uint64_t done = 0, instructions = 0, runs = 0, different = 0, as_interpreted = 0, deaths = 0;
  std::map<int, uint64_t> exceptions;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  while (done < options.count && (options.seconds == 0 || elapsed() < static_cast<double>(options.seconds))) {
    generator.fill_memory(memory);
    for (unsigned b = 0; b < blocks_per_batch; ++b) {
      generator.next(blocks[b]);
      instructions += blocks[b].parts.size();
      for (unsigned s = 0; s < states_per_block; ++s) {
        Case& c = cases[b * states_per_block + s];
        c = blocks[b].program;
        generator.state(blocks[b], c.state);
      }
    }
    done += blocks_per_batch;
    unsigned culprit = 0;
    if (!native.run(cases, memory, outcomes, culprit)) {
      // A block whose return address was overwritten may go anywhere.
      ++deaths;
      continue;
    }
    for (unsigned i = 0; i < Native::batch; ++i) {
      const Block& block = blocks[i / states_per_block];
      const bool fresh = i % states_per_block == 0 || block.changes_itself;
      running_block = &block;
      running_case = &cases[i];
      translated.run(cases[i], fresh, memory, mine);
      ++runs;
      ++exceptions[outcomes[i].exception];
      const std::string text = differences(block, outcomes[i], mine);
      if (text.empty()) continue;
      // Code that overwrote a return address or itself runs what nobody has chosen, and may come upon what
      // the manuals leave open. The interpreter, which has an oracle of its own, is asked then.
      interpreted.run(cases[i], true, memory, reference);
      if (same_outcome(reference, mine)) {
        ++as_interpreted;
        continue;
      }
      // One state of a block is enough to show.
      if (different++ < options.show && &block != shown)
        shown = &block,
        std::printf("state %u, native exception %d at %lx, of\n%s%s%s\n", i % states_per_block,
                    outcomes[i].exception, outcomes[i].state.rip, describe(block).c_str(),
                    describe_state(cases[i].state).c_str(), text.c_str());
    }
  }
  std::printf(
      "%lu blocks of %lu instructions, %zu mnemonics, %lu runs in %.1f s: %lu differ, %lu differ as the "
      "interpreter does, %lu batches lost, %lu superblocks\n",
      done, instructions, generator.mnemonics(), runs, elapsed(), different, as_interpreted, deaths,
      translated.superblocks());
  std::printf("exceptions:");
  for (const auto& [vector, count] : exceptions) std::printf(" %d:%lu", vector, count);
  std::printf("\n");
  // Both happen now and then; often is a defect of the oracle.
  const bool rare = (deaths + as_interpreted) * 50 <= done / blocks_per_batch + 200;
  return different == 0 && rare ? 0 : 1;
}

}  // namespace
}  // namespace lodge::oracle

int main(int argc, char** argv) {
  lodge::oracle::Options options;
  if (!lodge::oracle::parse(argc, argv, options)) {
    std::fprintf(
        stderr, "usage: lodge-block-oracle [--seed N] [--count N] [--mode 64|32] [--show N] [--seconds N]\n");
    return 2;
  }
  try {
    return lodge::oracle::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lodge-block-oracle: %s\n", error.what());
    return 1;
  }
}
