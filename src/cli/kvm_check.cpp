// Follows what execve(2) and ld.so(8) do with a program: a script leads to its interpreter, an ELF program
// has to be one that the dynamic linker starts, and not in secure-execution mode.
#include "cli/kvm_check.hpp"

#include <elf.h>
#include <fmt/format.h>
#include <linux/capability.h>
#include <linux/xattr.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string_view>
#include <system_error>

#include "base/mapping.hpp"

namespace lodge::cli {
namespace {

namespace fs = std::filesystem;

constexpr size_t script_head = 256;   // BINPRM_BUF_SIZE: what the kernel reads of a script
constexpr unsigned script_depth = 5;  // scripts of scripts that execve(2) follows

bool holds(const Mapping& file, uint64_t offset, uint64_t size) {
  return offset <= file.size() && size <= file.size() - offset;
}

// Zeros where the file does not hold it.
template <class T>
T read_at(const Mapping& file, uint64_t offset) {
  T value{};
  if (holds(file, offset, sizeof value)) std::memcpy(&value, file.data() + offset, sizeof value);
  return value;
}

// A static-pie program says so in its dynamic section; a shared library does not.
bool is_pie(const Mapping& file, const Elf64_Phdr& dynamic) {
  for (uint64_t at = 0; at + sizeof(Elf64_Dyn) <= dynamic.p_filesz; at += sizeof(Elf64_Dyn)) {
    const auto entry = read_at<Elf64_Dyn>(file, dynamic.p_offset + at);
    if (entry.d_tag == DT_NULL) break;
    if (entry.d_tag == DT_FLAGS_1) return (entry.d_un.d_val & DF_1_PIE) != 0;
  }
  return false;
}

// Whether the dynamic linker starts the program, by its ELF header.
std::string why_not_elf(const fs::path& program, const Mapping& file) {
  const auto cut_short = [&] {
    return fmt::format("{} is an ELF file that is cut short; install or build it again", program.string());
  };
  if (!holds(file, 0, sizeof(Elf64_Ehdr))) return cut_short();
  const auto header = read_at<Elf64_Ehdr>(file, 0);
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != EM_X86_64)
    return fmt::format("{} is not an x86-64 program, and the library is", program.string());
  if (header.e_type != ET_EXEC && header.e_type != ET_DYN)
    return fmt::format("{} is an ELF file but not a program; give the program that is linked from it",
                       program.string());
  if (header.e_phnum == 0 || header.e_phentsize != sizeof(Elf64_Phdr))
    return fmt::format("{} has no program headers that the kernel takes; build it again", program.string());
  if (!holds(file, header.e_phoff, uint64_t{header.e_phnum} * sizeof(Elf64_Phdr))) return cut_short();
  bool interpreted = false;
  bool library = header.e_type == ET_DYN;
  for (unsigned i = 0; i < header.e_phnum; ++i) {
    const auto segment = read_at<Elf64_Phdr>(file, header.e_phoff + i * sizeof(Elf64_Phdr));
    const bool needed =
        segment.p_type == PT_LOAD || segment.p_type == PT_INTERP || segment.p_type == PT_DYNAMIC;
    if (needed && !holds(file, segment.p_offset, segment.p_filesz)) return cut_short();
    if (segment.p_type == PT_INTERP) interpreted = true;
    if (segment.p_type == PT_DYNAMIC && is_pie(file, segment)) library = false;
  }
  if (interpreted) return {};
  if (library)
    return fmt::format("{} is a shared library and not a program; give the program that uses it",
                       program.string());
  return fmt::format("{} is statically linked, so nothing can be preloaded; use a dynamically linked one",
                     program.string());
}

// capabilities(7): unless the real user is root, a program starts in secure-execution mode when its file's
// capabilities are effective or any of them becomes permitted.
bool gains_capabilities(const fs::path& program) {
  vfs_ns_cap_data of_file{};
  const ssize_t size = ::getxattr(program.c_str(), XATTR_NAME_CAPS, &of_file, sizeof of_file);
  if (::getuid() == 0 || size < static_cast<ssize_t>(XATTR_CAPS_SZ_1)) return false;
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct own[_LINUX_CAPABILITY_U32S_3]{};
  ::syscall(SYS_capget, &header, own);
  bool gains = (of_file.magic_etc & VFS_CAP_FLAGS_EFFECTIVE) != 0;
  for (size_t i = 0; i < std::size(own); ++i)
    gains |= (of_file.data[i].permitted | (of_file.data[i].inheritable & own[i].inheritable)) != 0;
  return gains;
}

// Secure-execution mode, in which the dynamic linker ignores LD_PRELOAD. The kernel looks at the ELF program:
// what a script has of this counts for nothing.
std::string why_not_secure(const fs::path& program, const struct stat& status) {
  const bool others_user = (status.st_mode & S_ISUID) != 0 && status.st_uid != ::geteuid();
  const bool others_group = (status.st_mode & S_ISGID) != 0 && status.st_gid != ::getegid();
  if (others_user || others_group)
    return fmt::format(
        "{} is set-user-ID or set-group-ID, and the dynamic linker then preloads nothing; run it as its "
        "owner",
        program.string());
  if (gains_capabilities(program))
    return fmt::format(
        "{} has file capabilities, and the dynamic linker then preloads nothing; run a copy (cp keeps none), "
        "or run it as root",
        program.string());
  return {};
}

std::string why_not_file(const fs::path& program, unsigned depth);

// `head` is the file's beginning, as much of it as the kernel reads.
std::string why_not_script(const fs::path& program, std::string_view head, unsigned depth) {
  std::string_view line = head.substr(2, head.find('\n') - 2);
  line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
  const std::string interpreter(line.substr(0, line.find_first_of(" \t")));
  if (interpreter.empty())
    return fmt::format("{} is a script that names no interpreter after #!; write one there",
                       program.string());
  if (interpreter.ends_with('\r'))
    return fmt::format(
        "{} is a script whose first line ends with a carriage return, which the kernel takes as "
        "part of the interpreter's name; remove it",
        program.string());
  if (depth == script_depth)
    return fmt::format(
        "{} is a script of a script, more of them than the kernel follows; name a program after #!",
        program.string());
  std::error_code error;
  if (!fs::exists(interpreter, error) && !error)
    return fmt::format("{} is a script of {}, which is not there; install it or mend the script's first line",
                       program.string(), interpreter);
  return why_not_file(interpreter, depth + 1);
}

std::string why_not_file(const fs::path& program, unsigned depth) {
  struct stat status {};
  if (::stat(program.c_str(), &status) != 0)
    return fmt::format("{} cannot be looked at ({}); check its path and permissions", program.string(),
                       std::strerror(errno));
  // Before it is opened: to open a FIFO waits for its writer.
  if (!S_ISREG(status.st_mode))
    return fmt::format("{} is not a regular file; give a program", program.string());
  if (::access(program.c_str(), X_OK) != 0)
    return fmt::format("{} cannot be executed; check its permissions", program.string());
  const Mapping file = Mapping::file(program.string(), "lodge kvm:");
  const std::string_view head(reinterpret_cast<const char*>(file.data()), std::min(file.size(), script_head));
  if (head.starts_with("#!")) return why_not_script(program, head, depth);
  if (!head.starts_with(ELFMAG))
    return fmt::format("{} is neither an ELF program nor a script", program.string());
  if (auto reason = why_not_secure(program, status); !reason.empty()) return reason;
  return why_not_elf(program, file);
}

// QEMU's lists: commas part the options, a doubled one belongs to the option.
std::vector<std::string> split_options(std::string_view text) {
  std::vector<std::string> options(1);
  for (size_t i = 0; i < text.size(); ++i)
    if (text[i] != ',')
      options.back() += text[i];
    else if (text.substr(i + 1).starts_with(','))
      options.back() += text[i++];
    else
      options.emplace_back();
  return options;
}

// The first option may be the value of "enable" alone, a later name without a value means "on" ("off" behind
// "no"), and the last one counts.
bool enables_sandbox(std::string_view text) {
  const std::vector<std::string> options = split_options(text);
  std::string value = options.front().find('=') == std::string::npos ? options.front() : "";
  for (size_t i = 0; i < options.size(); ++i)
    if (options[i].starts_with("enable="))
      value = options[i].substr(std::strlen("enable="));
    else if (i > 0 && (options[i] == "enable" || options[i] == "noenable"))
      value = options[i] == "enable" ? "on" : "off";
  return value == "on" || value == "yes" || value == "true" || value == "y";
}

}  // namespace

std::string why_not_preloaded(const fs::path& program) {
  return why_not_file(program, 0);
}

std::string why_not_arguments(const std::vector<std::string>& words) {
  for (size_t i = 1; i + 1 < words.size(); ++i)
    if ((words[i] == "-sandbox" || words[i] == "--sandbox") && enables_sandbox(words[i + 1]))
      return fmt::format(
          "{} {} installs a seccomp filter that the accelerator's own system calls may not pass; leave it "
          "out",
          words[i], words[i + 1]);
  return {};
}

}  // namespace lodge::cli
