#include "vm/control/protocol.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

namespace lodge::vm::control {
namespace {

using ::testing::HasSubstr;

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const CommandError& error) {
    return error.what();
  }
  return "nothing refused";
}

TEST(Request, HasACommandArgumentsAndAnIdentity) {
  Received id;
  const Request request =
      parse_request(R"({"execute":"balloon","arguments":{"value":7},"id":"a","x":1})", id);
  EXPECT_EQ(request.command, "balloon");
  EXPECT_EQ(number_argument(request, "value", 7), 7u);
  EXPECT_EQ(id, "a");
}

TEST(Request, WithoutArgumentsHasNone) {
  Received id;
  EXPECT_TRUE(parse_request(R"({"execute":"stop"})", id).arguments.empty());
  EXPECT_TRUE(id.is_null());
}

TEST(Request, WhatIsNoneIsRefused) {
  for (const char* line :
       {"", "hello", "[]", "null", "{", R"({"execute":7})", R"({"arguments":{}})",
        R"({"execute":"stop","arguments":[]})", "{\"execute\":\"\xff\xfe\"}", "\x00\x01"}) {
    Received id;
    EXPECT_THROW(parse_request(line, id), CommandError) << line;
  }
}

TEST(Request, ARefusedOneStillHasItsIdentity) {
  Received id;
  EXPECT_THROW(parse_request(R"({"id":42})", id), CommandError);
  EXPECT_EQ(id, 42);
}

// Deep nesting would lead whoever prints it into as deep a recursion.
TEST(Request, DepthAndLengthAreBounded) {
  const auto nested = [](size_t depth) {
    return R"({"execute":"x","id":)" + std::string(depth, '[') + std::string(depth, ']') + "}";
  };
  Received id;
  EXPECT_NO_THROW(parse_request(nested(max_depth - 1), id));
  EXPECT_THAT(refusal([&] { parse_request(nested(max_depth), id); }), HasSubstr("nested"));
  EXPECT_THAT(refusal([&] { parse_request(std::string(60'000, '['), id); }), HasSubstr("nested"));
  EXPECT_THAT(refusal([&] { parse_request(std::string(max_line + 1, ' '), id); }), HasSubstr("long"));
  // Brackets in a string are no nesting, and an escaped quote does not end one.
  EXPECT_NO_THROW(parse_request(R"({"execute":"\"[[[[[[[[[[[[[[[[[[[[[[[["})", id));
}

TEST(Arguments, AreOfTheTypeAndRangeThatTheCommandWants) {
  Received id;
  const Request request =
      parse_request(R"({"execute":"c","arguments":{"n":300,"m":-1,"f":1.5,"t":"x"}})", id);
  EXPECT_EQ(number_argument(request, "n", 300), 300u);
  EXPECT_THAT(refusal([&] { number_argument(request, "n", 299); }), HasSubstr("0 to 299"));
  EXPECT_THAT(refusal([&] { number_argument(request, "m", 9); }), HasSubstr("'m'"));
  EXPECT_THAT(refusal([&] { number_argument(request, "f", 9); }), HasSubstr("'f'"));
  EXPECT_THAT(refusal([&] { number_argument(request, "none", 9); }), HasSubstr("missing"));
  EXPECT_EQ(text_argument(request, "t"), "x");
  EXPECT_THAT(refusal([&] { text_argument(request, "n"); }), HasSubstr("string"));
  EXPECT_THAT(refusal([&] { allow_arguments(request, {"n", "m", "f"}); }), HasSubstr("'t'"));
  EXPECT_NO_THROW(allow_arguments(request, {"n", "m", "f", "t"}));
}

TEST(Answer, IsALineThatEchoesTheIdentity) {
  EXPECT_EQ(success_line({{"a", 1}}, "b"), "{\"return\":{\"a\":1},\"id\":\"b\"}\n");
  EXPECT_EQ(success_line(Json::object(), nullptr), "{\"return\":{}}\n");
  EXPECT_EQ(failure_line(CommandError("no", "CommandNotFound"), 3),
            "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"no\"},\"id\":3}\n");
  // A file's name need not be UTF-8, JSON must.
  EXPECT_NO_THROW(success_line("\xff", nullptr));
}

TEST(Lines, AreCutWhateverPiecesTheyComeIn) {
  LineBuffer buffer;
  for (const char c : std::string("one\r\ntwo\n\nthree")) {
    buffer.append({&c, 1});
    EXPECT_FALSE(buffer.overlong());
  }
  EXPECT_EQ(buffer.take(), "one");
  EXPECT_EQ(buffer.take(), "two");
  EXPECT_EQ(buffer.take(), "");
  EXPECT_EQ(buffer.take(), std::nullopt);
  buffer.append("\n");
  EXPECT_EQ(buffer.take(), "three");
}

TEST(Lines, WithoutAnEndAreNoticed) {
  LineBuffer buffer;
  buffer.append(std::string(max_line, 'x'));
  EXPECT_FALSE(buffer.overlong());
  buffer.append("x");
  EXPECT_TRUE(buffer.overlong());
}

}  // namespace
}  // namespace lodge::vm::control
