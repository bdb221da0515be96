// KVM_IRQFD by the kernel's Documentation/virt/kvm/api.rst, section 4.75.
#include "kvm/soft/irqchip/irqfd.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <span>

#include "base/error.hpp"
#include "kvm/soft/irqchip/event_identity.hpp"
#include "kvm/soft/irqchip/routing.hpp"

namespace lodge::kvm::soft {
namespace {
constexpr uint64_t tag_wake = 0;
}

Irqfds::~Irqfds() {
  if (!thread_.joinable()) return;
  stop_.store(true);
  signal_event(wake_.get());
  thread_.join();
}

void Irqfds::set(const kvm_irqfd& request) {
  if ((request.flags & ~static_cast<uint32_t>(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE)) != 0)
    throw_errno(EINVAL, "unknown irqfd flags");
  if (request.gsi >= GsiRouting::max_gsis) throw_errno(EINVAL, "the irqfd's GSI is out of range");
  const uint64_t identity = event_identity(static_cast<int>(request.fd));
  const std::lock_guard lock(mutex_);
  if ((request.flags & KVM_IRQFD_FLAG_DEASSIGN) != 0)
    deassign(request, identity);
  else
    assign(request, identity);
}

void Irqfds::assign(const kvm_irqfd& request, uint64_t identity) {
  const bool taken =
      std::ranges::any_of(entries_, [&](const auto& item) { return item.second.identity == identity; });
  if (taken) throw_errno(EBUSY, "the eventfd is an irqfd already");
  Entry entry{.identity = identity,
              .gsi = request.gsi,
              .event = Fd::duplicate(static_cast<int>(request.fd)),
              .resample = {}};
  const bool resamples = (request.flags & KVM_IRQFD_FLAG_RESAMPLE) != 0;
  if (resamples) {
    event_identity(static_cast<int>(request.resamplefd));  // throws unless it is an eventfd
    entry.resample = Fd::duplicate(static_cast<int>(request.resamplefd));
  }
  start();
  const uint64_t tag = next_tag_++;
  epoll_event event{.events = EPOLLIN, .data = {.u64 = tag}};
  const int fd = entry.event.get();
  const auto [position, inserted] = entries_.emplace(tag, std::move(entry));
  // Level-triggered: an event that was signalled before counts too.
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    const int error = errno;
    entries_.erase(position);
    throw_errno(error, "cannot watch the eventfd");
  }
  if (resamples) resampling_.fetch_add(1);
}

void Irqfds::deassign(const kvm_irqfd& request, uint64_t identity) {
  for (auto it = entries_.begin(); it != entries_.end();) {
    Entry& entry = it->second;
    if (entry.identity != identity || entry.gsi != request.gsi) {
      ++it;
      continue;
    }
    // A duplicate elsewhere keeps the file open, so closing alone would leave it in the epoll set.
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, entry.event.get(), nullptr);
    const bool resampled = static_cast<bool>(entry.resample);
    it = entries_.erase(it);
    if (!resampled) continue;
    resampling_.fetch_sub(1);
    // The line of the last resampling irqfd on a GSI falls with it.
    const bool shared = std::ranges::any_of(
        entries_, [&](const auto& item) { return item.second.resample && item.second.gsi == request.gsi; });
    if (!shared) client_.set_irq(request.gsi, source_resample, false);
  }
}

void Irqfds::start() {
  if (thread_.joinable()) return;
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) throw_errno("cannot create an epoll descriptor");
  wake_ = Fd::event();
  epoll_event event{.events = EPOLLIN, .data = {.u64 = tag_wake}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0)
    throw_errno("cannot watch an eventfd");
  thread_ = std::thread([this] { loop(); });
}

void Irqfds::loop() noexcept {
  std::array<epoll_event, 32> events{};
  while (!stop_.load()) {
    const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
    for (const epoll_event& event : std::span(events).first(static_cast<size_t>(std::max(count, 0)))) {
      if (event.data.u64 == tag_wake) continue;
      const std::lock_guard lock(mutex_);
      const auto it = entries_.find(event.data.u64);
      if (it == entries_.end()) continue;  // de-assigned meanwhile
      const Entry& entry = it->second;
      if (take_event(entry.event.get()) == 0) continue;
      if (entry.resample) {
        client_.set_irq(entry.gsi, source_resample, true);
      } else {
        client_.set_irq(entry.gsi, source_user, true);
        client_.set_irq(entry.gsi, source_user, false);
      }
    }
  }
}

void Irqfds::acked(uint32_t gsi) noexcept {
  if (resampling_.load(std::memory_order_relaxed) == 0) return;
  const std::lock_guard lock(mutex_);
  bool lowered = false;
  for (const auto& [tag, entry] : entries_) {
    if (!entry.resample || entry.gsi != gsi) continue;
    if (!lowered) client_.set_irq(gsi, source_resample, false);
    lowered = true;
    signal_event(entry.resample.get());
  }
}

}  // namespace lodge::kvm::soft
