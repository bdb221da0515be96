#include "cli/escape.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace lodge::cli {
namespace {

using Action = EscapeKey::Action;

class EscapeKeyTest : public testing::Test {
 protected:
  std::string type(std::string text) {
    const size_t kept = key_.filter({reinterpret_cast<uint8_t*>(text.data()), text.size()});
    return text.substr(0, kept);
  }
  std::vector<Action> actions_;
  EscapeKey key_{[this](Action action) { actions_.push_back(action); }};
};

TEST_F(EscapeKeyTest, OrdinaryInputPassesUnchanged) {
  EXPECT_EQ(type("ls -l\r\x03\x1b[A"), "ls -l\r\x03\x1b[A");
  EXPECT_TRUE(actions_.empty());
}

TEST_F(EscapeKeyTest, ActsOnItsLettersInEitherCaseAndRemovesThem) {
  EXPECT_EQ(type("a\x01xb\x01Xc"), "abc");
  EXPECT_EQ(actions_, (std::vector{Action::end, Action::end}));
  type(
      "\x01"
      "b\x01R");
  EXPECT_EQ(actions_[2], Action::power_button);
  EXPECT_EQ(actions_[3], Action::reset);
}

TEST_F(EscapeKeyTest, SendsTheKeyItselfWhenDoubledOrFollowedByA) {
  EXPECT_EQ(type("\x01\x01"), "\x01");
  EXPECT_EQ(type("\x01"
                 "a"),
            "\x01");
  EXPECT_TRUE(actions_.empty());
}

TEST_F(EscapeKeyTest, MayComeInTwoPieces) {
  EXPECT_EQ(type("ab\x01"), "ab");
  EXPECT_EQ(type("x"), "");
  EXPECT_EQ(actions_, std::vector{Action::end});
}

TEST_F(EscapeKeyTest, HelpsForHAndForUnknownLetters) {
  EXPECT_EQ(type("\x01h\x01?z"), "z");
  EXPECT_EQ(actions_, (std::vector{Action::help, Action::help}));
}

}  // namespace
}  // namespace lodge::cli
