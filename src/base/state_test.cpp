#include "base/state.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge {
namespace {

struct Sample {
  static constexpr std::string_view name = "sample";
  static constexpr unsigned version = 3;
  uint8_t small = 0;
  uint64_t large = 0;
  bool flag = false;
  std::array<uint8_t, 4> data{};
  template <class V>
  void visit(V& v) {
    v("small", small);
    v("large", large);
    v("flag", flag);
    v("data", data);
  }
};

nlohmann::json saved() {
  nlohmann::json json;
  save_state(Sample{.small = 7, .large = UINT64_MAX, .flag = true, .data = {1, 2, 0xfe, 0xff}}, json);
  return json;
}

TEST(State, RoundTripsEveryField) {
  const auto back = load_state<Sample>(saved());
  EXPECT_EQ(back.small, 7);
  EXPECT_EQ(back.large, UINT64_MAX);
  EXPECT_TRUE(back.flag);
  EXPECT_EQ(back.data, (std::array<uint8_t, 4>{1, 2, 0xfe, 0xff}));
}

TEST(State, TheJsonIsReadable) {
  EXPECT_EQ(
      saved().dump(),
      R"({"data":"0102feff","device":"sample","flag":1,"large":18446744073709551615,"small":7,"version":3})");
}

TEST(State, RefusesWhatDoesNotFit) {
  for (const auto& [key, value] : std::vector<std::pair<std::string, nlohmann::json>>{{"small", 256},
                                                                                      {"small", -1},
                                                                                      {"small", "x"},
                                                                                      {"data", "010203"},
                                                                                      {"data", "0102fexx"},
                                                                                      {"data", 5},
                                                                                      {"version", 2},
                                                                                      {"device", "other"}}) {
    nlohmann::json json = saved();
    json[key] = value;
    EXPECT_THROW(load_state<Sample>(json), UsageError) << key << " = " << value;
  }
  nlohmann::json json = saved();
  json.erase("large");
  EXPECT_THROW(load_state<Sample>(json), UsageError);
}

}  // namespace
}  // namespace lodge
