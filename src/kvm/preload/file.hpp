// What stands behind a descriptor of the preload library: /dev/kvm, a VM or a vCPU, each answering the ioctls
// that the kernel's Documentation/virt/kvm/api.rst gives it.
#pragma once

#include <memory>
#include <string>

#include "base/fd.hpp"

namespace lodge::kvm::preload {

class File {
 public:
  // Whose ioctls it answers: the process's that has made it, or those of its forked children, too.
  enum class Owner { one_process, any_process };
  explicit File(Owner owner = Owner::one_process);
  virtual ~File() = default;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // 0 or a positive result, else a negative errno. Any thread. With LODGE_KVM_TRACE in the environment what
  // is refused is named on stderr.
  int ioctl(unsigned long request, unsigned long argument) noexcept;
  // One process's, made before a fork, in whose child there are neither its threads nor its locks: it answers
  // EIO there, as the kernel does, and is never destroyed.
  bool foreign() const noexcept;
  // The client has mapped `size` bytes of the descriptor from `offset` at `start`. False: it must not stay.
  virtual bool mapped([[maybe_unused]] void* start, [[maybe_unused]] size_t size,
                      [[maybe_unused]] uint64_t offset) noexcept {
    return true;
  }

 protected:
  // Throws std::system_error.
  virtual int answer(unsigned long request, unsigned long argument) = 0;
  virtual const char* name() const noexcept = 0;

 private:
  int attempt(unsigned long request, unsigned long argument, std::string& why) noexcept;

  const Owner owner_;
  const unsigned forks_;
};

// A descriptor for the client, and what answers on it.
struct OpenedFile {
  Fd fd;
  std::shared_ptr<File> file;
};

// The descriptor that stands for a File: a device that has nothing to read or to map, opened with the flags
// of open(2). Empty, with errno, when that is refused.
Fd placeholder(int flags) noexcept;

// In the child of a fork.
void note_fork() noexcept;

// open("/dev/kvm", flags). Throws std::system_error.
OpenedFile open_system(int flags);

}  // namespace lodge::kvm::preload
