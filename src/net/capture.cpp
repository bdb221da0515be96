// pcap files (draft-ietf-opsawg-pcap): the format with nanoseconds, link type Ethernet, the host's byte
// order. A thread writes; packets reach it through a bounded buffer.
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "net/interposer.hpp"

namespace lodge::net {

namespace {

struct FileHeader {
  uint32_t magic = 0xa1b2'3c4d;  // nanoseconds
  uint16_t major = 2, minor = 4;
  uint32_t reserved1 = 0, reserved2 = 0;
  uint32_t longest = max_frame;
  uint32_t link_type = 1;  // Ethernet
};
static_assert(sizeof(FileHeader) == 24);
struct PacketRecord {
  uint32_t seconds, nanoseconds, captured, original;
};

// What may wait for a slow disk.
constexpr size_t max_buffered = 8 << 20;

class CaptureFile {
 public:
  explicit CaptureFile(const std::string& path) : path_(path) {
    constexpr int flags = O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    file_.reset(::open(path.c_str(), flags | O_CREAT | O_EXCL, 0600));
    created_ = static_cast<bool>(file_);
    if (!file_ && errno == EEXIST) file_.reset(::open(path.c_str(), flags));
    if (!file_) usage_error("--net ...,pcap={}: cannot write this file: {}", path, std::strerror(errno));
    thread_ = std::thread([this] { loop(); });
  }
  ~CaptureFile() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    thread_.join();
    if (created_ && !begun_) ::unlink(path_.c_str());
  }
  // What was in the file goes, what is added comes into it.
  void begin() noexcept {
    const std::lock_guard lock(mutex_);
    if (std::exchange(begun_, true)) return;
    std::ignore = ::ftruncate(file_.get(), 0);  // a pipe has nothing to lose
    const FileHeader header;
    append(&header, sizeof header);
    wake_.notify_one();
  }
  // Any thread; never waits for the file.
  void add(std::span<const iovec> frame, size_t size) noexcept {
    timespec now{};
    ::clock_gettime(CLOCK_REALTIME, &now);
    const PacketRecord record{static_cast<uint32_t>(now.tv_sec), static_cast<uint32_t>(now.tv_nsec),
                              static_cast<uint32_t>(size), static_cast<uint32_t>(size)};
    const std::lock_guard lock(mutex_);
    if (!begun_ || waiting_.size() + sizeof record + size > max_buffered) return;
    const bool first = waiting_.empty();
    append(&record, sizeof record);
    const size_t at = waiting_.size();
    waiting_.resize(at + size);
    gather(frame, std::span(waiting_).subspan(at));
    if (first) wake_.notify_one();
  }

 private:
  void append(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    waiting_.insert(waiting_.end(), bytes, bytes + size);
  }
  void loop() noexcept {
    ::pthread_setname_np(::pthread_self(), "lodge-pcap");
    sigset_t all;  // a pipe whose reader has gone is this thread's matter alone
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
    std::unique_lock lock(mutex_);
    while (!stop_ || !waiting_.empty()) {
      if (waiting_.empty()) {
        wake_.wait(lock);
        continue;
      }
      writing_.swap(waiting_);
      lock.unlock();
      write_all();
      lock.lock();
    }
  }
  // A file that takes no more stays as it is. A pipe that is not read keeps nobody from ending.
  void write_all() noexcept {
    for (size_t done = 0; done < writing_.size() && !failed_;) {
      const ssize_t count = ::write(file_.get(), writing_.data() + done, writing_.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && errno == EAGAIN && !stop_) {
        pollfd room{file_.get(), POLLOUT, 0};
        ::poll(&room, 1, 100);
        continue;
      }
      failed_ = count <= 0;
      if (!failed_) done += static_cast<size_t>(count);
    }
    writing_.clear();
  }

  const std::string path_;
  Fd file_;
  bool created_ = false;
  bool failed_ = false;  // of the thread
  std::vector<uint8_t> writing_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool begun_ = false;
  std::vector<uint8_t> waiting_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

class Capture final : public Interposer {
 public:
  Capture(std::unique_ptr<Backend> watched, const std::string& path)
      : Interposer(std::move(watched)), file_(path) {}

  void keep() noexcept override {
    file_.begin();
    Interposer::keep();
  }

  bool send(unsigned queue, const PacketHeader& header, std::span<const iovec> frame) noexcept override {
    if (!network().send(queue, header, frame)) return false;
    file_.add(frame, total_size(frame));
    return true;
  }

 private:
  class Watched final : public Source {
   public:
    Watched(Source& source, CaptureFile& file) : source_(source), file_(file) {}
    size_t largest() noexcept override { return source_.largest(); }
    size_t read(PacketHeader& header, std::span<const iovec> room) noexcept override {
      const size_t size = source_.read(header, room);
      if (size != 0) file_.add(room, size);
      return size;
    }

   private:
    Source& source_;
    CaptureFile& file_;
  };
  Received receive(unsigned queue, Source& source) noexcept override {
    Watched watched(source, file_);
    return card().receive(queue, watched);
  }

  CaptureFile file_;
};

}  // namespace

std::unique_ptr<Backend> capture(std::unique_ptr<Backend> network, const std::string& path) {
  return std::make_unique<Capture>(std::move(network), path);
}

}  // namespace lodge::net
