#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstddef>
#include <cstring>

#include "base/mapping.hpp"
#include "kvm/host/ioctl.hpp"
#include "kvm/host/vm.hpp"
#include "kvm/list.hpp"

namespace lodge::kvm::host {
namespace {

// The signal that makes a running KVM_RUN return. A real-time signal, so that no library or shell gives it a
// meaning.
int kick_signal() noexcept {
  return SIGRTMIN + 5;
}

// Signal dispositions belong to the process: set once, with an empty handler (SIG_IGN would not interrupt
// KVM_RUN).
void install_kick_handler() {
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_handler = [](int) {};
    sigemptyset(&action.sa_mask);
    if (::sigaction(kick_signal(), &action, nullptr) != 0) throw_errno("cannot install the vCPU kick signal");
    return true;
  }();
  static_cast<void>(installed);
}

pid_t thread_id() noexcept {
  return static_cast<pid_t>(::syscall(SYS_gettid));
}

class HostVcpu final : public kvm::Vcpu {
 public:
  HostVcpu(Fd fd, unsigned id, size_t mmap_size, size_t xsave_size)
      : fd_(std::move(fd)),
        id_(id),
        xsave_size_(std::max(xsave_size, xsave_bytes)),
        shared_(mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0,
                "/dev/kvm: cannot map a vCPU's shared structure"),
        run_(reinterpret_cast<kvm_run*>(shared_.data())) {
    install_kick_handler();
  }

  unsigned id() const noexcept override { return id_; }
  Exit run() noexcept override;
  void kick() noexcept override;
  kvm_run& shared() noexcept override { return *run_; }
  int shared_fd() const noexcept override { return fd_.get(); }

  kvm_regs regs() override { return get<kvm_regs>(KVM_GET_REGS, "KVM_GET_REGS"); }
  void set_regs(const kvm_regs& regs) override { LODGE_IOCTL(fd_.get(), KVM_SET_REGS, &regs); }
  kvm_sregs sregs() override { return get<kvm_sregs>(KVM_GET_SREGS, "KVM_GET_SREGS"); }
  void set_sregs(const kvm_sregs& sregs) override { LODGE_IOCTL(fd_.get(), KVM_SET_SREGS, &sregs); }
  kvm_sregs2 sregs2() override { return get<kvm_sregs2>(KVM_GET_SREGS2, "KVM_GET_SREGS2"); }
  void set_sregs2(const kvm_sregs2& sregs) override { LODGE_IOCTL(fd_.get(), KVM_SET_SREGS2, &sregs); }
  kvm_fpu fpu() override { return get<kvm_fpu>(KVM_GET_FPU, "KVM_GET_FPU"); }
  void set_fpu(const kvm_fpu& fpu) override { LODGE_IOCTL(fd_.get(), KVM_SET_FPU, &fpu); }
  kvm_xsave xsave() override;
  void set_xsave(const kvm_xsave& xsave) override;
  kvm_xcrs xcrs() override { return get<kvm_xcrs>(KVM_GET_XCRS, "KVM_GET_XCRS"); }
  void set_xcrs(const kvm_xcrs& xcrs) override { LODGE_IOCTL(fd_.get(), KVM_SET_XCRS, &xcrs); }
  kvm_debugregs debugregs() override { return get<kvm_debugregs>(KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS"); }
  void set_debugregs(const kvm_debugregs& debugregs) override {
    LODGE_IOCTL(fd_.get(), KVM_SET_DEBUGREGS, &debugregs);
  }
  unsigned msrs(std::span<kvm_msr_entry> entries) override {
    return transfer_msrs(fd_.get(), request::get_msrs, "KVM_GET_MSRS", entries, entries);
  }
  unsigned set_msrs(std::span<const kvm_msr_entry> entries) override {
    return transfer_msrs(fd_.get(), request::set_msrs, "KVM_SET_MSRS", entries, {});
  }
  std::vector<kvm_cpuid_entry2> cpuid2() override;
  void set_cpuid2(std::span<const kvm_cpuid_entry2> entries) override;
  kvm_lapic_state lapic() override { return get<kvm_lapic_state>(KVM_GET_LAPIC, "KVM_GET_LAPIC"); }
  void set_lapic(const kvm_lapic_state& lapic) override { LODGE_IOCTL(fd_.get(), KVM_SET_LAPIC, &lapic); }
  kvm_vcpu_events vcpu_events() override {
    return get<kvm_vcpu_events>(KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS");
  }
  void set_vcpu_events(const kvm_vcpu_events& events) override {
    LODGE_IOCTL(fd_.get(), KVM_SET_VCPU_EVENTS, &events);
  }
  kvm_mp_state mp_state() override { return get<kvm_mp_state>(KVM_GET_MP_STATE, "KVM_GET_MP_STATE"); }
  void set_mp_state(const kvm_mp_state& state) override { LODGE_IOCTL(fd_.get(), KVM_SET_MP_STATE, &state); }
  uint32_t tsc_khz() override { return static_cast<uint32_t>(LODGE_IOCTL(fd_.get(), KVM_GET_TSC_KHZ, 0ul)); }
  void set_tsc_khz(uint32_t khz) override {
    LODGE_IOCTL(fd_.get(), KVM_SET_TSC_KHZ, static_cast<unsigned long>(khz));
  }
  uint64_t tsc_offset() override {
    uint64_t offset = 0;
    kvm_device_attr attribute = tsc_attribute(offset);
    LODGE_IOCTL(fd_.get(), KVM_GET_DEVICE_ATTR, &attribute);
    return offset;
  }
  void set_tsc_offset(uint64_t offset) override {
    kvm_device_attr attribute = tsc_attribute(offset);
    LODGE_IOCTL(fd_.get(), KVM_SET_DEVICE_ATTR, &attribute);
  }
  int pre_fault_memory(uint64_t& gpa, uint64_t& size) noexcept override {
    PreFaultMemory range{.gpa = gpa, .size = size};
    const int result = try_ioctl(fd_.get(), request::pre_fault_memory, &range);
    gpa = range.gpa;
    size = range.size;
    return result;
  }
  Fd statistics_fd() override { return Fd(LODGE_IOCTL(fd_.get(), KVM_GET_STATS_FD, 0ul)); }
  void set_guest_debug(const kvm_guest_debug& debug) override {
    LODGE_IOCTL(fd_.get(), KVM_SET_GUEST_DEBUG, &debug);
  }
  void set_tpr_access_reporting(bool on) override {
    kvm_tpr_access_ctl control{};
    control.enabled = on ? 1 : 0;
    LODGE_IOCTL(fd_.get(), KVM_TPR_ACCESS_REPORTING, &control);
  }
  void set_vapic_addr(uint64_t gpa) override {
    const kvm_vapic_addr address{gpa};
    LODGE_IOCTL(fd_.get(), KVM_SET_VAPIC_ADDR, &address);
  }
  int interrupt(uint32_t vector) noexcept override {
    const kvm_interrupt interrupt{vector};
    return try_ioctl(fd_.get(), KVM_INTERRUPT, &interrupt);
  }
  int nmi() noexcept override { return try_ioctl(fd_.get(), KVM_NMI, 0ul); }
  int smi() noexcept override { return try_ioctl(fd_.get(), KVM_SMI, 0ul); }
  kvm_translation translate(uint64_t linear) override {
    kvm_translation translation{};
    translation.linear_address = linear;
    LODGE_IOCTL(fd_.get(), KVM_TRANSLATE, &translation);
    return translation;
  }
  void setup_mce(uint64_t capabilities) override { LODGE_IOCTL(fd_.get(), KVM_X86_SETUP_MCE, &capabilities); }
  void set_mce(const kvm_x86_mce& event) override { LODGE_IOCTL(fd_.get(), KVM_X86_SET_MCE, &event); }
  void enable_cap(const kvm_enable_cap& cap) override { LODGE_IOCTL(fd_.get(), KVM_ENABLE_CAP, &cap); }

 private:
  static kvm_device_attr tsc_attribute(uint64_t& offset) noexcept {
    kvm_device_attr attribute{};
    attribute.group = KVM_VCPU_TSC_CTRL;
    attribute.attr = KVM_VCPU_TSC_OFFSET;
    attribute.addr = reinterpret_cast<uint64_t>(&offset);
    return attribute;
  }
  template <class State>
  State get(unsigned long number, std::string_view name) {
    State state{};
    checked_ioctl(fd_.get(), number, &state, name);
    return state;
  }

  Fd fd_;
  unsigned id_;
  size_t xsave_size_;
  Mapping shared_;
  kvm_run* run_;
  pid_t prepared_ = 0;             // the thread whose signal mask lets the kick through
  std::atomic<pid_t> running_{0};  // the thread inside run(), else 0
  std::atomic<bool> kicked_{false};
};

// A kick is never lost: kick() first sets immediate_exit and then looks for a thread to signal, while run()
// first publishes its thread and then enters KVM_RUN, which looks at immediate_exit (both sides sequentially
// consistent). So either KVM_RUN sees the flag, or the signal finds the thread in it. A signal that comes too
// early or too late runs an empty handler.
Exit HostVcpu::run() noexcept {
  const pid_t self = thread_id();
  if (self != prepared_) {
    // The VMM may have started this thread with every signal blocked.
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, kick_signal());
    ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    prepared_ = self;
  }
  const std::atomic_ref immediate(run_->immediate_exit);
  // A kick that overlapped the end of the previous run() may have lost its flag there.
  if (kicked_.load()) immediate.store(1);
  running_.store(self);
  const int result = try_ioctl(fd_.get(), KVM_RUN, 0ul);
  running_.store(0);
  // Otherwise immediate_exit is the VMM's own and stays as KVM documents it.
  if (result == -EINTR && kicked_.exchange(false)) immediate.store(0);
  return Exit(*run_, result < 0 ? result : 0);
}

void HostVcpu::kick() noexcept {
  const int saved_errno = errno;  // async-signal-safe, so it must not disturb what it interrupted
  std::atomic_ref(run_->immediate_exit).store(1);
  kicked_.store(true);
  const pid_t thread = running_.load();
  // If that thread has ended since, the kernel answers ESRCH, which is as good.
  if (thread != 0) ::syscall(SYS_tgkill, ::getpid(), thread, kick_signal());
  errno = saved_errno;
}

// Processors with state beyond the classic 4096 bytes (AMX tiles) have a larger area, of which the contract
// carries the first 4096: that is all of it unless the VMM was granted those dynamic features, which Lodge
// does not ask for.
kvm_xsave HostVcpu::xsave() {
  kvm_xsave state{};
  List<XsaveRegion, uint8_t> area(xsave_size_ - xsave_bytes);
  if (xsave_size_ == xsave_bytes)
    checked_ioctl(fd_.get(), request::get_xsave, area.header(), "KVM_GET_XSAVE");
  else
    checked_ioctl(fd_.get(), request::get_xsave2, area.header(), "KVM_GET_XSAVE2");
  std::memcpy(state.region, area.header(), xsave_bytes);
  return state;
}

void HostVcpu::set_xsave(const kvm_xsave& xsave) {
  List<XsaveRegion, uint8_t> area(xsave_size_ - xsave_bytes);
  std::memcpy(area.header(), xsave.region, xsave_bytes);
  checked_ioctl(fd_.get(), request::set_xsave, area.header(), "KVM_SET_XSAVE");
}

std::vector<kvm_cpuid_entry2> HostVcpu::cpuid2() {
  constexpr size_t capacity = 256;  // KVM_MAX_CPUID_ENTRIES: a vCPU never holds more
  List<CountHeader, kvm_cpuid_entry2> list(capacity);
  list.header()->count = capacity;
  checked_ioctl(fd_.get(), request::get_cpuid2, list.header(), "KVM_GET_CPUID2");
  const auto entries = list.entries().first(list.header()->count);
  return {entries.begin(), entries.end()};
}

void HostVcpu::set_cpuid2(std::span<const kvm_cpuid_entry2> entries) {
  List<CountHeader, kvm_cpuid_entry2> list(entries.size());
  list.header()->count = static_cast<uint32_t>(entries.size());
  std::memcpy(list.entries().data(), entries.data(), entries.size_bytes());
  checked_ioctl(fd_.get(), request::set_cpuid2, list.header(), "KVM_SET_CPUID2");
}

}  // namespace

std::unique_ptr<kvm::Vcpu> make_vcpu(Fd fd, unsigned id, size_t mmap_size, size_t xsave_size) {
  return std::make_unique<HostVcpu>(std::move(fd), id, mmap_size, xsave_size);
}

}  // namespace lodge::kvm::host
