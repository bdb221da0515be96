// The socket, its server and its client, also with peers that mean harm.
#include "vm/control/server.hpp"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "vm/control/client.hpp"

namespace lodge::vm::control {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class ControlTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* before = std::getenv("XDG_RUNTIME_DIR");
    if (before) runtime_before_ = before;
    ::setenv("XDG_RUNTIME_DIR", directory.path().c_str(), 1);
  }
  void TearDown() override {
    runtime_before_.empty() ? ::unsetenv("XDG_RUNTIME_DIR")
                            : ::setenv("XDG_RUNTIME_DIR", runtime_before_.c_str(), 1);
  }
  std::unique_ptr<Server> serve() {
    return std::make_unique<Server>(std::make_unique<Listener>(path), "1",
                                    [this](const Request& request) -> Json {
                                      calls++;
                                      if (request.command == "echo") return Json(request.arguments);
                                      if (request.command == "large") return std::string(100'000, 'x');
                                      if (request.command == "broken") throw std::runtime_error("no memory");
                                      throw CommandError("unknown", "CommandNotFound");
                                    });
  }
  // All that comes until the peer closes, or for `patience` nothing.
  static std::string read_all(const Fd& fd, int patience_ms) {
    std::string all;
    std::array<char, 4096> piece;
    for (pollfd waiting{fd.get(), POLLIN, 0}; ::poll(&waiting, 1, patience_ms) > 0;) {
      const ssize_t count = ::recv(fd.get(), piece.data(), piece.size(), 0);
      if (count <= 0) break;
      all.append(piece.data(), static_cast<size_t>(count));
    }
    return all;
  }
  static void send(const Fd& fd, const std::string& text) {
    ASSERT_EQ(::send(fd.get(), text.data(), text.size(), MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
  }

  static constexpr int long_ms = 60'000;
  TemporaryDirectory directory;
  std::string path = directory / "machine.sock";
  std::atomic<unsigned> calls = 0;

 private:
  std::string runtime_before_;
};

TEST_F(ControlTest, ACommandIsAnsweredAndItsRefusalTold) {
  const auto server = serve();
  Client client(path);
  EXPECT_EQ(client.execute("echo", {{"a", "b"}}), (Json{{"a", "b"}}));
  for (const char* name : {"what", "broken"}) EXPECT_THROW(client.execute(name), CommandError);
  EXPECT_EQ(client.execute("large").get<std::string>().size(), 100'000u);
}

TEST_F(ControlTest, TheOwnerAloneMayUseTheSocketAndItGoesWithTheServer) {
  {
    const auto server = serve();
    struct stat info {};
    ASSERT_EQ(::lstat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u);
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_THROW(Client{path}, UsageError);
}

TEST_F(ControlTest, ADeadSocketIsReplacedAndALiveOneIsNot) {
  {
    Listener dead(path);
    ASSERT_EQ(::rename(path.c_str(), (directory / "kept").c_str()), 0);
  }
  ASSERT_EQ(::rename((directory / "kept").c_str(), path.c_str()), 0);
  const Listener alive(path);
  EXPECT_THROW(Listener{path}, UsageError);
}

TEST_F(ControlTest, AFileThatIsNoSocketIsLeftAlone) {
  std::ofstream(path) << "precious";
  EXPECT_THROW(Listener{path}, UsageError);
  EXPECT_TRUE(std::filesystem::exists(path));
  EXPECT_THROW(Listener{directory / "none/machine.sock"}, UsageError);
  EXPECT_THROW(Listener{directory / std::string(200, 'x')}, UsageError);
}

TEST_F(ControlTest, NamesLeadToTheDirectoryOfTheUser) {
  EXPECT_EQ(path_of("web"), directory / "lodge/web.sock");
  EXPECT_EQ(path_of("./web"), "./web");
  for (const char* name : {"", ".hidden", "a b", "ä"}) EXPECT_THROW(socket_path(name), UsageError) << name;
  EXPECT_TRUE(named_sockets().empty());
  socket_directory(true);
  {
    const Listener web(socket_path("web")), db(socket_path("db"));
    const auto found = named_sockets();
    ASSERT_EQ(found.size(), 2u);
    EXPECT_EQ(found[0].name, "db");
    // As a killed machine leaves it behind.
    ASSERT_EQ(::rename(db.path().c_str(), socket_path("killed").c_str()), 0);
  }
  EXPECT_TRUE(named_sockets().empty());
  EXPECT_FALSE(std::filesystem::exists(socket_path("killed")));
}

TEST_F(ControlTest, ADirectoryThatOthersMayEnterIsRefused) {
  ASSERT_EQ(::mkdir((directory / "lodge").c_str(), 0700), 0);
  ASSERT_EQ(::chmod((directory / "lodge").c_str(), 0755), 0);
  EXPECT_THROW(socket_directory(true), UsageError);
}

TEST_F(ControlTest, GarbageIsAnsweredLineByLine) {
  const auto server = serve();
  const Fd peer = connect_to(path);
  send(peer, "\n\n\x01\xff\n{\"execute\":\n[[[[\n{\"execute\":\"echo\",\"id\":[1]}\n");
  ::shutdown(peer.get(), SHUT_WR);
  const std::string all = read_all(peer, long_ms);
  EXPECT_THAT(all, StartsWith("{\"QMP\""));
  EXPECT_THAT(all, HasSubstr("{\"return\":{},\"id\":[1]}\n"));
  EXPECT_EQ(std::ranges::count(all, '\n'), 5);  // the greeting, three refusals, the answer
  EXPECT_EQ(calls, 1u);
}

TEST_F(ControlTest, ALineWithoutEndIsCutOff) {
  const auto server = serve();
  const Fd peer = connect_to(path);
  const std::string piece(10'000, '{');
  // It may be closed before all of it is sent.
  for (int i = 0; i < 100; i++)
    if (::send(peer.get(), piece.data(), piece.size(), MSG_NOSIGNAL) < 0) break;
  EXPECT_THAT(read_all(peer, long_ms), HasSubstr("too long"));
  EXPECT_NO_THROW(Client(path).execute("echo"));
}

// Whoever does not read is not served further, and the others are.
TEST_F(ControlTest, APeerThatDoesNotReadHoldsNobodyUp) {
  const auto server = serve();
  const Fd peer = connect_to(path);
  ASSERT_EQ(::fcntl(peer.get(), F_SETFL, O_NONBLOCK), 0);
  const std::string request = "{\"execute\":\"large\"}\n";
  Client client(path);
  for (int i = 0; i < 2000; i++)
    std::ignore = ::send(peer.get(), request.data(), request.size(), MSG_NOSIGNAL);
  for (int i = 0; i < 20; i++) EXPECT_NO_THROW(client.execute("echo"));
  // What it takes up: its answers so far, and what the kernel holds between us.
  EXPECT_LT(calls, 20u + 20u);
}

TEST_F(ControlTest, TooManyPeersAreToldSo) {
  const auto server = serve();
  std::vector<std::unique_ptr<Client>> clients;
  for (size_t i = 0; i < max_connections; i++) clients.push_back(std::make_unique<Client>(path));
  EXPECT_THROW(Client{path}, CommandError);
  clients.pop_back();
  // The server notices that the last has gone before it accepts the next.
  for (int i = 0; i < 100 && clients.size() < max_connections; i++) try {
      clients.push_back(std::make_unique<Client>(path));
    } catch (const CommandError&) {
      ::usleep(10'000);
    }
  EXPECT_EQ(clients.size(), max_connections);
}

TEST_F(ControlTest, AClientGivesUpOnAPeerThatSaysNothing) {
  const Listener silent(path);
  EXPECT_THROW(Client(path, 50), CommandError);
}

}  // namespace
}  // namespace lodge::vm::control
