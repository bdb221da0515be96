#include "block/copy.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "base/error.hpp"
#include "block/qcow2/compression.hpp"

namespace lodge::block {
namespace {

bool is_zero(std::span<const uint8_t> bytes) {
  return bytes.empty() ||
         (bytes[0] == 0 && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

void require(int error, const char* what) {
  if (error) throw_errno(error, what);
}

// Threads that each take the next chunk until there is none or one has failed.
class Copier {
 public:
  Copier(Image& from, Image& to, bool compress) : from_(from), to_(to), size_(from.size()) {
    if (compress) packed_ = &dynamic_cast<qcow2::Qcow2Image&>(to);
    unit_ = std::max<uint64_t>(to.discard_granularity(), 64 << 10);
    // What one thread does at a time: large transfers, but many of them.
    chunk_ = std::max<uint64_t>(unit_, 2 << 20);
  }

  void run(const Progress& progress) {
    std::vector<std::thread> threads;
    const unsigned count = std::clamp(std::thread::hardware_concurrency(), 2u, 8u);
    running_ = count;
    for (unsigned i = 0; i < count; i++) threads.emplace_back([this] { work(); });
    std::exception_ptr stop;
    while (running_ > 0) {
      try {
        if (progress && !stop) progress(done_, size_);
      } catch (...) {
        stop = std::current_exception();
        fail(ECANCELED, "copying");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    for (auto& thread : threads) thread.join();
    if (stop) std::rethrow_exception(stop);
    require(error_, error_text_);
    if (progress) progress(size_, size_);
  }

 private:
  void work() {
    std::vector<uint8_t> buffer(chunk_);
    for (;;) {
      const uint64_t at = next_.fetch_add(chunk_);
      if (at >= size_ || error_) break;
      const uint64_t size = std::min(chunk_, size_ - at);
      chunk(at, size, buffer);
      done_ += size;
    }
    running_--;
  }

  void fail(int error, const char* what) {
    if (error == 0) return;
    error_text_ = what;
    error_ = error;
  }

  void chunk(uint64_t at, uint64_t size, std::vector<uint8_t>& buffer) {
    if (from_.zeros_at(at, size) == size) return;
    const int error = block::read(from_, buffer.data(), size, at);
    fail(error, "the image cannot be read");
    uint64_t begin = 0;  // of what is not zero and not written yet
    for (uint64_t offset = 0; offset < size && !error_; offset += unit_) {
      const uint64_t length = std::min(unit_, size - offset);
      const auto unit = std::span(buffer).subspan(offset, length);
      const bool zero = is_zero(unit);
      if (!zero && !packed_) continue;
      plain(at, buffer, begin, offset);
      begin = offset + length;
      if (!zero) pack(at + offset, unit);
    }
    if (!error_) plain(at, buffer, begin, size);
  }

  void plain(uint64_t at, const std::vector<uint8_t>& buffer, uint64_t begin, uint64_t end) {
    if (begin >= end) return;
    fail(block::write(to_, buffer.data() + begin, end - begin, at + begin), "the copy cannot be written");
  }

  void pack(uint64_t at, std::span<const uint8_t> unit) {
    const uint64_t cluster = packed_->header().cluster_size();
    for (uint64_t offset = 0; offset < unit.size() && !error_; offset += cluster) {
      // The disk's last cluster may go on behind its end, as zeros.
      std::vector<uint8_t> whole(cluster);
      const auto part = unit.subspan(offset, std::min<uint64_t>(cluster, unit.size() - offset));
      if (is_zero(part)) continue;
      std::ranges::copy(part, whole.begin());
      const auto packed = qcow2::compress(packed_->header().compression, whole);
      const std::lock_guard lock(writing_);
      fail(packed.empty() ? block::write(to_, part.data(), part.size(), at + offset)
                          : packed_->write_compressed(packed, at + offset),
           "the copy cannot be written");
    }
  }

  Image& from_;
  Image& to_;
  qcow2::Qcow2Image* packed_ = nullptr;
  const uint64_t size_;
  uint64_t unit_, chunk_;
  std::mutex writing_;
  std::atomic<uint64_t> next_ = 0, done_ = 0;
  std::atomic<unsigned> running_ = 0;
  std::atomic<int> error_ = 0;
  std::atomic<const char*> error_text_ = "";
};

}  // namespace

void copy_contents(Image& from, Image& to, bool compress, const Progress& progress) {
  Copier(from, to, compress).run(progress);
  require(flush(to), "the copy cannot be written");
}

void copy_difference(Image& from, Image& to, const Progress& progress) {
  const uint64_t size = from.size(), chunk = 1 << 20;
  std::vector<uint8_t> wanted(chunk), there(chunk);
  for (uint64_t at = 0; at < size; at += chunk) {
    const uint64_t length = std::min(chunk, size - at);
    require(read(from, wanted.data(), length, at), "the image cannot be read");
    require(read(to, there.data(), length, at), "the copy cannot be read");
    for (uint64_t offset = 0; offset < length; offset += 4096) {
      const uint64_t part = std::min<uint64_t>(4096, length - offset);
      if (std::memcmp(&wanted[offset], &there[offset], part) == 0) continue;
      require(write(to, &wanted[offset], part, at + offset), "the copy cannot be written");
    }
    if (progress) progress(at + length, size);
  }
  require(flush(to), "the copy cannot be written");
}

void keep_contents(qcow2::Qcow2Image& overlay, Image* backing, const Progress& progress) {
  const uint64_t size = overlay.size(), chunk = std::max<uint64_t>(overlay.discard_granularity(), 1 << 20);
  std::vector<uint8_t> old(chunk), now(chunk);
  for (uint64_t at = 0; at < size;) {
    qcow2::Qcow2Image::Extent extent;
    require(overlay.map(at, std::min(chunk, size - at), extent), "the image cannot be read");
    if (extent.content == qcow2::Qcow2Image::Content::unallocated) {
      const auto shown = std::span(old).first(extent.length), shows = std::span(now).first(extent.length);
      require(read(overlay, shown.data(), shown.size(), at), "the old backing file cannot be read");
      std::ranges::fill(shows, 0);
      const uint64_t there =
          backing && at < backing->size() ? std::min(extent.length, backing->size() - at) : 0;
      if (there) require(read(*backing, shows.data(), there, at), "the new backing file cannot be read");
      for (uint64_t offset = 0; offset < extent.length; offset += 4096) {
        const uint64_t part = std::min<uint64_t>(4096, extent.length - offset);
        if (std::memcmp(&old[offset], &now[offset], part) == 0) continue;
        require(write(overlay, &old[offset], part, at + offset), "the image cannot be written");
      }
    }
    at += extent.length;
    if (progress) progress(at, size);
  }
  require(flush(overlay), "the image cannot be written");
}

}  // namespace lodge::block
