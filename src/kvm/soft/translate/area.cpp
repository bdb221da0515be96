#include "kvm/soft/translate/area.hpp"

#include <new>

#include "kvm/soft/mmu/tlb.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr size_t stack_size = size_t{64} << 10;

constexpr size_t up(size_t size) {
  return (size + page_mask) & ~page_mask;
}

}  // namespace

CpuHome::CpuHome(Platform& platform, unsigned id)
    : memory_(Mapping::anonymous(stack_size + up(sizeof(Cpu)) + up(sizeof(TranslatorArea)))),
      cpu_(new (memory_.data() + stack_size) Cpu(platform, id)),
      // Left as the kernel gives it, zero, so that untouched tables cost no memory.
      area_(reinterpret_cast<TranslatorArea*>(memory_.data() + stack_size + up(sizeof(Cpu)))) {
  area_->default_mxcsr = 0x1f80;
}

CpuHome::~CpuHome() {
  cpu_->~Cpu();
}

}  // namespace lodge::kvm::soft
