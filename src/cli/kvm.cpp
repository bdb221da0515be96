// lodge kvm: starts a program with liblodge-kvm.so preloaded, which presents /dev/kvm to it.
#include <elf.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/error.hpp"
#include "base/mapping.hpp"
#include "cli/commands.hpp"

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
    if (!fs::exists(name)) usage_error("lodge kvm: {}: no such program; check the path", name);
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

template <class T>
T read_at(const Mapping& file, uint64_t offset) {
  T value{};
  if (offset > file.size() || sizeof value > file.size() - offset) return value;
  std::memcpy(&value, file.data() + offset, sizeof value);
  return value;
}

// Whether the dynamic linker starts the program, by its ELF header; a script's interpreter is judged instead.
std::string why_not_elf(const fs::path& program, const Mapping& file) {
  const auto header = read_at<Elf64_Ehdr>(file, 0);
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != EM_X86_64)
    return fmt::format("{} is not an x86-64 program, and the library is", program.string());
  for (unsigned i = 0; i < header.e_phnum; ++i) {
    const auto segment = read_at<Elf64_Phdr>(file, header.e_phoff + uint64_t{i} * header.e_phentsize);
    if (segment.p_type == PT_INTERP) return {};
  }
  return fmt::format("{} is statically linked, so nothing can be preloaded; use a dynamically linked one",
                     program.string());
}

std::string why_not_file(const fs::path& program, unsigned depth) {
  if (::access(program.c_str(), X_OK) != 0)
    return fmt::format("{} cannot be executed; check its permissions", program.string());
  struct stat status {};
  ::stat(program.c_str(), &status);
  const bool ours = status.st_uid == ::geteuid() && status.st_gid == ::getegid();
  if ((status.st_mode & (S_ISUID | S_ISGID)) != 0 && !ours)
    return fmt::format(
        "{} is set-user-ID or set-group-ID, and the dynamic linker then preloads nothing; run it "
        "as its owner",
        program.string());
  const Mapping file = Mapping::file(program.string(), "PROGRAM");
  const std::string_view head(reinterpret_cast<const char*>(file.data()), std::min<size_t>(file.size(), 256));
  if (head.starts_with(ELFMAG)) return why_not_elf(program, file);
  if (!head.starts_with("#!") || depth > 4)
    return fmt::format("{} is neither an ELF program nor a script", program.string());
  std::istringstream line(std::string(head.substr(2, head.find('\n') - 2)));
  std::string interpreter;
  line >> interpreter;
  return why_not_file(interpreter, depth + 1);
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

// What a program's own options say of filters that it will install: QEMU's -sandbox.
std::string why_not_arguments(const KvmCommand& command) {
  for (size_t i = 1; i + 1 < command.program.size(); ++i)
    if (command.program[i] == "-sandbox" && command.program[i + 1].starts_with("on"))
      return "-sandbox on installs a seccomp filter that the accelerator's own system calls may not pass; "
             "leave it "
             "out";
  return {};
}

// The first reason against it; empty: none is known.
std::string why_not(const KvmCommand& command, const fs::path& program) {
  if (auto reason = why_not_file(program, 0); !reason.empty()) return reason;
  return why_not_arguments(command);
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
