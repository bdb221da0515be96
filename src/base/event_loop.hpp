// A thread that waits for descriptors and calls back: queue kicks, back ends, completions.
#pragma once

#include <sys/epoll.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "base/fd.hpp"

namespace lodge {

// Any thread, save that the loop must not be destroyed by one of its own callbacks. Watches go before their
// loop.
class EventLoop {
 public:
  // `events` as epoll(7) reports them. Must not throw; while it runs nobody else on this loop is served.
  using Callback = std::function<void(uint32_t events)>;

  // One descriptor being watched. Destroying it waits until its callback is not running, unless that callback
  // itself destroys it; afterwards it is not called any more.
  class Watch {
   public:
    Watch() noexcept = default;
    Watch(Watch&& other) noexcept : loop_(std::exchange(other.loop_, nullptr)), id_(other.id_) {}
    Watch& operator=(Watch&& other) noexcept {
      if (this != &other) {
        reset();
        loop_ = std::exchange(other.loop_, nullptr);
        id_ = other.id_;
      }
      return *this;
    }
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;
    ~Watch() { reset(); }
    // Other events from now on; 0: none, though errors and hang-ups are always reported.
    void set_events(uint32_t events) noexcept;
    void reset() noexcept;

   private:
    friend class EventLoop;
    Watch(EventLoop& loop, uint64_t id) noexcept : loop_(&loop), id_(id) {}
    EventLoop* loop_ = nullptr;
    uint64_t id_ = 0;
  };

  // Starts the thread. Throws std::system_error.
  explicit EventLoop(const std::string& thread_name);
  ~EventLoop();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  // `fd` (not owned) stays open as long as the watch. Throws std::system_error (EPERM: a regular file).
  [[nodiscard]] Watch watch(int fd, uint32_t events, Callback callback);
  // The same for an eventfd, whose count is taken before each call.
  [[nodiscard]] Watch watch_event(int fd, std::function<void()> callback);

  bool on_loop_thread() const noexcept { return std::this_thread::get_id() == thread_.get_id(); }

 private:
  struct Entry {
    Entry(int descriptor, Callback function) : fd(descriptor), callback(std::move(function)) {}
    int fd;
    Callback callback;
  };
  void loop() noexcept;
  void dispatch(uint64_t id, uint32_t events) noexcept;
  void forget(uint64_t id) noexcept;

  Fd epoll_, wake_;
  std::mutex mutex_;
  std::condition_variable idle_;  // a callback has returned
  std::map<uint64_t, std::shared_ptr<Entry>> entries_;
  uint64_t next_id_ = 1;  // 0 is the wake-up
  uint64_t running_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace lodge
