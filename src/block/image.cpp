#include "block/image.hpp"

#include <array>
#include <cerrno>
#include <condition_variable>
#include <mutex>

#include "base/error.hpp"
#include "block/probe.hpp"
#include "block/raw.hpp"

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

std::unique_ptr<Image> open_image(const std::string& path, const OpenOptions& options) {
  if (!options.format.empty() && options.format != "raw" && options.format != "qcow2")
    usage_error("{}: unknown image format '{}'; there are raw and qcow2", path, options.format);
  auto storage = std::make_unique<FileStorage>(path, options.read_only ? Use::read : Use::write, options.lock,
                                               make_engine(options.engine));
  std::array<uint8_t, magic_size> start{};
  if (const int error = storage->read(start.data(), start.size(), 0)) throw_errno(error, path);
  const bool formatted = looks_formatted(start);
  if (options.format == "qcow2" || (options.format.empty() && formatted))
    usage_error("{}: qcow2 images are not supported yet", path);
  return std::make_unique<RawImage>(std::move(storage), options.format.empty());
}

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
