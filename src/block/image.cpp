#include "block/image.hpp"

#include <cerrno>
#include <condition_variable>
#include <mutex>

namespace lodge::block {
namespace {

// Makes one asynchronous request and waits for it.
template <class Request>
int wait_for(Request request) noexcept {
  std::mutex mutex;
  std::condition_variable ended;
  int result = -1;
  request([&](int error) {
    const std::lock_guard lock(mutex);
    result = error;
    ended.notify_one();
  });
  std::unique_lock lock(mutex);
  ended.wait(lock, [&] { return result >= 0; });
  return result;
}

}  // namespace

int read(Image& image, void* data, size_t size, uint64_t offset) noexcept {
  const iovec buffer{data, size};
  return wait_for([&](Completion done) { image.read({&buffer, 1}, offset, std::move(done)); });
}

int write(Image& image, const void* data, size_t size, uint64_t offset) noexcept {
  const iovec buffer{const_cast<void*>(data), size};
  return wait_for([&](Completion done) { image.write({&buffer, 1}, offset, std::move(done)); });
}

int flush(Image& image) noexcept {
  return wait_for([&](Completion done) { image.flush(std::move(done)); });
}

int discard(Image& image, uint64_t offset, uint64_t length) noexcept {
  return wait_for([&](Completion done) { image.discard(offset, length, std::move(done)); });
}

int write_zeroes(Image& image, uint64_t offset, uint64_t length, bool unmap) noexcept {
  return wait_for([&](Completion done) { image.write_zeroes(offset, length, unmap, std::move(done)); });
}

int resize(Image& image, uint64_t size) noexcept {
  return wait_for([&](Completion done) { image.resize(size, std::move(done)); });
}

}  // namespace lodge::block
