// lodge kvm: starts a program with liblodge-kvm.so preloaded, which presents /dev/kvm to it.
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

#include "base/error.hpp"
#include "cli/commands.hpp"
#include "cli/kvm_check.hpp"

namespace lodge::cli {
namespace {

namespace fs = std::filesystem;

// Beside the command (a build), or where an installation puts libraries.
fs::path find_library() {
  const fs::path here = fs::read_symlink("/proc/self/exe").parent_path();
  for (const fs::path& folder : {here, here / "../lib/lodge", here / "../lib"})
    if (fs::exists(folder / "liblodge-kvm.so")) return fs::canonical(folder / "liblodge-kvm.so");
  usage_error("lodge kvm: liblodge-kvm.so is not beside {}; build the target lodge-kvm",
              (here / "lodge").string());
}

// As the shell finds it.
fs::path find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) {
    std::error_code error;  // of a folder that may not be searched, say: the check names it
    if (!fs::exists(name, error) && !error)
      usage_error("lodge kvm: {}: no such program; check the path", name);
    return name;
  }
  const char* path = std::getenv("PATH");
  std::istringstream folders(path != nullptr ? path : "/usr/bin:/bin");
  for (std::string folder; std::getline(folders, folder, ':');) {
    fs::path candidate = fs::path(folder) / name;
    if (::access(candidate.c_str(), X_OK) == 0 && fs::is_regular_file(candidate)) return candidate;
  }
  usage_error("lodge kvm: {}: no such program in PATH; install it or give its path", name);
}

// A filter of system calls is inherited, and may end the process where the accelerator makes calls of its
// own.
std::string why_not_seccomp() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("Seccomp:") && line.find('2') != std::string::npos)
      return "this shell runs under a seccomp filter";
  return {};
}

// The first reason against it; empty: none is known.
std::string why_not(const KvmCommand& command, const fs::path& program) {
  if (auto reason = why_not_preloaded(program); !reason.empty()) return reason;
  return why_not_arguments(command.program);
}

void preload(const fs::path& library) {
  std::string list = library.string();
  if (list.find_first_of(" :") != std::string::npos)
    usage_error("lodge kvm: {}: the dynamic linker takes no path with a space or a colon; move it", list);
  // What is there already stays in front: a sanitizer's run-time has to be first, and what wraps a function
  // passes its call on to the next library.
  if (const char* present = std::getenv("LD_PRELOAD"); present != nullptr && *present != '\0')
    list = fmt::format("{}:{}", present, list);
  ::setenv("LD_PRELOAD", list.c_str(), 1);
}

}  // namespace

int kvm(const KvmCommand& command) {
  const fs::path library = find_library();
  const fs::path program = find_program(command.program.front());
  const std::string reason = why_not(command, program);
  if (!reason.empty()) usage_error("lodge kvm: {}", reason);
  if (command.check) {
    fmt::print("{}: will see Lodge's soft accelerator as /dev/kvm\n", program.string());
    if (const auto note = why_not_seccomp(); !note.empty()) fmt::print("note: {}\n", note);
    return 0;
  }
  preload(library);
  ::setenv("LODGE_KVM_ENGINE", command.engine.c_str(), 1);
  ::setenv("LODGE_KVM_CODE_CACHE", std::to_string(command.code_cache).c_str(), 1);
  if (command.trace) ::setenv("LODGE_KVM_TRACE", "1", 1);
  std::vector<char*> arguments;
  for (const std::string& word : command.program) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  ::execv(program.c_str(), arguments.data());
  throw_errno(fmt::format("{}: cannot be started", program.string()));
}

}  // namespace lodge::cli
