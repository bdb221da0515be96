// The guest's part of tests/durability: writes numbered blocks to a disk and says which are on stable
// storage.
//
//   writer DEVICE STREAMS PLACES FIRST [CRASH_MS]
//
// STREAMS processes write at the same time, each to PLACES blocks of its own. Record n of stream s goes to
// place (n * step) % PLACES of the stream; after one to eight records the process calls fdatasync and prints
// "ack S N", N being the last record. Numbers start at FIRST and never come again, so that a block tells
// which write it is. After CRASH_MS milliseconds the kernel is made to crash. durability.py is the other
// half.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr uint64_t block = 4096, words = block / 8, step = 5167, magic = 0x6c6f6467652d6475;
constexpr unsigned group = 8;

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

// Every word depends on stream and number: half a block is seen as such.
void fill(std::array<uint64_t, words>& data, uint64_t stream, uint64_t number) {
  data[0] = magic, data[1] = stream, data[2] = number;
  uint64_t state = (number + 1) * 0x9e37'79b9'7f4a'7c15 ^ (stream + 1);
  for (uint64_t i = 3; i < words; i++) data[i] = next_random(state);
}

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

[[noreturn]] void write_stream(const char* device, uint64_t stream, uint64_t places, uint64_t number) {
  alignas(block) static std::array<uint64_t, words> data;
  const int disk = ::open(device, O_RDWR | O_DIRECT);
  if (disk < 0) fail(device);
  uint64_t state = number * 31 + stream + 1;
  for (;;) {
    for (uint64_t left = 1 + next_random(state) % group; left != 0; left--, number++) {
      fill(data, stream, number);
      const uint64_t place = stream * places + number * step % places;
      if (::pwrite(disk, data.data(), block, static_cast<off_t>(place * block)) !=
          static_cast<ssize_t>(block))
        fail("pwrite");
    }
    if (::fdatasync(disk) != 0) fail("fdatasync");
    std::array<char, 64> line;
    const int length =
        std::snprintf(line.data(), line.size(), "ack %llu %llu\n", static_cast<unsigned long long>(stream),
                      static_cast<unsigned long long>(number - 1));
    if (::write(1, line.data(), static_cast<size_t>(length)) != length) fail("write");
  }
}

[[noreturn]] void crash_after(long milliseconds) {
  ::usleep(static_cast<useconds_t>(milliseconds) * 1000);
  const int trigger = ::open("/proc/sysrq-trigger", O_WRONLY);
  if (trigger < 0 || ::write(trigger, "c", 1) != 1) fail("/proc/sysrq-trigger");
  std::exit(1);  // it does not come here
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) return 2;
  const auto number = [&](int i) { return std::strtoull(arguments[i], nullptr, 10); };
  for (uint64_t stream = 0; stream < number(2); stream++)
    if (::fork() == 0) write_stream(arguments[1], stream, number(3), number(4));
  if (count > 5) crash_after(static_cast<long>(number(5)));
  ::wait(nullptr);  // only an error ends a stream
  return 1;
}
