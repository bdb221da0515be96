#include "base/error.hpp"

#include <cerrno>

namespace lodge {

void throw_errno(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

void throw_errno(const std::string& what) {
  throw_errno(errno, what);
}

}  // namespace lodge
