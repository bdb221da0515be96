#include "kvm/soft/irqchip/event_identity.hpp"

#include <fcntl.h>

#include <charconv>
#include <fstream>
#include <string>
#include <string_view>

#include "base/error.hpp"

namespace lodge::kvm::soft {

uint64_t event_identity(int fd) {
  if (::fcntl(fd, F_GETFD) < 0) throw_errno(EBADF, "the eventfd is not an open file descriptor");
  std::ifstream info("/proc/self/fdinfo/" + std::to_string(fd));
  // Without /proc the number itself is the best name; bit 63 keeps the two kinds apart.
  if (!info) return static_cast<uint64_t>(fd) | uint64_t{1} << 63;
  constexpr std::string_view id_key = "eventfd-id:";
  bool is_event = false;
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("eventfd-count:")) is_event = true;
    if (!line.starts_with(id_key)) continue;
    const size_t start = line.find_first_not_of(" \t", id_key.size());
    uint64_t id = 0;
    if (start != std::string::npos &&
        std::from_chars(line.data() + start, line.data() + line.size(), id).ec == std::errc{})
      return id;
  }
  if (!is_event) throw_errno(EINVAL, "the file descriptor is not an eventfd");
  return static_cast<uint64_t>(fd) | uint64_t{1} << 63;  // before Linux 5.2
}

}  // namespace lodge::kvm::soft
