#include "base/event_loop.hpp"

#include <pthread.h>

#include <array>
#include <cerrno>

#include "base/error.hpp"

namespace lodge {

EventLoop::EventLoop(const std::string& thread_name)
    : epoll_(::epoll_create1(EPOLL_CLOEXEC)), wake_(Fd::event()) {
  if (!epoll_) throw_errno("cannot create an event loop (epoll_create1)");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = 0;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0) throw_errno("epoll_ctl");
  thread_ = std::thread([this, name = thread_name.substr(0, 15)] {
    ::pthread_setname_np(::pthread_self(), name.c_str());
    loop();
  });
}

EventLoop::~EventLoop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  signal_event(wake_.get());
  thread_.join();
}

EventLoop::Watch EventLoop::watch(int fd, uint32_t events, Callback callback) {
  const std::lock_guard lock(mutex_);
  const uint64_t id = next_id_++;
  epoll_event event{};
  event.events = events;
  event.data.u64 = id;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw_errno("cannot watch a descriptor");
  entries_.emplace(id, std::make_shared<Entry>(Entry{fd, std::move(callback)}));
  return Watch(*this, id);
}

EventLoop::Watch EventLoop::watch_event(int fd, std::function<void()> callback) {
  return watch(fd, EPOLLIN, [fd, callback = std::move(callback)](uint32_t) {
    take_event(fd);
    callback();
  });
}

void EventLoop::Watch::set_events(uint32_t events) noexcept {
  if (!loop_) return;
  const std::lock_guard lock(loop_->mutex_);
  const auto found = loop_->entries_.find(id_);
  if (found == loop_->entries_.end()) return;
  epoll_event event{};
  event.events = events;
  event.data.u64 = id_;
  ::epoll_ctl(loop_->epoll_.get(), EPOLL_CTL_MOD, found->second->fd, &event);
}

void EventLoop::Watch::reset() noexcept {
  if (EventLoop* loop = std::exchange(loop_, nullptr)) loop->forget(id_);
}

void EventLoop::forget(uint64_t id) noexcept {
  std::unique_lock lock(mutex_);
  const auto found = entries_.find(id);
  if (found == entries_.end()) return;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second->fd, nullptr);
  const std::shared_ptr<Entry> entry = std::move(found->second);
  entries_.erase(found);
  if (!on_loop_thread()) idle_.wait(lock, [&] { return running_ != id; });
}

// Identifiers are never used twice, so an event that was fetched before its watch went away finds nobody.
void EventLoop::dispatch(uint64_t id, uint32_t events) noexcept {
  std::shared_ptr<Entry> entry;
  {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(id);
    if (found == entries_.end()) return;
    entry = found->second;
    running_ = id;
  }
  entry->callback(events);
  const std::lock_guard lock(mutex_);
  running_ = 0;
  idle_.notify_all();
}

void EventLoop::loop() noexcept {
  std::array<epoll_event, 16> events;
  for (;;) {
    const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
    }
    for (int i = 0; i < count; i++)
      dispatch(events[static_cast<size_t>(i)].data.u64, events[static_cast<size_t>(i)].events);
  }
}

}  // namespace lodge
