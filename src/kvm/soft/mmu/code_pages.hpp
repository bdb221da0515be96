// What the accelerator keeps about code in host memory, page by page. Several slots may show the same memory
// (aliases, the two address spaces): they share these words, so that a write through one of them is seen by
// whoever runs code through another.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "kvm/soft/mmu/tlb.hpp"

namespace lodge::kvm::soft {

class CodeWatch;

// One aligned stretch of host addresses.
class CodePages {
 public:
  static constexpr unsigned shift =
      24;  // 16 MiB: a few hundred of these for a large slot, 16 KiB for a small one
  static constexpr unsigned pages = 1u << (shift - page_shift);

  explicit CodePages(CodeWatch& watch) : watch_(watch) {}

  static unsigned index(uint64_t host) noexcept { return host >> page_shift & (pages - 1); }

  // One word a page: bit 0 says that some vCPU holds decoded instructions of the page, the rest counts the
  // times that they became stale. A block is valid while the word is what it was when the block was decoded.
  static constexpr uint32_t has_code = 1;
  std::array<std::atomic<uint32_t>, pages> word{};

  // The page at `host` becomes code and, if `retired` is not set, is write-protected in the VMM's mapping. A
  // retired slot leaves it as it is. False: it could not be guarded, because as many are as the process may
  // have.
  bool mark_guarded(uint64_t host, const std::atomic<bool>& retired) noexcept;
  // Makes all decoded instructions of the page stale and lifts its guard. False: it holds none.
  bool invalidate(uint64_t host) noexcept;
  // The same for a write that has faulted, or would: waits for whoever is guarding the page just now, and has
  // not said yet that it holds code.
  bool admit(uint64_t host) noexcept;
  // The same for pages [host, host + size) of this stretch, where nobody needs to be told.
  void forget(uint64_t host, uint64_t size) noexcept;

 private:
  // A page's guard: under mutex_, so that it agrees with has_code.
  void unguard(uint64_t host) noexcept;

  CodeWatch& watch_;
  std::mutex mutex_;
  std::array<uint64_t, pages / 64> guarded_{};  // one bit a page
};

// Counts the times that pages of code were written to, in all slots of a VM, and tells who runs code.
class CodeWatch {
 public:
  CodeWatch() = default;
  CodeWatch(const CodeWatch&) = delete;
  CodeWatch& operator=(const CodeWatch&) = delete;
  std::atomic<uint32_t> epoch{0};
  // Pages that are write-protected in the VMM's mapping (Options::guard_code). Each may take two of the
  // process's mappings (vm.max_map_count: 65530 unless configured), of which the VMM needs some too.
  static constexpr uint32_t max_guarded = 24'000;
  std::atomic<uint32_t> guarded{0};
  virtual ~CodeWatch() = default;
  // Advances `epoch`. Any thread; `host_page`: host address of the page that was written to.
  virtual void code_changed([[maybe_unused]] uint64_t host_page) noexcept { epoch.fetch_add(1); }

  // The words of the stretch that holds `host`, made if no slot has them. They refer to this object.
  std::shared_ptr<CodePages> pages_of(uint64_t host);

 private:
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::weak_ptr<CodePages>> pages_;
  size_t sweep_at_ = 64;  // entries at which those that nobody has are dropped
};

}  // namespace lodge::kvm::soft
