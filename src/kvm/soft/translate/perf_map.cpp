#include "kvm/soft/translate/perf_map.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.hpp"

namespace lodge::kvm::soft {

PerfMap::PerfMap() : PerfMap(fmt::format("/tmp/perf-{}.map", ::getpid())) {}

// Anybody may write to /tmp: a file, or a link, that lies there already is never opened.
PerfMap::PerfMap(const std::string& path) {
  ::unlink(path.c_str());
  file_ = Fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0644));
  if (!file_) throw_errno("cannot write " + path);
}

void PerfMap::add(const void* owner, const uint8_t* begin, const uint8_t* end,
                  const std::string& name) noexcept {
  const std::string line =
      fmt::format("{:x} {:x} {}\n", reinterpret_cast<uintptr_t>(begin), end - begin, name);
  const std::lock_guard lock(mutex_);
  lines_[owner] += line;
  append(line);
}

void PerfMap::forget(const void* owner) noexcept {
  const std::lock_guard lock(mutex_);
  lines_.erase(owner);
  if (::ftruncate(file_.get(), 0) != 0) return;
  for (const auto& [other, lines] : lines_) append(lines);
}

// What a full disk loses is a name in a profile.
void PerfMap::append(const std::string& lines) noexcept {
  for (size_t done = 0; done < lines.size();) {
    const ssize_t written = ::write(file_.get(), lines.data() + done, lines.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    done += static_cast<size_t>(written);
  }
}

}  // namespace lodge::kvm::soft
