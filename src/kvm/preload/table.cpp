#include "kvm/preload/table.hpp"

#include <pthread.h>

#include <cerrno>
#include <new>
#include <utility>

#include "base/error.hpp"

namespace lodge::kvm::preload {
namespace {

// In a forked child the File's threads do not exist and its locks may be held for ever: it stays where it is.
void let_go(std::shared_ptr<File> file) noexcept {
  if (!file || !file->foreign()) return;
  alignas(std::shared_ptr<File>) std::byte grave[sizeof(std::shared_ptr<File>)];
  new (grave) std::shared_ptr<File>(std::move(file));
}

}  // namespace

Table& table() noexcept {
  // Zero pages until they are written to, and usable before any constructor has run.
  alignas(Table) static std::byte home[sizeof(Table)];
  static Table* const one = [] {
    auto* made = new (home) Table;
    ::pthread_atfork([] { table().before_fork(); }, [] { table().after_fork(); },
                     [] {
                       note_fork();
                       table().after_fork();
                     });
    return made;
  }();
  return *one;
}

std::shared_ptr<File> Table::find(int fd) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = files_.find(fd);
  return found == files_.end() ? nullptr : found->second;
}

void Table::set(int fd, std::shared_ptr<File> file) {
  if (fd >= limit) throw_errno(EMFILE, "a descriptor beyond the preload library's table");
  std::shared_ptr<File> old;
  {
    const std::lock_guard lock(mutex_);
    old = std::exchange(files_[fd], std::move(file));
    bits_[fd / 64].fetch_or(uint64_t{1} << fd % 64, std::memory_order_release);
  }
  let_go(std::move(old));
}

int Table::add(OpenedFile opened) {
  set(opened.fd.get(), std::move(opened.file));
  return opened.fd.release();
}

void Table::duplicate(int fd, int copy) noexcept try {
  if (auto file = find(fd)) set(copy, std::move(file));
} catch (...) {
  // No memory: the copy is then a descriptor like any other, on which ioctl is ENOTTY.
}

void Table::remove(int fd) noexcept {
  if (!contains(fd)) return;
  std::shared_ptr<File> old;  // destroyed without the lock: that closes other descriptors
  {
    const std::lock_guard lock(mutex_);
    const auto found = files_.find(fd);
    if (found == files_.end()) return;
    old = std::move(found->second);
    files_.erase(found);
    bits_[fd / 64].fetch_and(~(uint64_t{1} << fd % 64));
  }
  let_go(std::move(old));
}

void Table::remove_range(unsigned first, unsigned last) noexcept {
  for (;;) {
    int fd = -1;
    {
      const std::lock_guard lock(mutex_);
      const auto found = first < limit ? files_.lower_bound(static_cast<int>(first)) : files_.end();
      if (found == files_.end() || static_cast<unsigned>(found->first) > last) return;
      fd = found->first;
    }
    remove(fd);
  }
}

}  // namespace lodge::kvm::preload
