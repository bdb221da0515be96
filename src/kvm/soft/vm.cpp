#include "kvm/soft/vm.hpp"

#include <sched.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "kvm/soft/translate/host_signal.hpp"
#include "kvm/soft/translate/perf_map.hpp"
#include "kvm/soft/vcpu.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t max_slots = 32764;

}  // namespace

SoftVm::SoftVm(uint32_t tsc_khz, const Options& options)
    : tsc_khz_(tsc_khz),
      options_(options),
      perf_map_(options.perf_map ? std::make_unique<PerfMap>() : nullptr),
      code_cache_(options, perf_map_.get()),
      clock_scale_(clock_scale(tsc_khz)),
      clock_offset_(-clock_scale_.nanoseconds(__builtin_ia32_rdtsc())),
      irqchip_(clock_),
      map_(std::make_shared<MemoryMap>()) {
  if (!options_.guard_code) return;
  install_signal_handlers();
  guard_.emplace(static_cast<GuardedMemory&>(*this));
}

SoftVm::~SoftVm() {
  for (const auto& slot : map_->slots) slot->retire();
}

int SoftVm::check_extension(uint32_t capability) const noexcept {
  return soft_extension(capability);
}

void SoftVm::enable_cap(const kvm_enable_cap& cap) {
  switch (cap.cap) {
    case KVM_CAP_SPLIT_IRQCHIP: irqchip_.create_split(cap.args[0]); break;
    case KVM_CAP_X2APIC_API: irqchip_.set_x2apic_api(cap.args[0]); break;
    case KVM_CAP_MAX_VCPU_ID:  // a promise of the VMM's, that saves us nothing
      if (cap.args[0] == 0 || cap.args[0] > Irqchip::max_vcpus)
        throw_errno(EINVAL, "KVM_CAP_MAX_VCPU_ID: more than there may be");
      break;
    case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
      if ((cap.args[0] & ~uint64_t{KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}) != 0)
        throw_errno(EINVAL, "manual dirty log protection: only bit 0 of the argument is supported");
      manual_dirty_protect_ = cap.args[0] != 0;
      break;
    default: throw_errno(EINVAL, fmt::format("the soft accelerator has no capability {} to enable", cap.cap));
  }
}

std::shared_ptr<const MemoryMap> SoftVm::memory() noexcept {
  const std::lock_guard lock(map_mutex_);
  return map_;
}

void SoftVm::set_user_memory_region(const kvm_userspace_memory_region& region) {
  const std::lock_guard changing(slots_mutex_);
  constexpr uint32_t known = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
  if ((region.flags & ~known) != 0 || region.slot >= max_slots)
    throw_errno(EINVAL, fmt::format("memory slot {}: number or flags are not supported", region.slot));
  if (((region.guest_phys_addr | region.memory_size | region.userspace_addr) & page_mask) != 0 ||
      region.guest_phys_addr + region.memory_size < region.guest_phys_addr)
    throw_errno(EINVAL, fmt::format("memory slot {}: not page aligned, or wraps", region.slot));

  auto map = std::make_unique<MemoryMap>(*memory());
  std::shared_ptr<Slot> replaced;
  const auto old =
      std::find_if(map->slots.begin(), map->slots.end(), [&](auto& s) { return s->id == region.slot; });
  if (region.memory_size == 0) {
    if (old == map->slots.end())
      throw_errno(EINVAL, fmt::format("memory slot {} does not exist", region.slot));
    (*old)->retire();
    map->slots.erase(old);
    return install(std::move(map));
  }
  if (old != map->slots.end()) {
    if ((*old)->size != region.memory_size ||
        reinterpret_cast<uint64_t>((*old)->host) != region.userspace_addr ||
        (*old)->read_only != ((region.flags & KVM_MEM_READONLY) != 0))
      throw_errno(EINVAL,
                  fmt::format("memory slot {}: size, memory and read-only flag cannot change", region.slot));
    replaced = *old;
    map->slots.erase(old);
  }
  for (const auto& slot : map->slots)
    if (region.guest_phys_addr < slot->gpa + slot->size &&
        slot->gpa < region.guest_phys_addr + region.memory_size)
      throw_errno(EEXIST, fmt::format("memory slot {} overlaps slot {}", region.slot, slot->id));
  auto slot = std::make_shared<Slot>(region, static_cast<CodeWatch&>(*this), options_.guard_code);
  if (replaced) replaced->retire();
  const auto place = std::upper_bound(map->slots.begin(), map->slots.end(), slot,
                                      [](auto& a, auto& b) { return a->gpa < b->gpa; });
  map->slots.insert(place, std::move(slot));
  install(std::move(map));
}

void SoftVm::install(std::unique_ptr<MemoryMap> map) {
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

void SoftVm::flush_all_vcpus() noexcept {
  const std::lock_guard lock(vcpus_mutex_);
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
  const auto map = memory();
  const auto it = std::find_if(map->slots.begin(), map->slots.end(), [&](auto& s) { return s->id == id; });
  if (it == map->slots.end() || !(*it)->log_dirty)
    throw_errno(ENOENT, fmt::format("{}: slot {} does not log dirty pages", what, id));
  return **it;
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
  for (const auto& slot : map->slots) {
    if (gpa >= slot->gpa + slot->size || end <= slot->gpa) continue;
    const uint64_t first = slot->page(std::max(gpa, slot->gpa));
    const uint64_t last = slot->page(std::min(end, slot->gpa + slot->size) - 1);
    for (uint64_t page = first; page <= last; ++page) slot->invalidate(page);
  }
}

bool SoftVm::forget_code() noexcept {
  bool any = false;
  for (const auto& slot : memory()->slots)
    for (uint64_t page = 0; page < slot->size >> page_shift; ++page) any |= slot->admit_write(page);
  return any;
}

void SoftVm::set_boot_cpu_id(uint32_t id) {
  const std::lock_guard lock(vcpus_mutex_);
  if (!vcpus_.empty()) throw_errno(EBUSY, "KVM_SET_BOOT_CPU_ID: there are vCPUs already");
  irqchip_.set_boot_id(id);
}

std::unique_ptr<Vcpu> SoftVm::create_vcpu(unsigned id) {
  const std::lock_guard lock(vcpus_mutex_);
  if (id >= Irqchip::max_vcpus) throw_errno(EINVAL, fmt::format("vCPU number {} is too high", id));
  for (const SoftVcpu* vcpu : vcpus_)
    if (vcpu->id() == id) throw_errno(EEXIST, fmt::format("vCPU {} exists already", id));
  if (options_.engine == Engine::lockstep && !vcpus_.empty())
    throw_errno(EINVAL,
                "the lockstep engine compares the runs of one vCPU, which others would disturb; use one CPU");
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

// Both are needs of Intel's hardware; accepted so that a machine can be set up the same way everywhere.
void SoftVm::set_tss_addr(uint64_t) {}
void SoftVm::set_identity_map_addr(uint64_t) {}

kvm_clock_data SoftVm::clock() {
  kvm_clock_data data{};
  data.clock = kvmclock_ns();
  data.flags = KVM_CLOCK_TSC_STABLE;
  return data;
}

void SoftVm::set_clock(const kvm_clock_data& data) {
  clock_offset_ = data.clock - clock_scale_.nanoseconds(__builtin_ia32_rdtsc());
  const std::lock_guard lock(vcpus_mutex_);
  for (SoftVcpu* vcpu : vcpus_) vcpu->post(request::clock);
}

}  // namespace lodge::kvm::soft
