// A guest whose code is a fuzzer's input, for every tier of the soft accelerator. The first byte chooses the
// mode and whether it begins with an SMI, or in system-management mode with the input's end as the saved
// state; the next 128 are the registers, the rest is code. SMRAM is the guest's own memory: SMBASE 0 puts the
// handler where the code is.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/mapping.hpp"
#include "kvm/soft/soft.hpp"

namespace lodge::fuzz {

inline constexpr uint64_t ram_size = 1 << 20, code_gpa = 0x8000, table_gpa = 0x1000, idt_gpa = 0x4000,
                          gdt_gpa = 0x5000, save_area_gpa = 0xfe00;
inline constexpr size_t save_area_size = 0x200;

inline void put64(uint8_t* ram, uint64_t gpa, uint64_t value) {
  std::memcpy(ram + gpa, &value, sizeof value);
}

// Identity paging by one 1 GiB page, user-accessible; a GDT with flat segments of ring 0; an IDT whose gates
// lead to the code itself.
inline void build_tables(uint8_t* ram, bool wide) {
  put64(ram, table_gpa, (table_gpa + 0x1000) | 7);
  put64(ram, table_gpa + 0x1000, 0x87);
  put64(ram, gdt_gpa + 8, wide ? 0x00af9b000000ffff : 0x00cf9b000000ffff);
  put64(ram, gdt_gpa + 16, 0x00cf93000000ffff);
  for (unsigned vector = 0; vector < 32; ++vector) {
    const uint64_t gate = (code_gpa & 0xffff) | 8u << 16 | uint64_t{0x8e00} << 32;
    put64(ram, idt_gpa + vector * (wide ? 16 : 8), gate);
  }
}

inline kvm_segment segment(bool code, unsigned mode, unsigned cpl) {
  kvm_segment s{};
  const bool real = mode < 2;
  s.limit = real ? 0xffff : 0xffffffff;
  s.selector = static_cast<uint16_t>(real ? 0 : code ? 8 : 16);
  s.type = code ? 11 : 3;
  s.present = s.s = 1;
  s.dpl = static_cast<uint8_t>(cpl);
  s.l = code && mode == 4 ? 1 : 0;
  s.db = real || s.l != 0 ? 0 : 1;
  s.g = real ? 0 : 1;
  return s;
}

// mode 0: real; 1: 16-bit protected; 2: 32-bit; 3: compatibility; 4: 64-bit.
inline void set_mode(kvm::Vcpu& vcpu, unsigned mode, unsigned cpl) {
  kvm_sregs s = vcpu.sregs();
  s.cs = segment(true, mode, cpl);
  s.ds = s.es = s.fs = s.gs = s.ss = segment(false, mode, cpl);
  s.gdt = {.base = gdt_gpa, .limit = 0x27, .padding = {}};
  s.idt = {.base = mode == 0 ? 0 : idt_gpa, .limit = 0xfff, .padding = {}};
  s.cr0 = 0x60000030 & ~0x60000000u;
  if (mode > 0) s.cr0 |= 1;
  s.cr4 = 0x40600;  // OSFXSR, OSXMMEXCPT, OSXSAVE
  if (mode >= 3) {
    s.cr3 = table_gpa;
    s.cr4 |= 0x20;
    s.cr0 |= 0x80000000;
    s.efer = 0xd01;
  }
  vcpu.set_sregs(s);
}

struct Guest {
  explicit Guest(const kvm::soft::Options& options)
      : system(kvm::soft::open(options)),
        cpuid(system->supported_cpuid()),
        ram(Mapping::anonymous(ram_size)) {}
  std::unique_ptr<kvm::System> system;
  std::vector<kvm_cpuid_entry2> cpuid;
  Mapping ram;
};

// A vCPU in the mode and with the registers that the input says, code in its memory.
struct Machine {
  std::unique_ptr<kvm::Vm> vm;
  std::unique_ptr<kvm::Vcpu> vcpu;
};
inline constexpr size_t header_size = 129;  // mode, registers
inline Machine make_machine(Guest& guest, const uint8_t* data, size_t size) {
  const unsigned mode = data[0] % 5;
  const unsigned cpl = mode >= 2 && (data[0] & 0x40) != 0 ? 3 : 0;
  std::memset(guest.ram.data(), 0, 0x10000);
  build_tables(guest.ram.data(), mode >= 3);
  std::memcpy(guest.ram.data() + code_gpa, data + header_size, std::min<size_t>(size - header_size, 4096));

  const size_t saved = std::min(size, save_area_size);
  std::memcpy(guest.ram.data() + save_area_gpa, data + size - saved, saved);

  auto vm = guest.system->create_vm();
  for (const uint32_t space : {0u, 1u})
    vm->set_user_memory_region({.slot = space << 16,
                                .flags = 0,
                                .guest_phys_addr = 0,
                                .memory_size = ram_size,
                                .userspace_addr = reinterpret_cast<uint64_t>(guest.ram.data())});
  auto vcpu = vm->create_vcpu(0);
  vcpu->set_cpuid2(guest.cpuid);
  vcpu->set_xcrs({.nr_xcrs = 1, .flags = 0, .xcrs = {{.xcr = 0, .reserved = 0, .value = 7}}, .padding = {}});
  set_mode(*vcpu, mode, cpl);
  kvm_regs regs{};
  std::memcpy(&regs, data + 1, 128);
  regs.rip = code_gpa;
  regs.rflags = 2;
  vcpu->set_regs(regs);
  const kvm_msr_entry smbase{.index = 0x9e, .reserved = 0, .data = 0};
  vcpu->set_msrs({&smbase, 1});
  if ((data[0] & 0x80) != 0) vcpu->smi();
  if ((data[0] & 0x20) != 0) {
    kvm_vcpu_events events = vcpu->vcpu_events();
    events.smi.smm = 1;
    vcpu->set_vcpu_events(events);
  }
  return {.vm = std::move(vm), .vcpu = std::move(vcpu)};
}

// Answers what the VMM is asked for with all ones; false when the guest is at its end.
inline bool answer(const kvm::Exit& exit) {
  switch (exit.reason()) {
    case KVM_EXIT_IO: {
      const auto io = exit.io();
      if (!io.out) std::fill(io.data.begin(), io.data.end(), 0xff);
      return true;
    }
    case KVM_EXIT_MMIO: {
      const auto mmio = exit.mmio();
      if (!mmio.write) std::fill(mmio.data.begin(), mmio.data.end(), 0xff);
      return true;
    }
    case KVM_EXIT_DEBUG:
    case KVM_EXIT_HLT: return true;
    default: return false;
  }
}

}  // namespace lodge::fuzz
