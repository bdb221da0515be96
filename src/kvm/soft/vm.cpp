#include "kvm/soft/vm.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "kvm/list.hpp"
#include "kvm/soft/translate/host_signal.hpp"
#include "kvm/soft/translate/perf_map.hpp"
#include "kvm/soft/vcpu.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t max_slots = 32764;
constexpr uint64_t max_slot_size = ((uint64_t{1} << 31) - 1) * page_size;  // KVM_MEM_MAX_NR_PAGES
constexpr uint64_t end_of_user_memory = uint64_t{1} << 63;
constexpr uint64_t end_of_guest_memory = uint64_t{1} << 52;  // of the widest addresses that there are
constexpr uint64_t last_tss = (uint64_t{1} << 32) - 3 * page_size;
// A tick of a microsecond: a slower TSC would make the guest's clock and its LAPIC's deadlines coarser than
// that. The end is KVM's own (kvm_caps.max_guest_tsc_khz): KVM_GET_TSC_KHZ answers with an int.
constexpr uint32_t least_tsc_khz = 1'000, end_of_tsc_khz = INT32_MAX;
constexpr uint64_t msr_exit_reasons =
    KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;

}  // namespace

SoftVm::SoftVm(uint32_t tsc_khz, const Options& options)
    : tsc_khz_(tsc_khz),
      options_(options),
      perf_map_(options.perf_map ? std::make_unique<PerfMap>() : nullptr),
      code_cache_(options, perf_map_.get()),
      clock_scale_(clock_scale(tsc_khz)),
      tsc_lines_(tsc_khz),
      clock_offset_(-clock_scale_.nanoseconds(__builtin_ia32_rdtsc())),
      irqchip_(clock_),
      map_(std::make_shared<AddressSpaces>()) {
  if (!options_.guard_code) return;
  install_signal_handlers();
  guard_.emplace(static_cast<GuardedMemory&>(*this));
}

SoftVm::~SoftVm() {
  map_->for_each([](Slot& slot) { slot.retire(); });
}

int SoftVm::check_extension(uint32_t capability) const noexcept {
  return soft_extension(capability);
}

void SoftVm::enable_cap(const kvm_enable_cap& cap) {
  switch (cap.cap) {
    case KVM_CAP_SPLIT_IRQCHIP: create_split_irqchip(cap.args[0]); break;
    case KVM_CAP_X2APIC_API: irqchip_.set_x2apic_api(cap.args[0]); break;
    case KVM_CAP_MAX_VCPU_ID: limit_vcpu_ids(cap.args[0]); break;
    case KVM_CAP_X86_DISABLE_EXITS:
      if ((cap.args[0] & ~disableable_exits) != 0)
        throw_errno(EINVAL, "KVM_CAP_X86_DISABLE_EXITS: only HLT and PAUSE can be kept in the guest");
      if ((cap.args[0] & KVM_X86_DISABLE_EXITS_HLT) != 0) halt_in_guest_ = true;  // PAUSE never leaves it
      break;
    case KVM_CAP_X86_USER_SPACE_MSR:
      if ((cap.args[0] & ~msr_exit_reasons) != 0)
        throw_errno(EINVAL, "KVM_CAP_X86_USER_SPACE_MSR: unknown reasons for an exit");
      settings_.msr_exits = static_cast<uint32_t>(cap.args[0]);
      break;
    case KVM_CAP_MSR_PLATFORM_INFO: settings_.platform_info = cap.args[0] != 0; break;
    case KVM_CAP_DISABLE_QUIRKS2:
      if ((cap.args[0] & ~VmSettings::quirks) != 0)
        throw_errno(EINVAL, "KVM_CAP_DISABLE_QUIRKS2: a quirk that the soft accelerator does not have");
      settings_.disabled_quirks = cap.args[0];
      break;
    case cap_apic_bus_cycles_ns: irqchip_.set_bus_period(cap.args[0]); break;
    case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
      if ((cap.args[0] & ~uint64_t{KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}) != 0)
        throw_errno(EINVAL, "manual dirty log protection: only bit 0 of the argument is supported");
      manual_dirty_protect_ = cap.args[0] != 0;
      break;
    default: throw_errno(EINVAL, fmt::format("the soft accelerator has no capability {} to enable", cap.cap));
  }
}

std::shared_ptr<const AddressSpaces> SoftVm::memory() noexcept {
  const std::lock_guard lock(map_mutex_);
  return map_;
}

void SoftVm::set_user_memory_region(const kvm_userspace_memory_region& region) {
  const std::lock_guard changing(slots_mutex_);
  constexpr uint32_t known = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
  if ((region.flags & ~known) != 0 || (region.slot & 0xffff) >= max_slots ||
      region.slot >> 16 >= AddressSpaces::count)
    throw_errno(EINVAL, fmt::format("memory slot {}: number or flags are not supported", region.slot));
  if (((region.guest_phys_addr | region.memory_size | region.userspace_addr) & page_mask) != 0 ||
      region.guest_phys_addr + region.memory_size < region.guest_phys_addr)
    throw_errno(EINVAL, fmt::format("memory slot {}: not page aligned, or wraps", region.slot));
  if (region.memory_size > max_slot_size || region.userspace_addr > end_of_user_memory - region.memory_size)
    throw_errno(EINVAL, fmt::format("memory slot {}: more memory than a process can have", region.slot));
  if (region.memory_size != 0 && region.guest_phys_addr + region.memory_size > end_of_guest_memory)
    throw_errno(EINVAL, fmt::format("memory slot {}: beyond the guest's addresses", region.slot));

  const auto old = slots_.find(region.slot);
  // Nothing changes before all memory for the new state is there.
  auto maps = std::make_shared<AddressSpaces>(*memory());
  MemoryMap* const map = &maps->space[region.slot >> 16];
  if (region.memory_size == 0) {
    if (old == slots_.end()) throw_errno(EINVAL, fmt::format("memory slot {} does not exist", region.slot));
    map->erase(*old->second);
    old->second->retire();
    slots_.erase(old);
    return install(std::move(maps));
  }
  if (old != slots_.end()) {
    const Slot& slot = *old->second;
    if (slot.size != region.memory_size || reinterpret_cast<uint64_t>(slot.host) != region.userspace_addr ||
        slot.read_only != ((region.flags & KVM_MEM_READONLY) != 0))
      throw_errno(EINVAL,
                  fmt::format("memory slot {}: size, memory and read-only flag cannot change", region.slot));
    map->erase(slot);
  }
  if (const Slot* const other = map->first_in(region.guest_phys_addr, region.memory_size); other != nullptr)
    throw_errno(EEXIST, fmt::format("memory slot {} overlaps slot {}", region.slot, other->id));
  auto slot = std::make_shared<Slot>(region, static_cast<CodeWatch&>(*this), options_.guard_code);
  map->insert(slot);
  if (old == slots_.end()) {
    slots_.emplace(region.slot, std::move(slot));
  } else {
    old->second->retire();
    old->second = std::move(slot);
  }
  install(std::move(maps));
}

void SoftVm::install(std::shared_ptr<const AddressSpaces> map) noexcept {
  {
    const std::lock_guard lock(map_mutex_);
    map_ = std::move(map);
  }
  flush_all_vcpus();
  code_cache_.retire_all();
}

// Chained code looks at its request word only: whoever runs the old code must be told.
void SoftVm::code_changed(uint64_t host_page) noexcept {
  code_cache_.note_stale(host_page);
  epoch.fetch_add(1);
  const std::lock_guard lock(peers_mutex_);
  for (SoftVcpu* vcpu : peers_) vcpu->post(request::code);
}

Fd SoftVm::statistics_fd() {
  const std::lock_guard lock(vcpus_mutex_);
  return events_.open(fmt::format("kvm-{}", ::getpid()), {"remote_tlb_flush"});
}

void SoftVm::flush_all_vcpus() noexcept {
  const std::lock_guard lock(vcpus_mutex_);
  events_.count(tlb_flushes);
  for (SoftVcpu* vcpu : vcpus_) vcpu->post_flush();
  for (SoftVcpu* vcpu : vcpus_)
    while (!vcpu->flush_acknowledged()) ::sched_yield();
}

void SoftVm::shoot_down(SoftVcpu& self, uint64_t host_page) noexcept {
  // Without the lock another thread may hold it while it waits for us.
  while (!vcpus_mutex_.try_lock()) {
    self.acknowledge_memory();
    ::sched_yield();
  }
  const std::lock_guard lock(vcpus_mutex_, std::adopt_lock);
  for (SoftVcpu* vcpu : vcpus_)
    if (vcpu != &self) vcpu->post_code_page(host_page);
  for (SoftVcpu* vcpu : vcpus_)
    while (vcpu != &self && !vcpu->flush_acknowledged()) {
      self.acknowledge_memory();
      ::sched_yield();
    }
}

Slot& SoftVm::slot_by_id(uint32_t id, const char* what) {
  const auto found = slots_.find(id);
  if (found == slots_.end() || !found->second->log_dirty)
    throw_errno(ENOENT, fmt::format("{}: slot {} does not log dirty pages", what, id));
  return *found->second;
}

void SoftVm::get_dirty_log(uint32_t id, std::span<uint64_t> bitmap) {
  const std::lock_guard changing(slots_mutex_);
  Slot& slot = slot_by_id(id, "KVM_GET_DIRTY_LOG");
  const uint64_t words = (slot.size / page_size + 63) / 64;
  if (bitmap.size() < words) throw_errno(EINVAL, "KVM_GET_DIRTY_LOG: the bitmap is too small for the slot");
  if (manual_dirty_protect_) {
    for (uint64_t i = 0; i < words; ++i) bitmap[i] = slot.dirty[i].load();
    return;
  }
  // First the bits, then the write tags: a write in between is logged anew by its slow path, or was through a
  // tag that still existed and is in the memory that the caller reads after this call.
  for (uint64_t i = 0; i < words; ++i) bitmap[i] = slot.dirty[i].exchange(0);
  flush_all_vcpus();
}

void SoftVm::clear_dirty_log(uint32_t id, uint64_t first_page, uint32_t num_pages,
                             std::span<const uint64_t> bitmap) {
  const std::lock_guard changing(slots_mutex_);
  Slot& slot = slot_by_id(id, "KVM_CLEAR_DIRTY_LOG");
  const uint64_t pages = slot.size / page_size;
  if (first_page % 64 != 0 || first_page > pages || num_pages > pages - first_page ||
      (num_pages % 64 != 0 && first_page + num_pages != pages) || bitmap.size() < (num_pages + 63) / 64)
    throw_errno(EINVAL, "KVM_CLEAR_DIRTY_LOG: the range is not a multiple of 64 pages of the slot");
  for (uint64_t i = 0; i < (uint64_t{num_pages} + 63) / 64; ++i)
    slot.dirty[first_page / 64 + i].fetch_and(~bitmap[i]);
  flush_all_vcpus();
}

void SoftVm::note_write(uint64_t gpa, uint64_t size) noexcept {
  const auto map = memory();
  const uint64_t end = gpa + size;
  while (gpa < end) {
    Slot* const slot = map->space[0].first_in(gpa, end - gpa);
    if (slot == nullptr) return;
    const uint64_t first = slot->page(std::max(gpa, slot->gpa));
    const uint64_t last = slot->page(std::min(end, slot->gpa + slot->size) - 1);
    for (uint64_t page = first; page <= last; ++page) slot->invalidate(page);
    gpa = slot->gpa + slot->size;
  }
}

bool SoftVm::forget_code() noexcept {
  bool any = false;
  memory()->for_each([&](Slot& slot) {
    for (uint64_t page = 0; page < slot.size >> page_shift; ++page) any |= slot.invalidate(page);
  });
  return any;
}

// The VMM's promise that no vCPU has a higher ID: once, and not below the boot processor's.
void SoftVm::limit_vcpu_ids(uint64_t limit) {
  const std::lock_guard lock(vcpus_mutex_);
  if (limit == 0 || limit > Irqchip::max_vcpus || limit < irqchip_.boot_id() ||
      (vcpu_ids_ != Irqchip::max_vcpus && limit != vcpu_ids_))
    throw_errno(
        EINVAL,
        "KVM_CAP_MAX_VCPU_ID: more than there may be, fewer than the boot processor needs, or a change");
  vcpu_ids_ = static_cast<uint32_t>(limit);
}

void SoftVm::set_boot_cpu_id(uint32_t id) {
  const std::lock_guard lock(vcpus_mutex_);
  if (id >= vcpu_ids_) throw_errno(EINVAL, fmt::format("KVM_SET_BOOT_CPU_ID: there is no vCPU {}", id));
  if (!vcpus_.empty()) throw_errno(EBUSY, "KVM_SET_BOOT_CPU_ID: there are vCPUs already");
  irqchip_.set_boot_id(id);
}

std::unique_ptr<Vcpu> SoftVm::create_vcpu(unsigned id) {
  const std::lock_guard lock(vcpus_mutex_);
  if (id >= vcpu_ids_) throw_errno(EINVAL, fmt::format("vCPU number {} is too high", id));
  for (const SoftVcpu* vcpu : vcpus_)
    if (vcpu->id() == id) throw_errno(EEXIST, fmt::format("vCPU {} exists already", id));
  if (options_.engine == Engine::lockstep && !vcpus_.empty())
    throw_errno(EINVAL,
                "the lockstep engine compares the runs of one vCPU, which others would disturb; use one CPU");
  // First, as a vCPU that cannot be entered would lock the list to leave it.
  vcpus_.reserve(vcpus_.size() + 1);
  {
    const std::lock_guard peers(peers_mutex_);
    peers_.reserve(vcpus_.size() + 1);
  }
  auto vcpu = std::make_unique<SoftVcpu>(*this, id);
  vcpus_.push_back(vcpu.get());
  const std::lock_guard peers(peers_mutex_);
  peers_.push_back(vcpu.get());
  return vcpu;
}

void SoftVm::remove_vcpu(SoftVcpu& vcpu) noexcept {
  const std::lock_guard lock(vcpus_mutex_);
  std::erase(vcpus_, &vcpu);
  const std::lock_guard peers(peers_mutex_);
  std::erase(peers_, &vcpu);
}

// Both are needs of Intel's hardware; accepted, as far as KVM does, so that a machine can be set up the same
// way everywhere.
void SoftVm::set_tss_addr(uint64_t gpa) {
  if (gpa > last_tss)
    throw_errno(EINVAL, "KVM_SET_TSS_ADDR: three pages from there on do not end below 4 GiB");
}
void SoftVm::set_identity_map_addr(uint64_t) {
  const std::lock_guard lock(vcpus_mutex_);
  if (!vcpus_.empty()) throw_errno(EINVAL, "KVM_SET_IDENTITY_MAP_ADDR: there are vCPUs already");
}

// A vCPU has a LAPIC from its creation on, or none.
void SoftVm::create_irqchip() {
  const std::lock_guard lock(vcpus_mutex_);
  if (!vcpus_.empty() && irqchip_.mode() == Irqchip::Mode::none)
    throw_errno(EINVAL, "KVM_CREATE_IRQCHIP: there are vCPUs already");
  irqchip_.create_full();
}

void SoftVm::create_split_irqchip(uint64_t pins) {
  const std::lock_guard lock(vcpus_mutex_);
  if (!vcpus_.empty() && pins <= GsiRouting::max_gsis)
    throw_errno(EEXIST, "KVM_CAP_SPLIT_IRQCHIP: there are vCPUs already");
  irqchip_.create_split(pins);
}

uint32_t SoftVm::valid_tsc_khz(uint32_t khz) const {
  if (khz == 0) return tsc_khz_;
  if (khz < least_tsc_khz || khz >= end_of_tsc_khz)
    throw_errno(EINVAL, fmt::format("KVM_SET_TSC_KHZ: a TSC of {} kHz is too slow or too fast", khz));
  return khz;
}

// All three of one moment, as the guest's clock follows the host's TSC.
kvm_clock_data SoftVm::clock() {
  kvm_clock_data data{};
  data.flags = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
  data.realtime = clock_.wall();
  data.host_tsc = __builtin_ia32_rdtsc();
  data.clock = kvmclock_at(data.host_tsc);
  return data;
}

// With KVM_CLOCK_REALTIME the clock goes on by what has passed since, but never back.
void SoftVm::set_clock(const kvm_clock_data& data) {
  constexpr uint32_t known = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
  if ((data.flags & ~known) != 0) throw_errno(EINVAL, "KVM_SET_CLOCK: unknown flags");
  uint64_t value = data.clock;
  if ((data.flags & KVM_CLOCK_REALTIME) != 0)
    if (const uint64_t now = clock_.wall(); now > data.realtime) value += now - data.realtime;
  clock_offset_ = value - clock_scale_.nanoseconds(__builtin_ia32_rdtsc());
  // Here and now, not by each vCPU when it runs next: the first that runs may read the page of another. The
  // slots stay what they are meanwhile.
  const std::lock_guard changing(slots_mutex_);
  const std::lock_guard lock(vcpus_mutex_);
  const auto map = memory();
  for (SoftVcpu* vcpu : vcpus_) vcpu->write_clock_page(map->space[0]);
}

}  // namespace lodge::kvm::soft
