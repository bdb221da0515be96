// What QMP's commands for keys and pointers become, on a machine whose guest has no driver.
#include "vm/input_commands.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kvm/soft/soft.hpp"
#include "machine/boot/test_kernels.hpp"
#include "vm/control_commands.hpp"

namespace lodge::vm {
namespace {

namespace kernels = machine::boot::test_kernels;
using control::CommandError, control::Json, control::Received, control::Request;
using ::testing::HasSubstr;

class InputCommands : public ::testing::Test {
 protected:
  static VmConfig config_with(const std::vector<std::string>& devices, const std::string& kernel) {
    VmConfig config{.kernel = kernel, .memory = 16 << 20, .cpu = "host"};
    config.serial.assign(1, {SerialConfig::Kind::null, {}});
    for (const std::string& device : devices) config.devices.push_back({device, {}});
    return config;
  }
  // The error of a command, or nothing.
  static std::string error_of(VirtualMachine& machine, const std::string& command,
                              const std::string& arguments) {
    try {
      execute(machine, Request{command, Received::parse(arguments)});
      return "";
    } catch (const CommandError& error) {
      return error.what();
    }
  }
  static constexpr uint64_t kernel_at = 1 << 20;
  kernels::TemporaryFile kernel{kernels::elf64({.paddr = kernel_at, .vaddr = kernel_at, .entry = kernel_at})};
};

TEST_F(InputCommands, WhatCannotBeDoneIsSaid) {
  const VmConfig config = config_with({"virtio-keyboard"}, kernel.path);
  VirtualMachine machine(config, kvm::soft::open(), std::make_unique<Backends>(config.serial, nullptr));
  const auto key = [&](const std::string& keys) {
    return error_of(machine, "send-key", R"({"keys":)" + keys + "}");
  };
  EXPECT_THAT(key(R"([{"type":"qcode","data":"a"}])"), HasSubstr("no driver for its keyboard"));
  EXPECT_THAT(key(R"([{"type":"qcode","data":"any"}])"), HasSubstr("no key 'any'"));
  EXPECT_THAT(key(R"([{"type":"number","data":30}])"), HasSubstr("not as number"));
  EXPECT_THAT(key(R"([{"data":"a"}])"), HasSubstr("'type' is missing"));
  EXPECT_THAT(key("[]"), HasSubstr("list of 1 to"));
  EXPECT_THAT(key("{}"), HasSubstr("list of 1 to"));
  EXPECT_THAT(key("[7]"), HasSubstr("'type' is missing"));
  EXPECT_THAT(error_of(machine, "send-key", "{}"), HasSubstr("'keys' is missing"));
  EXPECT_THAT(error_of(machine, "send-key", R"({"keys":[],"hold-time":5})"),
              HasSubstr("no argument 'hold-time'"));

  const auto event = [&](const std::string& one) {
    return error_of(machine, "input-send-event", R"({"events":[)" + one + "]}");
  };
  EXPECT_THAT(event(R"({"type":"abs","data":{"axis":"x","value":5}})"), HasSubstr("--device virtio-tablet"));
  EXPECT_THAT(event(R"({"type":"abs","data":{"axis":"x","value":32768}})"), HasSubstr("0 to 32767"));
  EXPECT_THAT(event(R"({"type":"abs","data":{"axis":"x","value":-1}})"), HasSubstr("0 to 32767"));
  EXPECT_THAT(event(R"({"type":"abs","data":{"axis":"z","value":1}})"), HasSubstr("x or y"));
  EXPECT_THAT(event(R"({"type":"rel","data":{"axis":"x","value":1}})"), HasSubstr("not rel"));
  EXPECT_THAT(event(R"({"type":"btn","data":{"button":"left"}})"), HasSubstr("'down' is missing"));
  EXPECT_THAT(event(R"({"type":"btn","data":{"button":"fire","down":true}})"), HasSubstr("no button 'fire'"));
  EXPECT_THAT(event(R"({"type":"key","data":{"down":1,"key":{"type":"qcode","data":"a"}}})"),
              HasSubstr("true or false"));
  EXPECT_EQ(execute(machine, Request{"lodge-query-input"}).dump(),
            R"([{"kind":"keyboard","driver":false,"lights":[]}])");
}

TEST_F(InputCommands, WithoutAKeyboardTheOptionIsNamed) {
  const VmConfig config = config_with({"virtio-tablet"}, kernel.path);
  VirtualMachine machine(config, kvm::soft::open(), std::make_unique<Backends>(config.serial, nullptr));
  EXPECT_THAT(error_of(machine, "send-key", R"({"keys":[{"type":"qcode","data":"a"}]})"),
              HasSubstr("--device virtio-keyboard"));
  EXPECT_THAT(error_of(machine, "input-send-event",
                       R"({"events":[{"type":"btn","data":{"button":"wheel-up","down":true}}]})"),
              HasSubstr("no driver for its tablet"));
  EXPECT_EQ(error_of(machine, "input-send-event",
                     R"({"events":[{"type":"btn","data":{"button":"wheel-up","down":false}}]})"),
            "");
}

}  // namespace
}  // namespace lodge::vm
