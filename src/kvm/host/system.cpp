#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/fd.hpp"
#include "kvm/host/host.hpp"
#include "kvm/host/ioctl.hpp"
#include "kvm/host/vm.hpp"
#include "kvm/list.hpp"

namespace lodge::kvm::host {
namespace {

// KVM refuses lists that are too long as well as too short, so list sizes are found by growing; 4096 entries
// is far above the 256 CPUID entries (KVM_MAX_CPUID_ENTRIES) or the few hundred MSRs that any kernel reports.
constexpr size_t max_entries = 4096;

std::vector<uint32_t> msr_indices(int fd, unsigned long number, std::string_view name) {
  for (size_t capacity = 256; capacity <= max_entries; capacity *= 2) {
    List<ShortHeader, uint32_t> list(capacity);
    list.header()->count = static_cast<uint32_t>(capacity);
    const int result = try_ioctl(fd, number, list.header());
    if (result == -E2BIG) continue;
    if (result < 0) throw_errno(-result, fmt::format("/dev/kvm: {} failed", name));
    const auto entries = list.entries().first(list.header()->count);
    return {entries.begin(), entries.end()};
  }
  throw_errno(E2BIG, fmt::format("/dev/kvm: {} failed", name));
}

class HostSystem final : public kvm::System {
 public:
  explicit HostSystem(Fd fd)
      : fd_(std::move(fd)),
        shared_size_(static_cast<size_t>(LODGE_IOCTL(fd_.get(), KVM_GET_VCPU_MMAP_SIZE, 0ul))) {}

  std::string_view name() const noexcept override { return "kvm"; }

  int check_extension(uint32_t capability) const noexcept override {
    return extension(fd_.get(), capability);
  }

  std::vector<kvm_cpuid_entry2> supported_cpuid() const override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_EXT_CPUID);
    for (size_t capacity = 128; capacity <= max_entries; capacity *= 2) {
      List<CountHeader, kvm_cpuid_entry2> list(capacity);
      list.header()->count = static_cast<uint32_t>(capacity);
      const int result = try_ioctl(fd_.get(), request::get_supported_cpuid, list.header());
      if (result == -E2BIG) continue;
      if (result < 0) throw_errno(-result, "/dev/kvm: KVM_GET_SUPPORTED_CPUID failed");
      const auto entries = list.entries().first(list.header()->count);
      return {entries.begin(), entries.end()};
    }
    throw_errno(E2BIG, "/dev/kvm: KVM_GET_SUPPORTED_CPUID failed");
  }

  std::vector<uint32_t> msr_index_list() const override {
    return msr_indices(fd_.get(), request::get_msr_index_list, "KVM_GET_MSR_INDEX_LIST");
  }

  std::vector<uint32_t> msr_feature_index_list() const override {
    if (check_extension(KVM_CAP_GET_MSR_FEATURES) == 0) return {};
    return msr_indices(fd_.get(), request::get_msr_feature_index_list, "KVM_GET_MSR_FEATURE_INDEX_LIST");
  }

  unsigned feature_msrs(std::span<kvm_msr_entry> entries) const override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_GET_MSR_FEATURES);
    return transfer_msrs(fd_.get(), request::get_msrs, "KVM_GET_MSRS", entries, entries);
  }

  std::unique_ptr<kvm::Vm> create_vm() override {
    // KVM_CREATE_VM starts a kernel thread on some kernels and can then be interrupted by any signal.
    int result = -EINTR;
    for (int attempt = 0; attempt < 100 && result == -EINTR; ++attempt)
      result = try_ioctl(fd_.get(), KVM_CREATE_VM, 0ul);
    if (result == -EBUSY)
      throw_errno(
          EBUSY,
          "/dev/kvm: another hypervisor (VirtualBox, VMware...) holds the processor's virtualization; "
          "end it, or use --accel soft");
    if (result < 0) throw_errno(-result, "/dev/kvm: KVM_CREATE_VM failed");
    return make_vm(Fd(result), shared_size_);
  }

  uint64_t mce_capabilities() const noexcept override {
    uint64_t capabilities = 0;
    if (check_extension(KVM_CAP_MCE) > 0) try_ioctl(fd_.get(), KVM_X86_GET_MCE_CAP_SUPPORTED, &capabilities);
    return capabilities;
  }

  size_t shared_size() const noexcept override { return shared_size_; }

 private:
  Fd fd_;
  size_t shared_size_;
};

}  // namespace

unsigned transfer_msrs(int fd, unsigned long number, std::string_view name, std::span<const kvm_msr_entry> in,
                       std::span<kvm_msr_entry> out) {
  // KVM takes fewer than 256 MSRs a call (MAX_IO_MSRS), and stops at the first that it refuses.
  constexpr size_t batch = 128;
  unsigned done = 0;
  while (done < in.size()) {
    const size_t count = std::min(batch, in.size() - done);
    List<CountHeader, kvm_msr_entry> list(count);
    list.header()->count = static_cast<uint32_t>(count);
    std::copy_n(in.begin() + done, count, list.entries().begin());
    const auto accepted = static_cast<size_t>(checked_ioctl(fd, number, list.header(), name));
    if (!out.empty()) std::copy_n(list.entries().begin(), accepted, out.begin() + done);
    done += static_cast<unsigned>(accepted);
    if (accepted < count) break;
  }
  return done;
}

std::string explain_open_error(const std::string& path, int error) {
  switch (error) {
    case ENOENT:
    case ENXIO:
    case ENODEV:
      return fmt::format(
          "{}: this host offers no hardware virtualization (load the kvm module, enable it in the "
          "firmware or the surrounding hypervisor), or use --accel soft",
          path);
    case EACCES:
    case EPERM:
      return fmt::format(
          "{}: no permission; join the group kvm (sudo usermod -aG kvm $USER, then log in again), or use "
          "--accel soft",
          path);
    case EBUSY:
      return fmt::format(
          "{}: another hypervisor holds the processor's virtualization; end it, or use --accel soft", path);
    default: return fmt::format("{}: cannot open the device, or use --accel soft", path);
  }
}

std::unique_ptr<kvm::System> open(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) {
    const int error = errno;
    throw_errno(error, explain_open_error(path, error));
  }
  const int version = try_ioctl(fd.get(), KVM_GET_API_VERSION, 0ul);
  if (version == -ENOTTY || version == -EINVAL)
    throw_errno(ENOTSUP, fmt::format("{}: not a KVM device; name the right one or use --accel soft", path));
  if (version != KVM_API_VERSION)
    throw_errno(ENOTSUP,
                fmt::format("{}: its API version is {}, Lodge needs {}", path, version, KVM_API_VERSION));
  // Without them a vCPU cannot be stopped without a race, and RAM cannot be given to the guest.
  require(fd.get(), KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY");
  require(fd.get(), KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT (Linux 4.12)");
  return std::make_unique<HostSystem>(std::move(fd));
}

}  // namespace lodge::kvm::host
