// The C library's functions behind those that we put in front of them. Our own code says plain close() and so
// on and goes through our front like the client does; sigaction alone must not.
#pragma once

#include <signal.h>

namespace lodge::kvm::preload::real {

// The next definition of `name` behind this library; ends the process when there is none, which the names
// that are asked for rule out. Not for signal handlers.
void* next(const char* name) noexcept;

int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept;

}  // namespace lodge::kvm::preload::real
