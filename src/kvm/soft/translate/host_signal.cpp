#include "kvm/soft/translate/host_signal.hpp"

#include <signal.h>
#include <ucontext.h>

#include <cerrno>
#include <cstring>
#include <initializer_list>
#include <system_error>

#include "kvm/soft/mmu/write_guard.hpp"
#include "kvm/soft/signal_chain.hpp"
#include "kvm/soft/translate/translator.hpp"

namespace lodge::kvm::soft {
namespace {

// Signal handlers have no other way to their context.
thread_local Translator* current_translator = nullptr;

struct sigaction previous_segv, previous_fpe, previous_bus;

const struct sigaction& previous_of(int number) noexcept {
  return number == SIGSEGV ? previous_segv : number == SIGFPE ? previous_fpe : previous_bus;
}

void pass_on(int number, siginfo_t* info, void* context) noexcept {
  // Returning runs the faulting instruction again, now with the default action.
  if (!call_previous(previous_of(number), number, info, context)) ::signal(number, SIG_DFL);
}

void on_signal(int number, siginfo_t* info, void* context) noexcept {
  const int saved_errno = errno;
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  constexpr greg_t page_fault_write = 2;
  if (number == SIGSEGV && info->si_code == SEGV_ACCERR && (registers[REG_ERR] & page_fault_write) != 0 &&
      admit_fault(reinterpret_cast<uint64_t>(info->si_addr))) {
    errno = saved_errno;
    return;
  }
  if (current_translator != nullptr) {
    const auto* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    if (const uint8_t* stub = current_translator->fault_stub(at); stub != nullptr) {
      registers[REG_RIP] = reinterpret_cast<greg_t>(stub);
      errno = saved_errno;
      return;
    }
  }
  pass_on(number, info, context);
  errno = saved_errno;
}

void install(int number, struct sigaction& previous) {
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  ::sigemptyset(&action.sa_mask);
  if (::sigaction(number, &action, &previous) != 0)
    throw std::system_error(errno, std::generic_category(), "cannot handle signals of translated code");
}

bool install_all() {
  install(SIGSEGV, previous_segv);
  install(SIGFPE, previous_fpe);
  install(SIGBUS, previous_bus);
  return true;
}

}  // namespace

void install_signal_handlers() {
  static const bool installed = install_all();
  (void)installed;
}

CurrentTranslator::CurrentTranslator(Translator& translator) noexcept : outer_(current_translator) {
  current_translator = &translator;
}

CurrentTranslator::~CurrentTranslator() {
  current_translator = outer_;
}

}  // namespace lodge::kvm::soft
