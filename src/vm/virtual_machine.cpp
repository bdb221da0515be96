#include "vm/virtual_machine.hpp"

#include <fmt/format.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "base/error.hpp"
#include "vm/report.hpp"

namespace lodge::vm {
namespace {

uint64_t load_bytes(std::span<const uint8_t> bytes) noexcept {
  uint64_t value = 0;
  std::memcpy(&value, bytes.data(), std::min(bytes.size(), sizeof value));
  return value;
}

void store_bytes(std::span<uint8_t> bytes, uint64_t value) noexcept {
  std::memcpy(bytes.data(), &value, std::min(bytes.size(), sizeof value));
}

constexpr std::chrono::seconds statistics_patience(1);

}  // namespace

VirtualMachine::VirtualMachine(VmConfig config, std::unique_ptr<kvm::System> system,
                               std::unique_ptr<Backends> backends)
    : config_(std::move(config)), system_(std::move(system)), backends_(std::move(backends)) {
  if (config_.seed) backends_->add_disk(seed_file, seed_image(*config_.seed));
  build_machine();
}

void VirtualMachine::build_machine() {
  machine_ = std::make_unique<Machine>(config_, *system_, clock_, *backends_, *this);
  machine_->on_release([this] {
    const std::lock_guard lock(mutex_);
    released_ = true;
    changed_.notify_all();
  });
}

VirtualMachine::~VirtualMachine() {
  stop_vcpus();
  machine_.reset();
  // Their threads may call in here until they are gone: before the members that those calls use.
  backends_.reset();
}

Ending VirtualMachine::run() {
  backends_->keep();
  {
    const std::lock_guard lock(mutex_);
    started_ = std::chrono::steady_clock::now();
  }
  for (;;) {
    start_vcpus();
    const Event event = wait_for_event();
    stop_vcpus();
    collect_statistics();
    if (!event.restart) {
      backends_->flush();
      return end_with(event.ending);
    }
    if (auto failure = rebuild()) {
      backends_->flush();
      return end_with(std::move(*failure));
    }
    std::lock_guard lock(mutex_);
    resets_++;
    if (event_->restart) event_.reset();  // else somebody has ended the VM in the meantime
  }
}

// Takes apart meanwhile what the guest lets go: a vCPU's thread, which sees that, cannot.
VirtualMachine::Event VirtualMachine::wait_for_event() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return event_ || released_; });
    if (event_) return *event_;
    released_ = false;
    lock.unlock();
    {
      const std::lock_guard machine_lock(machine_mutex_);
      drop_released();
    }
    lock.lock();
  }
}

// With machine_mutex_ held. What has gone is not in the machine that a reset makes either.
void VirtualMachine::drop_released() {
  if (!machine_) return;
  for (const DeviceConfig& gone : machine_->take_released()) {
    const auto known = std::ranges::find(config_.devices, gone);
    if (known != config_.devices.end()) config_.devices.erase(known);
  }
}

// A reset is a new machine: nothing of the old one can leak into it. The old one goes first, so that memory
// is not needed twice. Its guest may have left a disk without a kernel: that is an ending like others.
std::optional<Ending> VirtualMachine::rebuild() {
  const std::lock_guard lock(machine_mutex_);
  machine_->pull_leaving();
  drop_released();
  machine_.reset();
  const auto failed = [](Ending::Cause cause, const std::exception& error) {
    return Ending{
        .cause = cause,
        .message = fmt::format("the guest reset the machine, which cannot start again: {}", error.what())};
  };
  try {
    build_machine();
    machine_->set_paused(paused());
  } catch (const UsageError& error) {
    return failed(Ending::Cause::no_restart, error);
  } catch (const std::exception& error) {
    return failed(Ending::Cause::host_failure, error);
  }
  return std::nullopt;
}

Ending VirtualMachine::end_with(Ending ending) {
  const std::lock_guard lock(mutex_);
  ended_ = std::chrono::steady_clock::now();
  return ending;
}

void VirtualMachine::start_vcpus() {
  stop_ = false;
  {
    const std::lock_guard lock(mutex_);
    counted_.assign(machine_->cpus(), Counted{.running = true, .answered = request_});
  }
  for (unsigned i = 0; i < machine_->cpus(); i++) threads_.emplace_back([this, i] { run_vcpu(i); });
}

void VirtualMachine::stop_vcpus() noexcept {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  if (!threads_.empty()) kick_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

// No vCPU thread is there; each has handed over what it had counted.
void VirtualMachine::collect_statistics() {
  const std::lock_guard lock(mutex_);
  for (const Counted& vcpu : counted_) {
    add_statistics(past_accelerator_, vcpu.accelerator);
    past_vcpu_ns_ += vcpu.cpu_ns;
  }
  counted_.clear();
}

// On the vCPU's own thread.
void VirtualMachine::hand_over(unsigned index, uint64_t request) noexcept {
  timespec used{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  auto accelerator = machine_->vcpu(index).statistics();
  const std::lock_guard lock(mutex_);
  Counted& counted = counted_[index];
  counted.accelerator = std::move(accelerator);
  counted.cpu_ns = static_cast<uint64_t>(used.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(used.tv_nsec);
  counted.answered = request;
  changed_.notify_all();
}

// With machine_mutex_ and `lock`, of mutex_, held. A vCPU that does not answer in time, because the host does
// not let it run, is known by what it has said before.
void VirtualMachine::ask_vcpus(std::unique_lock<std::mutex>& lock) noexcept {
  const auto answered = [this, request = ++request_](const Counted& counted) {
    return !counted.running || counted.answered >= request;
  };
  if (std::ranges::all_of(counted_, answered)) return;
  changed_.notify_all();  // those that are paused
  lock.unlock();
  kick_all();
  lock.lock();
  changed_.wait_for(lock, statistics_patience, [&] { return std::ranges::all_of(counted_, answered); });
}

void VirtualMachine::kick_all() noexcept {
  for (unsigned i = 0; i < machine_->cpus(); i++) machine_->vcpu(i).kick();
}

// Any thread, also a vCPU's: it only leaves a note. run() does the rest.
void VirtualMachine::post(Event event) noexcept {
  std::lock_guard lock(mutex_);
  // The first counts, and what chips say after it belongs to a machine that is gone; the user always counts.
  if (event_ && event.ending.cause != Ending::Cause::outside) return;
  event_ = std::move(event);
  stop_ = true;
  changed_.notify_all();
}

void VirtualMachine::restart_or(Ending::Cause cause, std::string message) noexcept {
  if (config_.reboot)
    post({.restart = true});
  else
    post({.ending = {.cause = cause, .message = std::move(message)}});
}

void VirtualMachine::request(machine::PowerRequest request) noexcept {
  if (request == machine::PowerRequest::reset)
    restart_or(Ending::Cause::reset);
  else
    post({.ending = {.cause = Ending::Cause::power_off}});
}

void VirtualMachine::exit_with(int status) noexcept {
  post({.ending = {.cause = Ending::Cause::debug_exit, .debug_status = status}});
}

void VirtualMachine::reset() noexcept {
  restart_or(Ending::Cause::reset);
}
void VirtualMachine::end() noexcept {
  post({.ending = {.cause = Ending::Cause::outside}});
}

bool VirtualMachine::press_power_button() noexcept {
  std::lock_guard lock(machine_mutex_);
  return machine_ && machine_->press_power_button();
}

void VirtualMachine::pause() noexcept {
  std::lock_guard machine_lock(machine_mutex_);  // devices and processors agree, whoever else calls
  if (machine_) machine_->set_paused(true);
  {
    std::lock_guard lock(mutex_);
    paused_ = true;
  }
  if (machine_) kick_all();
}

void VirtualMachine::resume() noexcept {
  std::lock_guard machine_lock(machine_mutex_);
  if (machine_) machine_->set_paused(false);
  std::lock_guard lock(mutex_);
  paused_ = false;
  changed_.notify_all();
}

void VirtualMachine::resize_terminal(uint16_t columns, uint16_t rows) noexcept {
  std::lock_guard lock(machine_mutex_);  // a reset may open streams meanwhile
  backends_->resize_terminal(columns, rows);
}

int VirtualMachine::resize_disk(std::string_view name, uint64_t bytes) noexcept {
  std::lock_guard lock(machine_mutex_);
  device::Disk* disk = machine_ ? machine_->disk(name) : nullptr;
  return disk ? disk->resize(bytes) : ENODEV;
}

std::string VirtualMachine::plug(DeviceConfig device) {
  const std::lock_guard lock(machine_mutex_);
  if (!machine_) usage_error("the machine has ended");
  drop_released();
  const auto* const row = device::check_device(device.name, device.options, device.spelling).first;
  if (std::ranges::none_of(row->options, [](const auto& option) { return option.name == "bus"; }))
    usage_error("{} cannot come to a running machine; VirtIO devices can", device.name);
  auto devices = config_.devices;
  devices.push_back(device);
  check_names(devices);
  auto& bus = device.options["bus"];
  if (bus.empty()) {
    const auto slots = machine_->slots();
    const auto empty = std::ranges::find(slots, nullptr, &Machine::Slot::device);
    if (slots.empty()) usage_error("the machine has no slots for more devices; start it with --hotplug 2");
    if (empty == slots.end())
      usage_error("the machine's slots are full ({} of them); remove a device first", slots.size());
    bus = empty->port;
  }
  machine_->plug(device);
  std::string port = bus;
  config_.devices.push_back(std::move(device));
  return port;
}

bool VirtualMachine::unplug(std::string_view port) noexcept {
  const std::lock_guard lock(machine_mutex_);
  return machine_ && machine_->ask_to_let_go(port);
}

bool VirtualMachine::paused() noexcept {
  const std::lock_guard lock(mutex_);
  return paused_;
}

bool VirtualMachine::with_machine(const std::function<void(Machine&)>& use) {
  const std::lock_guard lock(machine_mutex_);
  if (machine_) use(*machine_);
  return machine_ != nullptr;
}

// Also hands over what was counted when somebody asks. False when the machine is to stop.
bool VirtualMachine::wait_while_paused(unsigned index) noexcept {
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto asked = [&] { return counted_[index].answered < request_; };
    changed_.wait(lock, [&] { return !paused_ || stop_ || asked(); });
    if (stop_) return false;
    if (!asked()) return true;
    const uint64_t request = request_;
    lock.unlock();
    hand_over(index, request);
    lock.lock();
  }
}

void VirtualMachine::run_vcpu(unsigned index) noexcept {
  drive(index);
  hand_over(index, UINT64_MAX);
  const std::lock_guard lock(mutex_);
  counted_[index].running = false;
}

void VirtualMachine::drive(unsigned index) noexcept {
  ::pthread_setname_np(::pthread_self(), fmt::format("lodge-cpu{}", index).c_str());
  kvm::Vcpu& vcpu = machine_->vcpu(index);
  while (!stop_) {
    const kvm::Exit exit = vcpu.run();
    // An interrupted run is a kick (stop or pause), a stray signal, or a processor that waits to be started.
    if (exit.interrupted() || exit.status() == -EAGAIN) {
      if (!wait_while_paused(index)) return;
      continue;
    }
    if (!handle(vcpu, exit)) return;
  }
}

bool VirtualMachine::handle(kvm::Vcpu& vcpu, const kvm::Exit& exit) noexcept {
  if (exit.status() < 0) {
    fail(vcpu, exit);
    return false;
  }
  switch (exit.reason()) {
    case KVM_EXIT_IO: handle_io(exit.io()); return true;
    case KVM_EXIT_MMIO: handle_mmio(exit.mmio()); return true;
    case KVM_EXIT_SHUTDOWN:
      restart_or(Ending::Cause::panic, fmt::format("the guest crashed: triple fault on CPU {}", vcpu.id()));
      return false;
    case KVM_EXIT_SYSTEM_EVENT: handle_system_event(exit.raw().system_event.type); return false;
    case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_SET_TPR: other_exits_++; return true;
    default: fail(vcpu, exit); return false;
  }
}

void VirtualMachine::handle_io(const kvm::Exit::Io& io) noexcept {
  port_exits_++;
  machine::Bus& bus = machine_->ports();
  for (uint32_t i = 0; i < io.count; i++) {
    const auto item = io.data.subspan(size_t{i} * io.size, io.size);
    if (io.out)
      bus.write(io.port, io.size, load_bytes(item));
    else
      store_bytes(item, bus.read(io.port, io.size));
  }
}

void VirtualMachine::handle_mmio(const kvm::Exit::Mmio& mmio) noexcept {
  memory_exits_++;
  machine::Bus& bus = machine_->mmio();
  const auto size = static_cast<unsigned>(mmio.data.size());
  if (mmio.write)
    bus.write(mmio.gpa, size, load_bytes(mmio.data));
  else
    store_bytes(mmio.data, bus.read(mmio.gpa, size));
}

void VirtualMachine::handle_system_event(uint32_t type) noexcept {
  switch (type) {
    case KVM_SYSTEM_EVENT_SHUTDOWN: post({.ending = {.cause = Ending::Cause::power_off}}); break;
    case KVM_SYSTEM_EVENT_RESET: restart_or(Ending::Cause::reset); break;
    default: restart_or(Ending::Cause::panic, "the guest reported a crash"); break;
  }
}

void VirtualMachine::fail(kvm::Vcpu& vcpu, const kvm::Exit& exit) noexcept {
  post({.ending = {.cause = Ending::Cause::vcpu_failure,
                   .message = describe_failure(vcpu, exit, machine_->memory(), system_->name())}});
}

Statistics VirtualMachine::statistics() {
  Statistics all{.name = config_.name,
                 .accelerator_name = std::string(system_->name()),
                 .port_exits = port_exits_,
                 .memory_exits = memory_exits_,
                 .other_exits = other_exits_};
  const std::lock_guard machine(machine_mutex_);
  if (machine_) describe_machine(*machine_, all);
  std::unique_lock lock(mutex_);
  ask_vcpus(lock);
  all.resets = resets_;
  all.paused = paused_;
  if (started_)
    all.seconds =
        std::chrono::duration<double>(ended_.value_or(std::chrono::steady_clock::now()) - *started_).count();
  uint64_t vcpu_ns = past_vcpu_ns_;
  all.accelerator = past_accelerator_;
  for (const Counted& vcpu : counted_) {
    add_statistics(all.accelerator, vcpu.accelerator);
    vcpu_ns += vcpu.cpu_ns;
  }
  all.vcpu_seconds = static_cast<double>(vcpu_ns) / 1e9;
  return all;
}

}  // namespace lodge::vm
