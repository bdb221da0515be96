// What the command says about itself and the host.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "support/process.hpp"

namespace lodge {
namespace {

using testing::HasSubstr;
using testing_support::Result;
using testing_support::run;
using testing_support::Seconds;

Result lodge(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), LODGE_BINARY);
  return run(arguments, Seconds(60));
}

TEST(Command, PrintsItsVersion) {
  const Result result = lodge({"--version"});
  EXPECT_EQ(result.status, 0);
  EXPECT_THAT(result.out, testing::MatchesRegex("lodge [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST(Command, HelpNamesEveryCommandAndGivesExamples) {
  const Result result = lodge({"--help"});
  EXPECT_EQ(result.status, 0);
  for (const char* part : {"run", "doctor", "completion", "Examples:"})
    EXPECT_THAT(result.out, HasSubstr(part));
}

TEST(Command, HelpOfRunNamesEveryOptionDeviceKeyAndStatus) {
  const Result result = lodge({"run", "--help"});
  EXPECT_EQ(result.status, 0);
  for (const char* part :
       {"--kernel", "--initrd", "--append", "--cpus", "--memory", "--accel", "--cpu", "--serial", "--name",
        "--no-reboot", "--device", "isa-debug-exit", "Ctrl-A X", "Exit status:"}) {
    EXPECT_THAT(result.out, HasSubstr(part));
  }
}

TEST(Doctor, ReportsBothAcceleratorsWithAMeasuredSpeedAndAChoice) {
  const Result result = lodge({"doctor", "--json"});
  ASSERT_EQ(result.status, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_GT(json["host"]["cpus"], 0);
  ASSERT_EQ(json["accelerators"].size(), 2u);
  const auto& soft = json["accelerators"][1];
  EXPECT_EQ(soft["name"], "soft");
  EXPECT_EQ(soft["available"], true) << soft;
  EXPECT_GT(soft["measured_mips"], 1.0);
  // The choice follows from the findings.
  EXPECT_EQ(json["auto"]["choice"], json["accelerators"][0]["boots_stock_kernels"] == true ? "kvm" : "soft");
  EXPECT_NE(json["auto"]["why"], "");
}

TEST(Doctor, PrintsTheSameForPeople) {
  const Result result = lodge({"doctor"});
  EXPECT_EQ(result.status, 0);
  for (const char* part : {"host ", "kvm ", "soft ", "auto "}) EXPECT_THAT(result.out, HasSubstr(part));
}

TEST(Completion, BashScriptCompletesOptionsAndTheirValues) {
  const std::string complete =
      std::string("source <(") + LODGE_BINARY +
      " completion bash); COMP_WORDS=(lodge run --accel s) COMP_CWORD=3; _lodge; echo \"${COMPREPLY[@]}\"; "
      "COMP_WORDS=(lodge run --no) COMP_CWORD=2; _lodge; echo \"${COMPREPLY[@]}\"; "
      "COMP_WORDS=(lodge doc) COMP_CWORD=1; _lodge; echo \"${COMPREPLY[@]}\"";
  const Result result = run({"/bin/bash", "-c", complete}, Seconds(20));
  EXPECT_EQ(result.out, "soft\n--no-balloon --no-reboot\ndoctor\n") << result.err;
}

TEST(Completion, EveryShellGetsAScriptWithAllOptions) {
  for (const char* shell : {"bash", "zsh", "fish"}) {
    const Result result = lodge({"completion", shell});
    EXPECT_EQ(result.status, 0);
    EXPECT_THAT(result.out, HasSubstr("initrd")) << shell;
    EXPECT_THAT(result.out, HasSubstr("x86-64-v3")) << shell;
  }
}

}  // namespace
}  // namespace lodge
