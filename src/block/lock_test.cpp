#include "block/lock.hpp"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"

namespace lodge::block {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class Lock : public testing::Test {
 protected:
  Lock() { std::ofstream(path_) << "image"; }
  Fd open(int flags = O_RDWR) const { return Fd(::open(path_.c_str(), flags | O_CLOEXEC)); }
  std::string refusal(Use use) const {
    try {
      lock_image(open(), path_, use);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "";
  }
  TemporaryDirectory directory_;
  std::string path_ = directory_ / "disk";
};

TEST_F(Lock, ReadersDoNotDisturbEachOther) {
  const Fd one = open(O_RDONLY), two = open(O_RDONLY);
  lock_image(one, path_, Use::read);
  EXPECT_NO_THROW(lock_image(two, path_, Use::read));
}

TEST_F(Lock, AWriterKeepsReadersAndWritersOutEvenInItsOwnProcess) {
  const Fd writer = open();
  lock_image(writer, path_, Use::write);
  EXPECT_THAT(refusal(Use::write), HasSubstr("cannot be written"));
  EXPECT_THAT(refusal(Use::read), HasSubstr("cannot be read"));
}

TEST_F(Lock, AReaderKeepsWritersOut) {
  const Fd reader = open(O_RDONLY);
  lock_image(reader, path_, Use::read);
  EXPECT_THAT(refusal(Use::write), HasSubstr("cannot be written"));
}

TEST_F(Lock, EndsWithTheDescriptor) {
  {
    const Fd writer = open();
    lock_image(writer, path_, Use::write);
  }
  EXPECT_EQ(refusal(Use::write), "");
}

TEST_F(Lock, AWriterCanBecomeAReader) {
  const Fd first = open();
  lock_image(first, path_, Use::write);
  lock_image(first, path_, Use::read);
  EXPECT_EQ(refusal(Use::read), "");
}

TEST_F(Lock, TheRefusalNamesTheHolder) {
  int ready[2], end[2];
  ASSERT_EQ(::pipe(ready) | ::pipe(end), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(end[1]);
    const Fd fd = open();
    lock_image(fd, path_, Use::write);
    char byte = 0;
    [[maybe_unused]] auto n = ::write(ready[1], &byte, 1);
    n = ::read(end[0], &byte, 1);
    ::_exit(0);
  }
  char byte;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_THAT(refusal(Use::write), AllOf(HasSubstr("lodge_block"), HasSubstr(std::to_string(child))));
  ::close(end[1]);
  ::waitpid(child, nullptr, 0);
  for (const int fd : {ready[0], ready[1], end[0]}) ::close(fd);
}

}  // namespace
}  // namespace lodge::block
