// A shared folder under a hostile guest: the input becomes FUSE requests, mostly well formed, on few nodes,
// files and names. Nothing outside the folder may change, and saved state must load as the same again.
#include <fcntl.h>
#include <sys/stat.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "input.hpp"
#include "share/testing.hpp"

namespace {

namespace fs = std::filesystem;
using namespace lodge::share;
using testing::bytes_of;

class Input : public lodge::fuzz::Bytes {
 public:
  using Bytes::Bytes;
  uint64_t number() {  // mostly small
    const uint8_t first = byte();
    if (first < 240) return first % 12;
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) value = value << 8 | byte();
    return value;
  }
  std::string name() {
    static constexpr std::array names = {"a",
                                         "b",
                                         "file",
                                         "dir",
                                         "link",
                                         "up",
                                         "..",
                                         ".",
                                         "",
                                         "dir/inner",
                                         "/",
                                         "inner",
                                         "../outside/canary",
                                         "canary",
                                         "n",
                                         "m"};
    return testing::name(names[byte() % names.size()]);
  }
  std::string bytes(size_t count) {
    std::string out;
    while (out.size() < count) out += static_cast<char>(byte());
    return out;
  }
};

class Playground {
 public:
  Playground() {
    std::string pattern = fs::temp_directory_path() / "lodge-share-fuzz-XXXXXX";
    top_ = ::mkdtemp(pattern.data());
  }
  ~Playground() { fs::remove_all(top_); }
  std::string set_up() {
    for (const auto& entry : fs::directory_iterator(top_)) fs::remove_all(entry);
    fs::create_directories(top_ / "outside");
    fs::create_directories(shared() / "dir");
    std::ofstream(top_ / "outside/canary") << "alive";
    std::ofstream(shared() / "file") << "contents";
    std::ofstream(shared() / "dir/inner") << "inner";
    fs::create_symlink("../outside", shared() / "up");
    fs::create_symlink(top_ / "outside/canary", shared() / "link");
    return shared();
  }
  void check() const {
    std::string text;
    std::getline(std::ifstream(top_ / "outside/canary") >> std::ws, text);
    size_t beside = 0, outside = 0;
    for ([[maybe_unused]] const auto& entry : fs::directory_iterator(top_)) beside++;
    for ([[maybe_unused]] const auto& entry : fs::directory_iterator(top_ / "outside")) outside++;
    struct stat status {};
    ::stat((top_ / "outside/canary").c_str(), &status);
    if (text != "alive" || beside != 2 || outside != 1 || status.st_nlink != 1) std::abort();
  }

 private:
  fs::path shared() const { return top_ / "shared"; }
  fs::path top_;
};

std::string body_of(uint32_t opcode, Input& input) {
  switch (opcode) {
    case FUSE_LOOKUP:
    case FUSE_UNLINK:
    case FUSE_RMDIR: return input.name();
    case FUSE_FORGET: return bytes_of(fuse_forget_in{input.number()});
    case FUSE_GETATTR: return bytes_of(fuse_getattr_in{input.byte(), 0, input.number()});
    case FUSE_SETATTR: {
      fuse_setattr_in in{};
      in.valid = static_cast<uint32_t>(input.byte() | input.byte() << 8), in.fh = input.number();
      in.size = input.number(), in.mode = 0600u | input.byte(), in.atimensec = input.byte();
      in.valid &= ~uint32_t{FATTR_UID | FATTR_GID | FATTR_SIZE} | (in.size < 4096 ? FATTR_SIZE : 0);
      return bytes_of(in);
    }
    case FUSE_SYMLINK: return input.name() + input.name();
    case FUSE_MKNOD:
      return bytes_of(fuse_mknod_in{uint32_t{input.byte()} << 8 | 0600, 0, 0, 0}) + input.name();
    case FUSE_MKDIR: return bytes_of(fuse_mkdir_in{0700u | input.byte(), 0}) + input.name();
    case FUSE_RENAME2:
      return bytes_of(fuse_rename2_in{input.number(), input.byte() % 4u, 0}) + input.name() + input.name();
    case FUSE_LINK: return bytes_of(fuse_link_in{input.number()}) + input.name();
    case FUSE_OPEN:
    case FUSE_OPENDIR:
      return bytes_of(fuse_open_in{input.byte() % 3u | (input.byte() & 1u ? O_TRUNC : 0u), 0});
    case FUSE_CREATE: return bytes_of(fuse_create_in{input.byte() % 3u | O_CREAT, 0644, 0, 0}) + input.name();
    case FUSE_READ:
    case FUSE_READDIR:
    case FUSE_READDIRPLUS: {
      fuse_read_in in{};
      in.fh = input.number(), in.offset = input.number(), in.size = input.byte() * 16u;
      return bytes_of(in);
    }
    case FUSE_WRITE: {
      fuse_write_in in{};
      in.fh = input.number(), in.offset = input.number() % 4096, in.size = input.byte();
      return bytes_of(in) + input.bytes(in.size % 64);
    }
    case FUSE_RELEASE: {
      fuse_release_in in{};
      in.fh = input.number();
      return bytes_of(in);
    }
    default: return input.bytes(input.byte());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Playground playground;
  constexpr std::array<uint32_t, 24> opcodes = {
      FUSE_LOOKUP,  FUSE_LOOKUP,  FUSE_FORGET, FUSE_GETATTR, FUSE_SETATTR,     FUSE_READLINK,
      FUSE_SYMLINK, FUSE_MKNOD,   FUSE_MKDIR,  FUSE_UNLINK,  FUSE_RMDIR,       FUSE_RENAME2,
      FUSE_LINK,    FUSE_OPEN,    FUSE_READ,   FUSE_WRITE,   FUSE_RELEASE,     FUSE_INIT,
      FUSE_OPENDIR, FUSE_READDIR, FUSE_CREATE, FUSE_LSEEK,   FUSE_READDIRPLUS, FUSE_BATCH_FORGET};
  const auto folder = std::make_shared<Folder>(playground.set_up());
  const FuseServer::Config config{false, owners_of_process("", "0:0"), 6};
  FuseServer server(folder, config), twin(folder, config);
  testing::FakeGuest guest(server);
  guest.init();
  Input input({data, size});
  for (int step = 0; step < 200 && !input.empty(); step++) {
    const uint8_t choice = input.byte();
    const uint32_t opcode = choice < 240 ? opcodes[choice % opcodes.size()] : input.byte();
    if (opcode == FUSE_SYNCFS) continue;  // slow, and says nothing
    const uint64_t node = input.number();
    guest.ask(opcode, node, body_of(opcode, input), input.byte() < 250 ? 4096 : input.byte());
  }
  playground.check();
  nlohmann::json first, second;
  server.save(first);
  twin.load(first);
  twin.save(second);
  if (first != second) std::abort();
  return 0;
}
