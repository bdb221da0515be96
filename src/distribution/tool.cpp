#include "distribution/tool.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <memory>

#include "base/error.hpp"
#include "base/fd.hpp"

extern char** environ;

namespace lodge::distribution {
namespace {

constexpr int inherited_as = 9;

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> all;
  for (auto& text : texts) all.push_back(text.data());
  all.push_back(nullptr);
  return all;
}

std::vector<std::string> environment_with(const std::map<std::string, std::string>& more) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry; entry++) {
    const std::string text = *entry;
    if (!more.contains(text.substr(0, text.find('=')))) all.push_back(text);
  }
  for (const auto& [name, value] : more) all.push_back(name + "=" + value);
  return all;
}

// Calls line() for what is whole and keeps the rest.
void cut_lines(std::string& text, const std::function<void(std::string_view)>& line) {
  size_t begin = 0;
  for (size_t end; (end = text.find_first_of("\r\n", begin)) != std::string::npos; begin = end + 1)
    if (end > begin) line(std::string_view(text).substr(begin, end - begin));
  text.erase(0, begin);
}

class Actions {
 public:
  Actions() { ::posix_spawn_file_actions_init(&actions_); }
  ~Actions() { ::posix_spawn_file_actions_destroy(&actions_); }
  Actions(const Actions&) = delete;
  Actions& operator=(const Actions&) = delete;
  posix_spawn_file_actions_t* get() { return &actions_; }

 private:
  posix_spawn_file_actions_t actions_;
};

}  // namespace

std::string find_tool(const std::string& name, const std::string& package) {
  const char* path = std::getenv("PATH");
  // System programs are not in the path of every user.
  std::string rest = std::string(path ? path : "") + ":/usr/sbin:/sbin:/usr/bin:/bin:";
  for (size_t colon; (colon = rest.find(':')) != std::string::npos; rest.erase(0, colon + 1)) {
    std::string file = rest.substr(0, colon) + "/" + name;
    if (colon > 0 && ::access(file.c_str(), X_OK) == 0) return file;
  }
  usage_error("{} is missing; install the Debian package {}", name, package);
}

int run_tool(const ToolRun& run, const std::function<void(std::string_view)>& line) {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw_errno("pipe");
  const Fd from(ends[0]);
  Fd to(ends[1]);
  Actions actions;
  ::posix_spawn_file_actions_addopen(actions.get(), STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(actions.get(), to.get(), STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(actions.get(), to.get(), STDERR_FILENO);
  // The copy has no close-on-exec; of the same number it would be the same descriptor, and keep it.
  Fd copy;
  if (run.inherited >= 0) {
    copy = Fd(::fcntl(run.inherited, F_DUPFD_CLOEXEC, inherited_as + 1));
    ::posix_spawn_file_actions_adddup2(actions.get(), copy.get(), inherited_as);
  }
  auto arguments = run.arguments;
  auto environment = environment_with(run.environment);
  pid_t pid = 0;
  const int error = ::posix_spawn(&pid, arguments[0].c_str(), actions.get(), nullptr,
                                  pointers(arguments).data(), pointers(environment).data());
  if (error) throw_errno(error, arguments[0]);
  to.reset();

  std::string text;
  std::array<char, 4096> piece;
  for (ssize_t count; (count = ::read(from.get(), piece.data(), piece.size())) != 0;) {
    if (count < 0 && errno != EINTR) break;
    if (count > 0) text.append(piece.data(), static_cast<size_t>(count));
    cut_lines(text, line);
  }
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace lodge::distribution
