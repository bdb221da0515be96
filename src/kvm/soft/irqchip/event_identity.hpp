// Which eventfd a descriptor refers to. KVM compares the eventfd itself on de-assignment, so a duplicate of
// the descriptor works as well.
#pragma once

#include <cstdint>

namespace lodge::kvm::soft {

// Equal for descriptors of the same eventfd. Throws std::system_error: EBADF (not open), EINVAL (not an
// eventfd).
uint64_t event_identity(int fd);

}  // namespace lodge::kvm::soft
