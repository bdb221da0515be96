#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <span>

#include "base/error.hpp"
#include "cli/commands.hpp"
#include "vm/ending.hpp"

namespace {

using namespace lodge;

int dispatch(const cli::Command& command) {
  if (const auto* run = std::get_if<cli::RunCommand>(&command)) return cli::run(*run);
  if (const auto* doctor = std::get_if<cli::DoctorCommand>(&command)) return cli::doctor(*doctor);
  if (const auto* image = std::get_if<cli::ImageCommand>(&command)) return cli::image(*image);
  if (const auto* ctl = std::get_if<cli::CtlCommand>(&command)) return cli::ctl(*ctl);
  if (const auto* kvm = std::get_if<cli::KvmCommand>(&command)) return cli::kvm(*kvm);
  if (const auto* list = std::get_if<cli::ListCommand>(&command)) return cli::list(*list);
  if (const auto* completion = std::get_if<cli::CompletionCommand>(&command)) {
    std::fputs(cli::completion_script(completion->shell).c_str(), stdout);
    return 0;
  }
  std::fputs(std::get<cli::PrintCommand>(command).text.c_str(), stdout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return dispatch(cli::parse_command_line({argv, static_cast<size_t>(argc)}));
  } catch (const UsageError& error) {
    fmt::print(stderr, "lodge: {}\n", error.what());
    return vm::usage_status;
  } catch (const Interrupted& end) {
    fmt::print(stderr, "lodge: {}\n", end.what());
    return 128 + end.signal();
  } catch (const std::exception& error) {
    fmt::print(stderr, "lodge: {}\n", error.what());
    return vm::host_failure_status;
  }
}
