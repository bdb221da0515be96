// Disk images side by side: Lodge's qcow2 against its raw, and both against `qemu-img bench` doing the same
// requests in the same order (it knows only fixed steps, so the random cases are Lodge's alone). The page
// cache is warm for all. Rounds alternate; the minimum counts.
#include <fcntl.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <semaphore>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "block/qcow2/create.hpp"
#include "block/storage.hpp"
#include "support/process.hpp"

namespace {

using namespace lodge;
using namespace lodge::block;

constexpr uint64_t disk_size = 512 << 20;
constexpr unsigned depth = 64;

struct Case {
  const char* name;
  uint64_t size;  // of a request
  uint64_t step;  // between requests; 0: random
  unsigned count;
  bool write;
  bool fresh;  // nothing is allocated yet
  unsigned flush_every = 0;
};

constexpr Case cases[] = {
    {"read 4K in order", 4096, 4096, 100000, false, false},
    {"read 4K random", 4096, 0, 100000, false, false},
    {"read 1M in order", 1 << 20, 1 << 20, 1000, false, false},
    {"write 4K in order", 4096, 4096, 60000, true, false},
    {"write 4K random", 4096, 0, 60000, true, false},
    {"write 1M in order", 1 << 20, 1 << 20, 500, true, false},
    {"allocate 4K in order", 4096, 4096, 60000, true, true},
    {"allocate 4K apart", 4096, 68 << 10, 7000, true, true},
    {"allocate 1M in order", 1 << 20, 1 << 20, 500, true, true},
    {"write 4K, flush every 64", 4096, 4096, 4000, true, false, 64},
    {"allocate 4K apart, flush every 64", 4096, 68 << 10, 4000, true, true, 64},
};

void require(int error, const char* what) {
  if (error) throw_errno(error, what);
}

void make(const std::string& path, bool qcow2, bool fresh) {
  std::filesystem::remove(path);
  FileStorage storage(Fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), path, Use::write,
                      make_engine(Engine::threads));
  if (qcow2) {
    qcow2::CreateOptions options;
    options.size = disk_size;
    qcow2::create(storage, options);
  } else {
    require(storage.truncate(disk_size), "truncate");
  }
  if (fresh) return;
  const auto image = open_image(path, {.format = qcow2 ? "qcow2" : "raw"});
  const std::vector<uint8_t> data(1 << 20, 0x5a);
  for (uint64_t at = 0; at < disk_size; at += data.size())
    require(write(*image, data.data(), data.size(), at), "write");
  require(image->close(), "close");
}

double lodge_seconds(const Case& c, const std::string& path, bool qcow2, Engine engine) {
  OpenOptions options;
  options.format = qcow2 ? "qcow2" : "raw";
  options.engine = engine;
  const auto image = open_image(path, options);
  std::vector<uint8_t> data(c.size, 0xa5);
  const iovec buffer{data.data(), data.size()};
  std::counting_semaphore<depth> free(depth);
  std::mt19937_64 random(1);
  std::atomic<int> failed = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (unsigned i = 0; i < c.count; i++) {
    const uint64_t places = disk_size / c.size;
    const uint64_t at =
        c.step ? i * c.step % (disk_size - c.size + 1) / 512 * 512 : random() % places * c.size;
    free.acquire();
    const auto done = [&](int error) {
      if (error) failed = error;
      free.release();
    };
    if (c.write)
      image->write({&buffer, 1}, at, done);
    else
      image->read({&buffer, 1}, at, done);
    if (c.flush_every && (i + 1) % c.flush_every == 0) require(flush(*image), "flush");
  }
  for (unsigned i = 0; i < depth; i++) free.acquire();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  require(failed, "request");
  require(image->close(), "close");
  return seconds.count();
}

// Its own measure, without its start and end.
double qemu_seconds(const Case& c, const std::string& path, bool qcow2, const std::string& aio) {
  std::vector<std::string> arguments{"/usr/bin/qemu-img",
                                     "bench",
                                     "-f",
                                     qcow2 ? "qcow2" : "raw",
                                     "-c",
                                     std::to_string(c.count),
                                     "-d",
                                     std::to_string(depth),
                                     "-s",
                                     std::to_string(c.size),
                                     "-S",
                                     std::to_string(c.step),
                                     "-i",
                                     aio};
  if (c.write) arguments.emplace_back("-w");
  if (c.flush_every) arguments.push_back(fmt::format("--flush-interval={}", c.flush_every));
  arguments.push_back(path);
  const auto result = testing_support::run(arguments, testing_support::Seconds(120));
  const auto at = result.out.find("completed in ");
  if (result.status != 0 || at == std::string::npos) throw std::runtime_error(result.out + result.err);
  return std::stod(result.out.substr(at + 13));
}

using Results = std::map<std::string, double>;

Results measure(const Case& c, const std::string& directory, unsigned rounds, Engine engine) {
  Results best;
  const auto keep = [&](const std::string& name, double seconds) {
    auto [it, added] = best.emplace(name, seconds);
    if (!added) it->second = std::min(it->second, seconds);
  };
  const bool qemu = std::filesystem::exists("/usr/bin/qemu-img") && c.step != 0;
  for (unsigned round = 0; round < rounds; round++) {
    for (const bool qcow2 : {false, true}) {
      const std::string path = directory + (qcow2 ? "/qcow2" : "/raw"), kind = qcow2 ? "qcow2" : "raw";
      const auto prepare = [&] {
        if (c.fresh || round == 0) make(path, qcow2, c.fresh);
      };
      prepare();
      keep("lodge " + kind, lodge_seconds(c, path, qcow2, engine));
      if (!qemu) continue;
      for (const char* aio : {"threads", "io_uring"}) {
        prepare();
        keep("qemu " + kind, qemu_seconds(c, path, qcow2, aio));  // the better of the two
      }
    }
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Disk images side by side: Lodge's raw and qcow2, and qemu-img bench");
  unsigned rounds = 3;
  std::string only, directory = "/var/tmp";
  bool json = false, threads = false;
  app.add_flag("--threads", threads, "Lodge without io_uring");
  app.add_option("--rounds", rounds, "the minimum of so many")->capture_default_str();
  app.add_option("--only", only, "cases whose name contains this");
  app.add_option("--directory", directory, "where the images are made")->capture_default_str();
  app.add_flag("--json", json, "print JSON");
  CLI11_PARSE(app, argc, argv);
  try {
    ::setenv("TMPDIR", directory.c_str(), 1);
    const TemporaryDirectory temporary;
    nlohmann::json report = nlohmann::json::array();
    if (!json)
      fmt::print("{:<36} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}\n", "requests a second", "raw", "qcow2",
                 "qcow2/raw", "qemu raw", "qemu qcow2", "lodge/qemu");
    for (const auto& c : cases) {
      if (std::string(c.name).find(only) == std::string::npos) continue;
      const Results seconds =
          measure(c, temporary / "", rounds, threads ? Engine::threads : Engine::automatic);
      const auto rate = [&](const char* name) {
        const auto it = seconds.find(name);
        return it == seconds.end() ? 0.0 : c.count / it->second;
      };
      const double raw = rate("lodge raw"), qcow2 = rate("lodge qcow2"), qemu = rate("qemu qcow2");
      report.push_back({{"case", c.name},
                        {"raw", raw},
                        {"qcow2", qcow2},
                        {"qemu_raw", rate("qemu raw")},
                        {"qemu_qcow2", qemu}});
      if (!json)
        fmt::print("{:<36} {:>10.0f} {:>10.0f} {:>10.2f} {:>10.0f} {:>10.0f} {:>10.2f}\n", c.name, raw, qcow2,
                   qcow2 / raw, rate("qemu raw"), qemu, qemu > 0 ? qcow2 / qemu : 0.0);
      std::fflush(stdout);
    }
    if (json) fmt::print("{}\n", report.dump(2));
  } catch (const std::exception& error) {
    fmt::print(stderr, "image_bench: {}\n", error.what());
    return 1;
  }
  return 0;
}
