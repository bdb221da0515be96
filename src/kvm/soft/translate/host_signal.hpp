// Host signals that translated code raises on behalf of the guest: #DE as SIGFPE, #GP of misaligned vector
// operands as SIGSEGV; and stores of the VMM to guarded pages (mmu/write_guard.hpp). The handlers are the
// process's; signals from elsewhere go to whoever had them before.
#pragma once

namespace lodge::kvm::soft {

class Translator;

// Once for the process; throws std::system_error.
void install_signal_handlers();

// Names the translator that this thread is running, for the handlers.
class CurrentTranslator {
 public:
  explicit CurrentTranslator(Translator& translator) noexcept;
  ~CurrentTranslator();
  CurrentTranslator(const CurrentTranslator&) = delete;
  CurrentTranslator& operator=(const CurrentTranslator&) = delete;

 private:
  Translator* const outer_;
};

}  // namespace lodge::kvm::soft
