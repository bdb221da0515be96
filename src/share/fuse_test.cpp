#include "share/fuse.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "share/testing.hpp"

namespace lodge::share {
namespace {

namespace fs = std::filesystem;
using testing::bytes_of;
using testing::FakeGuest;
using testing::name;

constexpr uint64_t root = Nodes::root;

using Clock = std::chrono::steady_clock;

// outside/secret lies beside the shared folder.
class FuseTest : public ::testing::Test {
 protected:
  FuseTest() {
    fs::create_directories(shared);
    fs::create_directories(top / "outside");
    put("outside/secret", "secret");
    put("shared/file", "contents");
    fs::create_directories(shared / "dir");
    put("shared/dir/inner", "inner");
    server.emplace(std::make_shared<Folder>(shared), config);
    guest.emplace(*server);
    EXPECT_EQ(guest->init().error, 0);
  }

  void put(const std::string& path, const std::string& text) { std::ofstream(top / path) << text; }
  std::string text(const std::string& path) {
    std::ifstream file(top / path);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  uint64_t look(const std::string& path) {
    uint64_t node = root;
    for (const auto& part : fs::path(path)) node = guest->lookup(node, part).node();
    return node;
  }
  uint64_t open(uint64_t node, uint32_t flags) { return guest->open(node, flags).as<fuse_open_out>().fh; }
  std::string read(uint64_t node, uint64_t fh, uint64_t offset = 0, uint32_t size = 4096) {
    const auto answer = guest->read(node, fh, offset, size);
    return {answer.body.begin(), answer.body.end()};
  }
  // Name to node of all that a directory holds, asked for in small portions.
  std::map<std::string, uint64_t> list(uint64_t node, bool plus, uint32_t portion = 700) {
    std::map<std::string, uint64_t> names;
    const uint64_t fh = guest->ask(FUSE_OPENDIR, node, bytes_of(fuse_open_in{})).as<fuse_open_out>().fh;
    for (uint64_t offset = 0;;) {
      const auto answer = guest->read(node, fh, offset, portion, plus ? FUSE_READDIRPLUS : FUSE_READDIR);
      EXPECT_EQ(answer.error, 0);
      if (answer.body.empty()) break;
      for (size_t at = 0; at < answer.body.size();) {
        fuse_entry_out entry{};
        if (plus) std::memcpy(&entry, answer.body.data() + at, sizeof entry), at += sizeof entry;
        fuse_dirent dirent{};
        std::memcpy(&dirent, answer.body.data() + at, sizeof dirent);
        names[std::string(reinterpret_cast<const char*>(answer.body.data() + at + sizeof dirent),
                          dirent.namelen)] = entry.nodeid;
        at += FUSE_REC_ALIGN(sizeof dirent + dirent.namelen);
        offset = dirent.off;
      }
    }
    EXPECT_EQ(guest->release(node, fh).error, 0);
    return names;
  }

  TemporaryDirectory directory;
  const fs::path top = directory.path(), shared = top / "shared";
  FuseServer::Config config{false, owners_of_process("owner", "0:0"), 8};
  std::optional<FuseServer> server;
  std::optional<FakeGuest> guest;
};

TEST_F(FuseTest, FilesAreReadAndWritten) {
  const uint64_t file = look("file");
  EXPECT_EQ(guest->get(file).as<fuse_attr_out>().attr.size, 8u);
  const uint64_t fh = open(file, O_RDWR);
  EXPECT_EQ(read(file, fh), "contents");
  EXPECT_EQ(read(file, fh, 4, 2), "en");
  EXPECT_EQ(read(file, fh, 100), "");
  std::string large(300'000, 'x');
  for (size_t i = 0; i < large.size(); i++) large[i] = static_cast<char>('a' + i % 23);
  EXPECT_EQ(guest->write(file, fh, 3, large).as<fuse_write_out>().size, large.size());
  EXPECT_EQ(text("shared/file"), "con" + large);
  EXPECT_EQ(read(file, fh, 3, 300'000), large);
  EXPECT_EQ(guest->ask(FUSE_FSYNC, file, bytes_of(fuse_fsync_in{fh, 0, 0})).error, 0);
  fuse_setattr_in size{};
  size.valid = FATTR_SIZE, size.size = 5;
  EXPECT_EQ(guest->set(file, size).as<fuse_attr_out>().attr.size, 5u);
  EXPECT_EQ(text("shared/file"), "con" + large.substr(0, 2));
  EXPECT_EQ(open(file, O_RDWR | O_TRUNC), fh + 1);
  EXPECT_EQ(text("shared/file"), "");
  EXPECT_EQ(guest->release(file, fh).error, 0);
  EXPECT_EQ(guest->read(file, fh, 0, 10).error, EBADF);
}

TEST_F(FuseTest, ATreeIsMadeMovedAndRemoved) {
  const uint64_t dir = guest->mkdir(root, "new").node();
  EXPECT_EQ(guest->mkdir(root, "new").error, EEXIST);
  const auto made = guest->create(dir, "script", O_WRONLY | O_EXCL, 0777);
  ASSERT_EQ(made.error, 0);
  uint64_t fh = 0;
  std::memcpy(&fh, made.body.data() + sizeof(fuse_entry_out), sizeof fh);
  EXPECT_EQ(guest->write(made.node(), fh, 0, "#!").error, 0);
  // Exactly the mode that was asked for, whatever this process's umask is.
  EXPECT_EQ(fs::status(shared / "new/script").permissions(), fs::perms(0777));
  EXPECT_EQ(guest->create(dir, "script", O_WRONLY | O_EXCL, 0644).error, EEXIST);
  EXPECT_EQ(guest->create(dir, "script", O_WRONLY, 0644).node(), made.node());
  EXPECT_EQ(guest->rename(root, "new", look("dir"), "moved").error, 0);
  EXPECT_EQ(text("shared/dir/moved/script"), "#!");
  EXPECT_EQ(guest->get(made.node()).error, 0);  // the node has moved with its directory
  EXPECT_EQ(guest->rename(root, "file", root, "dir", RENAME_NOREPLACE).error, EEXIST);
  EXPECT_EQ(guest->ask(FUSE_LINK, root, bytes_of(fuse_link_in{made.node()}) + name("hard")).node(),
            made.node());
  EXPECT_EQ(guest->ask(FUSE_RMDIR, look("dir"), name("moved")).error, ENOTEMPTY);
  EXPECT_EQ(guest->ask(FUSE_UNLINK, look("dir/moved"), name("script")).error, 0);
  EXPECT_EQ(guest->ask(FUSE_RMDIR, look("dir"), name("moved")).error, 0);
  EXPECT_EQ(guest->lookup(root, "hard").node(), made.node());
  EXPECT_EQ(text("shared/hard"), "#!");
  EXPECT_FALSE(fs::exists(shared / "dir/moved"));
}

TEST_F(FuseTest, ExchangedAndReplacedFilesKeepTheirNodes) {
  put("shared/other", "other");
  const uint64_t file = look("file"), other = look("other");
  EXPECT_EQ(guest->rename(root, "file", root, "other", RENAME_EXCHANGE).error, 0);
  EXPECT_EQ(read(file, open(file, O_RDONLY)), "contents");
  EXPECT_EQ(read(other, open(other, O_RDONLY)), "other");
  EXPECT_EQ(guest->lookup(root, "other").node(), file);
  EXPECT_EQ(guest->rename(root, "file", root, "other").error, 0);
  EXPECT_EQ(guest->lookup(root, "other").node(), other);
  EXPECT_EQ(guest->lookup(root, "file").error, ENOENT);
}

TEST_F(FuseTest, AnOpenFileWithoutANameLivesOn) {
  const uint64_t file = look("file"), fh = open(file, O_RDWR);
  EXPECT_EQ(guest->ask(FUSE_UNLINK, root, name("file")).error, 0);
  EXPECT_EQ(guest->get(file).as<fuse_attr_out>().attr.nlink, 0u);
  EXPECT_EQ(read(file, fh), "contents");
  fuse_setattr_in mode{};
  mode.valid = FATTR_MODE, mode.mode = 0600;
  EXPECT_EQ(guest->set(file, mode).error, 0);
  EXPECT_EQ(guest->release(file, fh).error, 0);
  EXPECT_EQ(guest->get(file).error, ESTALE);
}

TEST_F(FuseTest, DirectoriesAreListedInPortions) {
  for (int i = 0; i < 100; i++) put("shared/dir/" + std::to_string(i), "");
  const auto names = list(look("dir"), false);
  EXPECT_EQ(names.size(), 103u);  // with ".", ".." and "inner"
  const size_t known = server->known_nodes();
  const auto plus = list(look("dir"), true);
  EXPECT_EQ(plus.size(), 103u);
  EXPECT_EQ(plus.at("."), 0u);
  EXPECT_EQ(plus.at("inner"), look("dir/inner"));
  EXPECT_EQ(server->known_nodes(), known + 101);
  for (const auto& [entry, node] : plus)
    if (node != 0) guest->forget(node, 10);
  EXPECT_EQ(server->known_nodes(), known);
}

TEST_F(FuseTest, AttributesChange) {
  const uint64_t file = look("file");
  fuse_setattr_in in{};
  in.valid = FATTR_MODE | FATTR_MTIME | FATTR_ATIME | FATTR_ATIME_NOW;
  in.mode = S_IFREG | 0640, in.mtime = 1'000'000'000, in.mtimensec = 5;
  const auto attr = guest->set(file, in).as<fuse_attr_out>().attr;
  EXPECT_EQ(attr.mode, uint32_t{S_IFREG | 0640});
  EXPECT_EQ(attr.mtime, 1'000'000'000u);
  EXPECT_EQ(attr.mtimensec, 5u);
  EXPECT_GT(attr.atime, 1'500'000'000u);
  EXPECT_GT(guest->ask(FUSE_STATFS, root, "").as<fuse_statfs_out>().st.blocks, 0u);
}

TEST_F(FuseTest, WithoutRootOwnersAreMapped) {
  // What config_.owners says, whoever runs this test.
  FuseServer::Config mapped = config;
  mapped.owners = {true, ::geteuid(), ::getegid(), 1000, 1001};
  FuseServer other(std::make_shared<Folder>(shared), mapped);
  FakeGuest person(other);
  person.uid = 7;
  ASSERT_EQ(person.init().error, 0);
  const auto attr = person.mkdir(root, "mine").as<fuse_entry_out>();
  EXPECT_EQ(attr.attr.uid, 1000u);
  EXPECT_EQ(attr.attr.gid, 1001u);
  fuse_setattr_in in{};
  in.valid = FATTR_UID | FATTR_GID, in.uid = 1000, in.gid = 1001;
  EXPECT_EQ(person.set(attr.nodeid, in).error, 0);
  in.uid = 0;
  EXPECT_EQ(person.set(attr.nodeid, in).error, EPERM);
  EXPECT_THROW(owners_of_process("owner", "me"), UsageError);
  EXPECT_THROW(owners_of_process("owner", "1:2:3"), UsageError);
  for (const char* wrong :
       {"-1:0", "0:-1", "1", "1:", ":1", " 1:1", "4294967295:0", "0:4294967295", "4294967296:0"})
    EXPECT_THROW(owners_of_process("owner", wrong), UsageError) << wrong;
  EXPECT_EQ(owners_of_process("owner", "4294967294:0").guest_uid, 4294967294u);
}

TEST_F(FuseTest, NothingOutsideIsReached) {
  fs::create_symlink("../outside", shared / "up");
  fs::create_symlink(top / "outside", shared / "absolute");
  fs::create_symlink("/proc/self/root", shared / "magic");
  for (const char* text : {"..", ".", "", "dir/inner", "../outside", "/", "/etc"})
    EXPECT_EQ(guest->lookup(root, text).error, EINVAL) << text;
  EXPECT_EQ(guest->create(root, "../outside/new", O_WRONLY, 0644).error, EINVAL);
  EXPECT_EQ(guest->rename(root, "file", root, "../outside/file").error, EINVAL);
  EXPECT_EQ(guest->lookup(root, std::string(256, 'n')).error, ENAMETOOLONG);
  for (const char* link : {"up", "absolute", "magic"}) {
    const auto entry = guest->lookup(root, link).as<fuse_entry_out>();
    EXPECT_EQ(entry.attr.mode & S_IFMT, uint32_t{S_IFLNK});
    EXPECT_NE(guest->lookup(entry.nodeid, "secret").error, 0) << link;
    EXPECT_NE(guest->create(entry.nodeid, "new", O_WRONLY, 0644).error, 0) << link;
    EXPECT_NE(guest->open(entry.nodeid, O_RDONLY).error, 0) << link;
    EXPECT_NE(guest->ask(FUSE_OPENDIR, entry.nodeid, bytes_of(fuse_open_in{})).error, 0) << link;
    EXPECT_NE(guest->create(root, link, O_WRONLY, 0644).error, 0) << link;
  }
  // A directory that the guest knows turns into a link.
  const uint64_t dir = look("dir"), inner = look("dir/inner");
  fs::rename(shared / "dir", top / "dir");
  fs::create_symlink("../outside", shared / "dir");
  put("outside/inner", "not for the guest");
  EXPECT_EQ(guest->open(inner, O_RDONLY).error, ESTALE);
  EXPECT_EQ(guest->lookup(dir, "secret").error, ESTALE);
  EXPECT_EQ(guest->mkdir(dir, "new").error, ESTALE);
  EXPECT_FALSE(fs::exists(top / "outside/new"));
  // A device of the host, by name.
  EXPECT_EQ(
      guest->ask(FUSE_MKNOD, root, bytes_of(fuse_mknod_in{S_IFBLK | 0600, 0x100, 0, 0}) + name("sda")).error,
      EPERM);
  EXPECT_EQ(text("outside/secret"), "secret");
}

// The server compares keys as well; here is the folder alone, which must not need that.
TEST_F(FuseTest, TheFolderItselfOpensNothingOutside) {
  fs::create_symlink("../outside", shared / "up");
  fs::create_symlink("dir", shared / "within");
  put("shared/dir/secret", "inside");
  const Folder folder(shared);
  for (const char* path :
       {"..", "../outside/secret", "dir/../../outside/secret", "up/secret", "/etc/passwd", "within/inner"})
    EXPECT_NE(folder.open(path, O_RDONLY).error, 0) << path;
  EXPECT_EQ(folder.open("up", O_RDONLY).error, ELOOP);
  EXPECT_EQ(folder.open("up", name_only).error, 0);
  std::atomic<bool> stop = false;
  std::thread racer([&] {
    const std::string a = shared / "dir", b = shared / "up";
    while (!stop) ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE);
  });
  int inside = 0, outside = 0;
  const auto patience = Clock::now() + std::chrono::minutes(1);  // the racer may be the one that waits
  for (int i = 0; i < 5000 || (inside == 0 && Clock::now() < patience); i++) {
    const Opened file = folder.open("dir/secret", O_RDONLY);
    char first = 0;
    if (file.fd && ::read(file.fd.get(), &first, 1) == 1) (first == 'i' ? inside : outside)++;
  }
  stop = true;
  racer.join();
  EXPECT_GT(inside, 0);
  EXPECT_EQ(outside, 0);
}

// Somebody exchanges a directory with a link to the outside all the time; every answer is from the inside.
TEST_F(FuseTest, RenameRacesOpenNoWayOut) {
  fs::create_symlink("../outside", shared / "other");
  put("shared/dir/secret", "inside");
  std::atomic<bool> stop = false;
  std::thread racer([&] {
    const std::string a = shared / "dir", b = shared / "other";
    while (!stop) ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE);
  });
  int opened = 0;
  const auto patience = Clock::now() + std::chrono::minutes(1);
  for (int i = 0; i < 3000 || (opened == 0 && Clock::now() < patience); i++) {
    for (const char* where : {"dir", "other"}) {
      const auto dir = guest->lookup(root, where);
      const auto file = guest->lookup(dir.node(), "secret");
      if (file.error != 0) continue;
      const auto handle = guest->open(file.node(), O_RDONLY);
      if (handle.error != 0) continue;
      opened++;
      const uint64_t fh = handle.as<fuse_open_out>().fh;
      EXPECT_EQ(read(file.node(), fh), "inside");
      guest->release(file.node(), fh);
    }
  }
  stop = true;
  racer.join();
  EXPECT_GT(opened, 0);
}

TEST_F(FuseTest, ReadOnlyMeansThatNothingChanges) {
  FuseServer::Config protection = config;
  protection.read_only = true;
  FuseServer other(std::make_shared<Folder>(shared), protection);
  FakeGuest reader(other);
  ASSERT_EQ(reader.init().error, 0);
  const uint64_t file = reader.lookup(root, "file").node();
  EXPECT_EQ(reader.open(file, O_RDWR).error, EROFS);
  EXPECT_EQ(reader.open(file, O_RDONLY | O_TRUNC).error, EROFS);
  EXPECT_EQ(reader.open(file, O_RDONLY).error, 0);
  EXPECT_EQ(reader.mkdir(root, "new").error, EROFS);
  EXPECT_EQ(reader.create(root, "new", O_WRONLY, 0644).error, EROFS);
  EXPECT_EQ(reader.rename(root, "file", root, "new").error, EROFS);
  EXPECT_EQ(reader.ask(FUSE_UNLINK, root, name("file")).error, EROFS);
  EXPECT_EQ(reader.set(file, {}).error, EROFS);
  EXPECT_EQ(text("shared/file"), "contents");
}

TEST_F(FuseTest, OpenFilesAreLimited) {
  const uint64_t file = look("file");
  for (size_t i = 0; i < config.max_handles; i++) EXPECT_EQ(guest->open(file, O_RDONLY).error, 0);
  EXPECT_EQ(guest->open(file, O_RDONLY).error, ENFILE);
  EXPECT_EQ(guest->create(root, "new", O_WRONLY, 0644).error, ENFILE);
  EXPECT_FALSE(fs::exists(shared / "new"));
  EXPECT_EQ(guest->ask(FUSE_OPENDIR, root, bytes_of(fuse_open_in{})).error, ENFILE);
  EXPECT_EQ(server->open_files(), config.max_handles);
  server->reset();
  EXPECT_EQ(server->open_files(), 0u);
  EXPECT_EQ(server->known_nodes(), 1u);
  EXPECT_EQ(guest->get(root).error, EPROTO);
}

TEST_F(FuseTest, AFileThatTheHostReplacesIsAnotherNode) {
  const uint64_t file = look("file");
  put("shared/new", "newer");
  fs::rename(shared / "new", shared / "file");
  EXPECT_EQ(guest->open(file, O_RDONLY).error, ESTALE);
  const uint64_t again = look("file");
  EXPECT_NE(again, file);
  EXPECT_EQ(read(again, open(again, O_RDONLY)), "newer");
}

TEST_F(FuseTest, SavedStateOpensTheSameFilesAgain) {
  const uint64_t inner = look("dir/inner"), fh = open(inner, O_RDWR);
  const uint64_t dir = look("dir"),
                 listing = guest->ask(FUSE_OPENDIR, dir, bytes_of(fuse_open_in{})).as<fuse_open_out>().fh;
  const uint64_t gone = look("file"), gone_fh = open(gone, O_RDONLY);
  EXPECT_EQ(guest->ask(FUSE_UNLINK, root, name("file")).error, 0);
  nlohmann::json saved, again;
  server->save(saved);
  FuseServer other(std::make_shared<Folder>(shared), config);
  FakeGuest person(other);
  other.load(saved);
  other.save(again);
  EXPECT_EQ(saved, again);
  EXPECT_EQ(person.write(inner, fh, 0, "I").error, 0);
  EXPECT_EQ(text("shared/dir/inner"), "Inner");
  EXPECT_FALSE(person.read(dir, listing, 0, 4096, FUSE_READDIR).body.empty());
  EXPECT_EQ(person.read(gone, gone_fh, 0, 10).error, EBADF);
  EXPECT_EQ(person.lookup(root, "dir").node(), dir);
  EXPECT_EQ(person.release(gone, gone_fh).error, 0);

  const auto refused = [&](auto damage) {
    nlohmann::json bad = saved;
    damage(bad);
    EXPECT_THROW(other.load(bad), UsageError) << bad;
  };
  refused([](auto& bad) { bad["nodes"][0]["name"] = "2e2e"; });    // ".."
  refused([](auto& bad) { bad["nodes"][0]["name"] = "612f62"; });  // "a/b"
  refused([](auto& bad) { bad["nodes"][0]["parent"] = 77; });      // nobody
  refused([](auto& bad) { bad["nodes"][0]["parent"] = bad["nodes"][0]["id"]; });
  refused([](auto& bad) { bad["nodes"].push_back(bad["nodes"][0]); });
  refused([](auto& bad) { bad["next_node"] = 1; });
  refused([](auto& bad) { bad["files"][0]["node"] = 77; });
  refused([](auto& bad) { bad["files"][0]["flags"] = O_CREAT; });
  refused([](auto& bad) { bad.erase("nodes"); });
}

TEST_F(FuseTest, WrongRequestsAreRefused) {
  FuseServer fresh(std::make_shared<Folder>(shared), config);
  FakeGuest person(fresh);
  EXPECT_EQ(person.lookup(root, "file").error, EPROTO);
  EXPECT_EQ(person.init(26).error, EPROTO);
  EXPECT_EQ(guest->ask(FUSE_LOOKUP, root, "file").error, EINVAL);  // no zero at the end
  EXPECT_EQ(guest->ask(FUSE_LOOKUP, 99, name("file")).error, ESTALE);
  EXPECT_EQ(guest->ask(FUSE_LOOKUP, look("file"), name("x")).error, ESTALE);
  EXPECT_EQ(guest->ask(FUSE_OPEN, root, "").error, EINVAL);
  EXPECT_EQ(guest->ask(FUSE_GETXATTR, root, name("user.a")).error, ENOSYS);
  EXPECT_EQ(guest->ask(12345, root, "").error, ENOSYS);
  EXPECT_EQ(guest->ask(FUSE_LOOKUP, root, std::string(9000, 'a')).error, E2BIG);
  EXPECT_EQ(guest->ask(FUSE_LOOKUP, root, name("file"), 10).error, EINVAL);  // no room
  testing::PlainMessage stub({1, 2, 3}, 100);
  EXPECT_EQ(server->serve(stub), 0u);
  EXPECT_THROW(Folder(shared / "file"), UsageError);
  EXPECT_THROW(Folder(top / "nothing"), UsageError);
}

TEST(Nodes, ADirectoryIsNeverInsideItself) {
  Nodes nodes({1, 1, 0, S_IFDIR});
  const uint64_t a = nodes.enter(Nodes::root, "a", {1, 2, 0, S_IFDIR}),
                 b = nodes.enter(a, "b", {1, 3, 0, S_IFDIR});
  std::string path;
  EXPECT_TRUE(nodes.path(b, path));
  EXPECT_EQ(path, "a/b");
  nodes.renamed(Nodes::root, "a", {1, 2, 0, S_IFDIR}, b, "c");  // what a race on the host can look like
  EXPECT_FALSE(nodes.path(a, path));
  EXPECT_FALSE(nodes.path(b, path));
  nodes.forget(a, 1);
  nodes.forget(b, 1);
  EXPECT_EQ(nodes.size(), 1u);
}

}  // namespace
}  // namespace lodge::share
