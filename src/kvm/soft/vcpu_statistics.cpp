// What a vCPU has counted, by name.
#include <Zydis/Zydis.h>
#include <fmt/format.h>
#include <unistd.h>

#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

class List {
 public:
  void group(const char* name) { group_ = name; }
  void add(std::string name, uint64_t value) { all_.push_back({group_, std::move(name), value}); }
  std::vector<Statistic> take() { return std::move(all_); }

 private:
  std::string group_;
  std::vector<Statistic> all_;
};

void add_slow_paths(List& list, const TranslatorStatistics& s) {
  list.group("slow_paths");
  list.add("filled", s.filled);
  list.add("page_crossing", s.crossings);
  list.add("device", s.device);
  list.add("guest_fault", s.faults);
  list.add("guarded", s.guarded);
  list.add("native_fault", s.native_faults);
}

}  // namespace

std::vector<Statistic> SoftVcpu::statistics() {
  List list;
  const bool counts = vm_.options().count;
  if (counts) {
    list.group("instructions");
    // The interpreter by itself: code that is not hot, 16-bit code, instructions under observation.
    list.add("interpreted", instructions_);
    if (translator_) list.add("translated", home_.area().instructions);
  }
  list.group("events");
  list.add("exceptions", events_.value(exceptions));
  list.add("interrupts", events_.value(interrupts));
  list.add("nmis", events_.value(nmis));
  list.add("halts", events_.value(halts));
  list.group("blocks");
  list.add("decoded", counts_.decoded);
  list.add("given_back", counts_.given_back);
  if (translator_) {
    const TranslatorStatistics& s = translator_->statistics();
    const CodeCacheStatistics cache = translator_->cache_statistics();
    list.add("translated", s.translations);
    list.add("superblocks", s.superblocks);
    list.add("dropped", cache.dropped);
    list.add("links", s.links);
    list.add("entries", s.entries);
    list.add("indirect_misses", s.indirect_misses);
    list.group("code_cache");
    list.add("used_bytes", translator_->code_bytes());
    list.add("made_bytes", s.host_bytes);
    list.add("made_of_instructions", s.guest_instructions);
    list.add("evictions", cache.evictions);
    list.add("longest_eviction_ns", cache.longest_eviction_ns);
    list.add("given_back", cache.given_back);
    list.group("soft_tlb");
    if (counts) list.add("lookups", home_.area().lookups);
    list.add("misses", s.slow_accesses - s.native_faults);
    add_slow_paths(list, s);
    list.group("left_to_interpreter");
    for (size_t i = 0; i < translator_->interpreted().size(); ++i)
      if (const uint64_t count = translator_->interpreted()[i]; count != 0)
        list.add(i == 0 ? "page_crossing_code" : ZydisMnemonicGetString(static_cast<ZydisMnemonic>(i)),
                 count);
  }
  return list.take();
}

// Under the names that KVM has for the same.
Fd SoftVcpu::statistics_fd() {
  return events_.open(fmt::format("kvm-{}/vcpu-{}", ::getpid(), id_),
                      {"exits", "io_exits", "mmio_exits", "signal_exits", "halt_exits", "exceptions",
                       "irq_injections", "nmi_injections", "hypercalls"});
}

}  // namespace lodge::kvm::soft
