#include "kvm/host/vm.hpp"

#include <algorithm>
#include <map>
#include <mutex>

#include "kvm/host/ioctl.hpp"
#include "kvm/list.hpp"

namespace lodge::kvm::host {
namespace {

constexpr uint64_t page_size = 4096;

class HostVm final : public kvm::Vm {
 public:
  HostVm(Fd fd, size_t mmap_size) noexcept : fd_(std::move(fd)), mmap_size_(mmap_size) {}

  int check_extension(uint32_t capability) const noexcept override {
    return extension(fd_.get(), capability);
  }

  void enable_cap(const kvm_enable_cap& cap) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_ENABLE_CAP_VM);
    LODGE_IOCTL(fd_.get(), KVM_ENABLE_CAP, &cap);
  }

  void set_user_memory_region(const kvm_userspace_memory_region& region) override {
    if ((region.flags & KVM_MEM_READONLY) != 0) LODGE_REQUIRE(fd_.get(), KVM_CAP_READONLY_MEM);
    const std::lock_guard lock(mutex_);
    LODGE_IOCTL(fd_.get(), KVM_SET_USER_MEMORY_REGION, &region);
    slot_pages_[region.slot] = region.memory_size / page_size;
  }

  void get_dirty_log(uint32_t slot, std::span<uint64_t> bitmap) override {
    check_bitmap(slot, bitmap.size(), "KVM_GET_DIRTY_LOG");
    kvm_dirty_log log{};
    log.slot = slot;
    log.dirty_bitmap = bitmap.data();
    LODGE_IOCTL(fd_.get(), KVM_GET_DIRTY_LOG, &log);
  }

  void clear_dirty_log(uint32_t slot, uint64_t first_page, uint32_t num_pages,
                       std::span<const uint64_t> bitmap) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    if (bitmap.size() * 64 < num_pages)
      throw_errno(EINVAL, "/dev/kvm: KVM_CLEAR_DIRTY_LOG: the bitmap is shorter than the pages");
    kvm_clear_dirty_log log{};
    log.slot = slot;
    log.first_page = first_page;
    log.num_pages = num_pages;
    log.dirty_bitmap = const_cast<uint64_t*>(bitmap.data());  // read by the kernel only
    LODGE_IOCTL(fd_.get(), KVM_CLEAR_DIRTY_LOG, &log);
  }

  void note_write(uint64_t /*gpa*/, uint64_t /*size*/) noexcept override {}

  std::unique_ptr<kvm::Vcpu> create_vcpu(unsigned id) override {
    Fd vcpu(LODGE_IOCTL(fd_.get(), KVM_CREATE_VCPU, static_cast<unsigned long>(id)));
    return make_vcpu(std::move(vcpu), id, mmap_size_, static_cast<size_t>(check_extension(KVM_CAP_XSAVE2)));
  }

  // Only vendor modules that run real mode inside a task need these pages; where the capability is absent
  // there is nothing to be told.
  void set_tss_addr(uint64_t gpa) override {
    if (check_extension(KVM_CAP_SET_TSS_ADDR) == 0) return;
    LODGE_IOCTL(fd_.get(), KVM_SET_TSS_ADDR, static_cast<unsigned long>(gpa));
  }

  void set_identity_map_addr(uint64_t gpa) override {
    if (check_extension(KVM_CAP_SET_IDENTITY_MAP_ADDR) == 0) return;
    LODGE_IOCTL(fd_.get(), KVM_SET_IDENTITY_MAP_ADDR, &gpa);
  }

  void create_irqchip() override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_IRQCHIP);
    LODGE_IOCTL(fd_.get(), KVM_CREATE_IRQCHIP, 0ul);
  }

  void create_pit2(const kvm_pit_config& config) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_PIT2);
    LODGE_IOCTL(fd_.get(), KVM_CREATE_PIT2, &config);
  }

  kvm_irqchip irqchip(uint32_t chip_id) override {
    kvm_irqchip chip{};
    chip.chip_id = chip_id;
    LODGE_IOCTL(fd_.get(), KVM_GET_IRQCHIP, &chip);
    return chip;
  }

  void set_irqchip(const kvm_irqchip& chip) override { LODGE_IOCTL(fd_.get(), KVM_SET_IRQCHIP, &chip); }

  kvm_pit_state2 pit2() override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_PIT_STATE2);
    kvm_pit_state2 state{};
    LODGE_IOCTL(fd_.get(), KVM_GET_PIT2, &state);
    return state;
  }

  void set_pit2(const kvm_pit_state2& state) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_PIT_STATE2);
    LODGE_IOCTL(fd_.get(), KVM_SET_PIT2, &state);
  }

  int irq_line(uint32_t gsi, bool level) noexcept override {
    kvm_irq_level line{};
    line.irq = gsi;
    line.level = level ? 1 : 0;
    const int result = try_ioctl(fd_.get(), KVM_IRQ_LINE_STATUS, &line);
    if (result < 0) return result;
    return static_cast<int>(line.status);
  }

  int signal_msi(const kvm_msi& msi) noexcept override { return try_ioctl(fd_.get(), KVM_SIGNAL_MSI, &msi); }

  void set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_IRQ_ROUTING);
    List<CountHeader, kvm_irq_routing_entry> list(entries.size());
    list.header()->count = static_cast<uint32_t>(entries.size());
    std::ranges::copy(entries, list.entries().begin());
    checked_ioctl(fd_.get(), request::set_gsi_routing, list.header(), "KVM_SET_GSI_ROUTING");
  }

  void irqfd(const kvm_irqfd& irqfd) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_IRQFD);
    LODGE_IOCTL(fd_.get(), KVM_IRQFD, &irqfd);
  }

  void ioeventfd(const kvm_ioeventfd& ioeventfd) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_IOEVENTFD);
    LODGE_IOCTL(fd_.get(), KVM_IOEVENTFD, &ioeventfd);
  }

  void register_coalesced(const kvm_coalesced_mmio_zone& zone) override {
    require_coalesced(zone);
    LODGE_IOCTL(fd_.get(), KVM_REGISTER_COALESCED_MMIO, &zone);
  }

  void unregister_coalesced(const kvm_coalesced_mmio_zone& zone) override {
    require_coalesced(zone);
    LODGE_IOCTL(fd_.get(), KVM_UNREGISTER_COALESCED_MMIO, &zone);
  }

  void reinject_control(const kvm_reinject_control& control) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_REINJECT_CONTROL);
    LODGE_IOCTL(fd_.get(), KVM_REINJECT_CONTROL, &control);
  }

  void set_msr_filter(const kvm_msr_filter& filter) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_X86_MSR_FILTER);
    LODGE_IOCTL(fd_.get(), KVM_X86_SET_MSR_FILTER, &filter);
  }

  Fd statistics_fd() override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_BINARY_STATS_FD);
    return Fd(LODGE_IOCTL(fd_.get(), KVM_GET_STATS_FD, 0ul));
  }

  void set_boot_cpu_id(uint32_t id) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_SET_BOOT_CPU_ID);
    LODGE_IOCTL(fd_.get(), KVM_SET_BOOT_CPU_ID, static_cast<unsigned long>(id));
  }

  uint32_t default_tsc_khz() override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_VM_TSC_CONTROL);
    return static_cast<uint32_t>(LODGE_IOCTL(fd_.get(), KVM_GET_TSC_KHZ, 0ul));
  }
  void set_default_tsc_khz(uint32_t khz) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_VM_TSC_CONTROL);
    LODGE_IOCTL(fd_.get(), KVM_SET_TSC_KHZ, static_cast<unsigned long>(khz));
  }

  kvm_clock_data clock() override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_ADJUST_CLOCK);
    kvm_clock_data data{};
    LODGE_IOCTL(fd_.get(), KVM_GET_CLOCK, &data);
    return data;
  }

  void set_clock(const kvm_clock_data& clock) override {
    LODGE_REQUIRE(fd_.get(), KVM_CAP_ADJUST_CLOCK);
    LODGE_IOCTL(fd_.get(), KVM_SET_CLOCK, &clock);
  }

 private:
  void require_coalesced(const kvm_coalesced_mmio_zone& zone) const {
    if (zone.pio != 0)
      LODGE_REQUIRE(fd_.get(), KVM_CAP_COALESCED_PIO);
    else
      LODGE_REQUIRE(fd_.get(), KVM_CAP_COALESCED_MMIO);
  }

  // The kernel writes one bit a page of the slot, rounded up to whole words, whatever the caller's buffer
  // holds.
  void check_bitmap(uint32_t slot, size_t words, std::string_view name) {
    const std::lock_guard lock(mutex_);
    const auto found = slot_pages_.find(slot);
    const uint64_t pages = found == slot_pages_.end() ? 0 : found->second;
    if (words * 64 < pages)
      throw_errno(EINVAL, fmt::format("/dev/kvm: {}: the bitmap is shorter than the slot", name));
  }

  Fd fd_;
  size_t mmap_size_;
  std::mutex mutex_;
  std::map<uint32_t, uint64_t> slot_pages_;
};

}  // namespace

std::unique_ptr<kvm::Vm> make_vm(Fd fd, size_t mmap_size) {
  return std::make_unique<HostVm>(std::move(fd), mmap_size);
}

}  // namespace lodge::kvm::host
