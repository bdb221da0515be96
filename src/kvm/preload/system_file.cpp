// /dev/kvm itself (api.rst: "System ioctls").
#include <fcntl.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "kvm/preload/argument.hpp"
#include "kvm/preload/vm_file.hpp"
#include "kvm/soft/soft.hpp"

namespace lodge::kvm::preload {
namespace {

constexpr uint32_t max_io_msrs = 256;

// lodge kvm hands its options over in the environment.
soft::Options options() {
  soft::Options options;
  options.guard_code = true;
  if (const char* engine = std::getenv("LODGE_KVM_ENGINE"); engine != nullptr) {
    if (std::string_view(engine) == "interpret") options.engine = soft::Engine::interpret;
    if (std::string_view(engine) == "lockstep") options.engine = soft::Engine::lockstep;
  }
  if (const char* size = std::getenv("LODGE_KVM_CODE_CACHE"); size != nullptr)
    options.code_cache = std::max<size_t>(std::strtoull(size, nullptr, 10), size_t{1} << 20);
  return options;
}

int list_msrs(std::span<const uint32_t> indices, unsigned long argument) {
  MsrIndices list(argument);
  const uint32_t room = list.count();
  list.set_count(indices.size());
  if (room < indices.size()) return -E2BIG;
  std::ranges::copy(indices, list.entries().begin());
  return 0;
}

// One for the process: opening measures the host's clock. It has no threads, so a forked child may use it
// too.
std::shared_ptr<System> the_system() {
  static const std::shared_ptr<System> one = soft::open(options());
  return one;
}

class SystemFile final : public File {
 public:
  SystemFile() : File(Owner::any_process), system_(the_system()) {}

 private:
  const char* name() const noexcept override { return "/dev/kvm"; }
  int answer(unsigned long number, unsigned long argument) override {
    switch (number) {
      case KVM_GET_API_VERSION: return argument == 0 ? KVM_API_VERSION : -EINVAL;
      case KVM_CREATE_VM: return argument == 0 ? create_vm(system_) : -EINVAL;
      case KVM_CHECK_EXTENSION:
        return check_extension(system_->check_extension(static_cast<uint32_t>(argument)), argument);
      case KVM_GET_VCPU_MMAP_SIZE: return argument == 0 ? static_cast<int>(system_->shared_size()) : -EINVAL;
      case request::get_supported_cpuid: return supported_cpuid(argument);
      case request::get_msr_index_list: return list_msrs(system_->msr_index_list(), argument);
      case request::get_msr_feature_index_list: return list_msrs(system_->msr_feature_index_list(), argument);
      case request::get_msrs: {
        const MsrEntries list(argument);
        if (list.count() >= max_io_msrs) return -E2BIG;
        return static_cast<int>(system_->feature_msrs(list.entries()));
      }
      case KVM_X86_GET_MCE_CAP_SUPPORTED: return pointed<uint64_t>(argument) = system_->mce_capabilities(), 0;
      default: return -EINVAL;
    }
  }

  int supported_cpuid(unsigned long argument) {
    CpuidEntries list(argument);
    const auto entries = system_->supported_cpuid();
    if (list.count() < entries.size()) return -E2BIG;
    std::ranges::copy(entries, list.entries().begin());
    list.set_count(entries.size());
    return 0;
  }

  const std::shared_ptr<System> system_;
};

}  // namespace

OpenedFile open_system(int flags) {
  Fd fd = placeholder(flags);
  if (!fd) throw_errno("/dev/kvm");
  return {std::move(fd), std::make_shared<SystemFile>()};
}

}  // namespace lodge::kvm::preload
