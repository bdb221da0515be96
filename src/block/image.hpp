// Disk images: what a virtual disk, a converter and a test see of one, whatever its format.
//
// All requests are asynchronous. A request may be made from any thread. Its completion is called exactly
// once, with 0 or a positive errno, without any lock of the image held, and on any thread: also on the
// caller's own, before the request's call has returned. A completion must not block and must not throw; it
// may make further requests.
//
// Offsets and lengths are in bytes and need no alignment; a range that leaves the image completes with
// EINVAL. A request that changes a read-only image completes with EROFS. A write is on stable storage once a
// flush that was requested after the write's completion has completed. Overlapping requests in flight have no
// order.
//
// An image file is hostile input: opening throws UsageError, requests end in EIO, nothing crashes or hangs.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace lodge::block {

using Completion = std::move_only_function<void(int error)>;

class Image {
 public:
  Image() = default;
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;
  // Waits for requests in flight, then closes as close() does; an error of that is lost.
  virtual ~Image() = default;

  // Scatter-gather transfers. The vector of buffers is copied, the buffers themselves stay the caller's and
  // must live until completion. After an error the contents of read buffers are unspecified.
  virtual void read(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept = 0;
  virtual void write(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept = 0;
  // Makes every write that has completed durable.
  virtual void flush(Completion done) noexcept = 0;
  // The range's contents are no longer needed: space may be given back, later reads give zeros or old data.
  virtual void discard(uint64_t offset, uint64_t length, Completion done) noexcept = 0;
  // Later reads give zeros. `unmap`: space may be given back; otherwise it stays reserved where it is.
  virtual void write_zeroes(uint64_t offset, uint64_t length, bool unmap, Completion done) noexcept = 0;
  // Changes the virtual size while the image is in use; requests beyond a smaller size fail from now on. The
  // caller tells its guest.
  virtual void resize(uint64_t size, Completion done) noexcept = 0;

  // Requests between plug() and unplug() may be handed to the kernel together, at the latest by unplug().
  // The two are made by one thread around a batch; threads do not see each other's.
  virtual void plug() noexcept {}
  virtual void unplug() noexcept {}

  virtual uint64_t size() const noexcept = 0;  // bytes; changes only by resize()
  virtual bool read_only() const noexcept = 0;
  virtual std::string_view format() const noexcept = 0;  // "raw", "qcow2"
  // Bytes: requests of multiples of this, so aligned, are never done by reading, changing and writing back.
  virtual uint32_t block_size() const noexcept { return 512; }
  // Bytes: the unit in which space is allocated and given back.
  virtual uint32_t discard_granularity() const noexcept { return 4096; }

  // How many bytes from `offset` on, `length` at most, are known to read as zeros without reading them. For
  // tools: may block, and means something only while nobody writes.
  virtual uint64_t zeros_at(uint64_t offset, uint64_t length) noexcept {
    static_cast<void>(offset), static_cast<void>(length);
    return 0;
  }

  // Waits for requests in flight, writes everything out and gives the lock up. Returns 0 or a positive errno.
  // Only the first call does anything; no request may be made afterwards.
  virtual int close() noexcept = 0;
};

// Who executes transfers: io_uring where the kernel permits it (automatic), or threads.
enum class Engine { automatic, uring, threads };

// Reads, writes and write-zeroes. 0: no limit.
struct RateLimits {
  uint64_t operations = 0;  // a second
  uint64_t bytes = 0;       // a second
  // How much may come at once after a pause; 0: a tenth of a second's worth.
  uint64_t operations_burst = 0;
  uint64_t bytes_burst = 0;
};

struct OpenOptions {
  std::string format;  // "raw" or "qcow2"; empty: by the contents
  bool read_only =
      false;  // neither the file nor the disk changes; others may read the image at the same time
  Engine engine = Engine::automatic;
  bool lock = true;  // refuse an image that another process uses in a way that does not go together with ours
  // qcow2's external data file. Empty: the one that the image names, if that is in the image's directory: an
  // image must not choose which of the host's files a guest may write.
  std::string data_file;
  // Changes go into a temporary file that vanishes with the image; the image itself is only read. The file is
  // made in $TMPDIR, or else in /var/tmp.
  bool temporary = false;
  RateLimits limits;
  bool backing = true;  // false: without its backing file, whose contents then read as zeros
};

// Opens an image. Throws UsageError with one line that names the file, what is wrong and the remedy; in
// particular when another process holds the image, which is then named.
std::unique_ptr<Image> open_image(const std::string& path, const OpenOptions& options);

// The same requests, waiting for their end: for tools and tests, not for a thread that runs completions.
// Returns 0 or a positive errno.
int read(Image& image, void* data, size_t size, uint64_t offset) noexcept;
int write(Image& image, const void* data, size_t size, uint64_t offset) noexcept;
int flush(Image& image) noexcept;
int discard(Image& image, uint64_t offset, uint64_t length) noexcept;
int write_zeroes(Image& image, uint64_t offset, uint64_t length, bool unmap) noexcept;
int resize(Image& image, uint64_t size) noexcept;

}  // namespace lodge::block
