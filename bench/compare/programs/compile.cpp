// A parallel compile: ITERATIONS times a compiler on one of UNITS files, WORKERS at a time:
//   compile ITERATIONS WORKERS UNITS DIRECTORY COMPILER ARGUMENT...
// The compiler is given "unitN.c -o outM.o" more. The checksum is of all objects, so the compiler's output
// must be the same on all sides.
#include <algorithm>
#include <string>
#include <vector>

#include "child.hpp"

namespace {

struct Build {
  uint64_t workers, units;
  std::vector<char*> compiler;

  int compile(uint64_t job) const {
    std::string source = "unit" + std::to_string(job % units) + ".c", option = "-o", object = name(job);
    std::vector<char*> arguments = compiler;
    for (std::string* word : {&source, &option, &object}) arguments.push_back(word->data());
    arguments.push_back(nullptr);
    execv(arguments[0], arguments.data());
    return 255;
  }
  static std::string name(uint64_t job) { return "out" + std::to_string(job) + ".o"; }
};

void wait_for_one() {
  int status = 0;
  if (wait(&status) < 0) compare::fail("wait");
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    std::fprintf(stderr, "a compiler failed: status %#x\n", static_cast<unsigned>(status));
    std::exit(1);
  }
}

void add_object(compare::Checksum& sum, const std::string& name) {
  std::FILE* const file = std::fopen(name.c_str(), "rb");
  if (!file) compare::fail(name.c_str());
  for (int byte; (byte = std::fgetc(file)) != EOF;) sum.add(static_cast<uint64_t>(byte));
  std::fclose(file);
}

uint64_t run(const Build& build, uint64_t jobs) {
  for (uint64_t job = 0; job < jobs; job++) {
    if (job >= build.workers) wait_for_one();
    compare::start_child([&] { return build.compile(job); });
  }
  for (uint64_t job = 0; job < std::min(jobs, build.workers); job++) wait_for_one();
  compare::Checksum sum;
  for (uint64_t job = 0; job < std::min(jobs, build.units); job++) add_object(sum, Build::name(job));
  sum.add(jobs);
  return sum.value();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: %s ITERATIONS WORKERS UNITS DIRECTORY COMPILER ARGUMENT...\n", argv[0]);
    return 2;
  }
  const Build build = {
      std::strtoull(argv[2], nullptr, 10), std::strtoull(argv[3], nullptr, 10), {argv + 5, argv + argc}};
  if (chdir(argv[4]) != 0) compare::fail("chdir");
  return compare::measure("compile", argc, argv, [&](uint64_t iterations) { return run(build, iterations); });
}
