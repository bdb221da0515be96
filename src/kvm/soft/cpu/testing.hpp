// A processor with 4 MiB of memory and ready-made descriptor tables, for tests of the system instructions.
#pragma once

#include <sys/mman.h>

#include <array>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/cpu/events.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/cpu/segments.hpp"
#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft::testing {

class FakePlatform : public Platform {
 public:
  bool read_apic_msr(uint32_t index, uint64_t& value) noexcept override {
    value = apic_base;
    return index == 0x1b;
  }
  bool write_apic_msr(uint32_t index, uint64_t value, bool) noexcept override {
    apic_base = value;
    return index == 0x1b;
  }
  uint8_t tpr() noexcept override { return priority; }
  void set_tpr(uint8_t value) noexcept override { priority = value; }
  bool apic_enabled() noexcept override { return (apic_base & 0x800) != 0; }
  bool x2apic_enabled() noexcept override { return false; }
  uint64_t tsc() noexcept override { return time; }
  void set_tsc(uint64_t value) noexcept override { time = value; }
  uint32_t tsc_khz() noexcept override { return 2'000'000; }
  uint64_t kvmclock_ns() noexcept override { return 5'000'000'000; }
  uint64_t wall_ns() noexcept override { return 1'700'000'005'000'000'123; }
  const VmSettings& settings() const noexcept override { return vm_settings; }
  bool exit_for_msr(uint32_t, bool, uint64_t, uint32_t) noexcept override { return false; }
  bool mmio(uint64_t, void* data, unsigned size, bool write) noexcept override {
    if (!write) std::memset(data, 0xff, size);
    return true;
  }
  bool io(uint16_t, void*, unsigned, uint32_t, bool) noexcept override { return true; }
  std::mutex& split_lock() noexcept override { return mutex; }
  uint64_t hypercall(uint64_t number, const uint64_t (&arguments)[4]) noexcept override {
    return number + arguments[0];
  }

  uint64_t apic_base = 0xfee0'0900, time = 1'000'000;
  uint8_t priority = 0;
  VmSettings vm_settings;
  std::mutex mutex;
};

// Selectors of the ready-made GDT.
enum Selector : uint16_t {
  code0 = 0x08,
  data0 = 0x10,
  code3 = 0x18 | 3,
  data3 = 0x20 | 3,
  code0_64 = 0x28,
  code3_64 = 0x30 | 3,
  task = 0x38,   // and 0x40 in long mode
  task2 = 0x48,  //
  gate = 0x50,   // and 0x58 in long mode
  table = 0x60,
  conforming0 = 0x68,
  absent_data = 0x70,
  read_only = 0x78,
  task_gate = 0x80,
  code0_16 = 0x88,
};

inline constexpr uint64_t gdt_at = 0x10000, idt_at = 0x11000, tss_at = 0x12000, tss2_at = 0x13000,
                          stack0 = 0x20000, stack3 = 0x28000, ist_stack = 0x2c000, code_at = 0x30000,
                          handler_at = 0x31000;

class Machine {
 public:
  static constexpr uint64_t size = 4 << 20;

  Machine() : cpu(platform, 0) {
    ram_ = static_cast<uint8_t*>(
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    kvm_userspace_memory_region region{};
    region.memory_size = size;
    region.userspace_addr = reinterpret_cast<uint64_t>(ram_);
    memory_.insert(std::make_shared<Slot>(region, code_epoch_));
    cpu.memory = cpu.paravirt_memory = &memory_;
    set_features(host_cpuid());
    reset_cpu(cpu, false);
    build_gdt();
  }
  ~Machine() { munmap(ram_, size); }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  void set_features(const std::vector<kvm_cpuid_entry2>& entries) {
    cpu.features = Features(entries);
    decoder_.configure(cpu.features);
  }

  template <class T>
  T get(uint64_t at) const {
    T value;
    std::memcpy(&value, ram_ + at, sizeof value);
    return value;
  }
  template <class T>
  void put(uint64_t at, T value) {
    std::memcpy(ram_ + at, &value, sizeof value);
  }

  static uint64_t descriptor(uint32_t base, uint32_t limit, unsigned access, unsigned flags) {
    return (limit & 0xffff) | uint64_t{base & 0xff'ffff} << 16 | uint64_t{access} << 40 |
           uint64_t{limit >> 16 & 0xf} << 48 | uint64_t{flags} << 52 | uint64_t{base >> 24} << 56;
  }
  void set_descriptor(uint16_t selector, uint64_t raw) { put(gdt_at + (selector & 0xfff8), raw); }
  uint64_t get_descriptor(uint16_t selector) const { return get<uint64_t>(gdt_at + (selector & 0xfff8)); }

  // Gates: `type` 5 to 15, of the 8-byte and of the 16-byte format.
  void set_gate(uint64_t at, uint16_t selector, uint32_t offset, unsigned type, unsigned dpl,
                unsigned count = 0) {
    put(at, (offset & 0xffff) | uint64_t{selector} << 16 | uint64_t{count} << 32 |
                uint64_t{0x80 | dpl << 5 | type} << 40 | uint64_t{offset >> 16} << 48);
  }
  void set_vector(unsigned vector, unsigned type, unsigned dpl = 0, uint16_t selector = code0) {
    set_gate(idt_at + vector * 8, selector, handler_at, type, dpl);
  }
  void set_vector64(unsigned vector, unsigned type, unsigned dpl = 0, unsigned ist = 0) {
    set_gate(idt_at + vector * 16, code0_64, handler_at, type, dpl, ist);
    put(idt_at + vector * 16 + 8, uint64_t{0});
  }

  // Protected mode without paging, flat segments.
  void enter_protected(unsigned cpl) {
    cpu.cr0 = cr0::pe | cr0::et | cr0::ne;
    common(cpl, cpl == 0 ? code0 : code3, 8);
    put<uint32_t>(tss_at + 4, stack0);
    put<uint16_t>(tss_at + 8, data0);
    put<uint16_t>(tss_at + 0x66, 0x68);
  }
  // Long mode, 64-bit code, the first GiB mapped to itself for everyone.
  void enter_long(unsigned cpl) {
    put<uint64_t>(0x1000, 0x2007);
    put<uint64_t>(0x2000, 0x3007);
    for (unsigned i = 0; i < 512; ++i) put<uint64_t>(0x3000 + i * 8, uint64_t{i} << 21 | 0x87);
    cpu.cr3 = 0x1000;
    cpu.cr4 = cr4::pae | cr4::osfxsr;
    cpu.efer = efer::lme | efer::lma | efer::sce | efer::nxe;
    cpu.cr0 = cr0::pe | cr0::et | cr0::ne | cr0::wp | cr0::pg;
    set_descriptor(task + 8, 0);
    common(cpl, cpl == 0 ? code0_64 : code3_64, 16);
    put<uint64_t>(tss_at + 4, stack0);
    put<uint64_t>(tss_at + 0x24, ist_stack);
    put<uint16_t>(tss_at + 0x66, 0x68);
  }
  // Virtual-8086 mode at linear 0x30000.
  void enter_v86(unsigned iopl) {
    enter_protected(0);
    cpu.set_rflags(flag::vm | uint64_t{iopl} << 12 | flag::if_ | flag::fixed);
    for (unsigned i = seg_es; i <= seg_gs; ++i) cpu.segment[i] = v86_segment(0x2000);
    cpu.segment[seg_cs] = v86_segment(code_at >> 4);
    cpu.gpr[rsp] = 0x8000;
    cpu.rip = 0;
    cpu.set_cpl(3);
  }
  void enter_real() {
    for (unsigned i = seg_es; i <= seg_gs; ++i) cpu.segment[i].base = cpu.segment[i].selector = 0;
    cpu.segment[seg_cs].selector = code_at >> 4;
    cpu.segment[seg_cs].base = code_at;
    cpu.idtr = {.base = 0, .limit = 0x3ff};
    cpu.gpr[rsp] = 0x8000;
    cpu.rip = 0;
    cpu.state_changed();
  }

  Segment load(uint16_t selector) const {
    Segment out = decode_descriptor(get_descriptor(selector), selector);
    return out;
  }

  // Runs one instruction of the system family at CS:RIP. True: done, RIP is the next one's; false: faulted.
  bool run(std::initializer_list<uint8_t> bytes) {
    const uint64_t base = cpu.mode() == Mode::bits64 ? 0 : cpu.segment[seg_cs].base;
    std::array<uint8_t, 16> image{};
    std::copy(bytes.begin(), bytes.end(), image.begin());
    std::memcpy(ram_ + base + cpu.rip, image.data(), image.size());
    cpu.gpr[gpr_rip] = cpu.rip;
    cpu.pending = {};
    op = Op{};
    decoder_.decode(cpu, cpu.rip, image.data(), static_cast<unsigned>(image.size()), op);
    if (op.complex == nullptr) return false;
    const Step step = op.complex(cpu, op);
    if (step == Step::next) cpu.rip = cpu.next_rip(op);
    return step != Step::fault;
  }
  bool faulted(Exception vector, uint32_t error) const {
    return cpu.pending.valid && cpu.pending.vector == vector && cpu.pending.error == error;
  }

  FakePlatform platform;
  Cpu cpu;
  Op op;

 private:
  void build_gdt() {
    set_descriptor(code0, descriptor(0, 0xfffff, 0x9b, 0xc));
    set_descriptor(data0, descriptor(0, 0xfffff, 0x93, 0xc));
    set_descriptor(code3, descriptor(0, 0xfffff, 0xfb, 0xc));
    set_descriptor(data3, descriptor(0, 0xfffff, 0xf3, 0xc));
    set_descriptor(code0_64, descriptor(0, 0xfffff, 0x9b, 0xa));
    set_descriptor(code3_64, descriptor(0, 0xfffff, 0xfb, 0xa));
    set_descriptor(task, descriptor(tss_at, 0x20ff, 0x8b, 0));
    set_descriptor(task2, descriptor(tss2_at, 0x67, 0x89, 0));
    set_descriptor(table, descriptor(0x14000, 0xff, 0x82, 0));
    set_descriptor(conforming0, descriptor(0, 0xfffff, 0x9f, 0xc));
    set_descriptor(absent_data, descriptor(0, 0xfffff, 0x73, 0xc));
    set_descriptor(read_only, descriptor(0, 0xfffff, 0xf1, 0xc));
    set_descriptor(code0_16, descriptor(0x30000, 0xffff, 0x9b, 0));
    set_gate(gdt_at + task_gate, task2, 0, 5, 3);
  }
  void common(unsigned cpl, uint16_t cs, unsigned gate_size) {
    cpu.gdtr = {.base = gdt_at, .limit = 0xff};
    cpu.idtr = {.base = idt_at, .limit = static_cast<uint16_t>(256 * gate_size - 1)};
    const uint16_t data = cpl == 0 ? data0 : data3;
    for (const SegmentName name : {seg_es, seg_ss, seg_ds, seg_fs, seg_gs}) cpu.segment[name] = load(data);
    cpu.segment[seg_cs] = load(cs);
    cpu.tr = load(task);
    cpu.gpr[rsp] = cpl == 0 ? stack0 - 0x100 : stack3;
    cpu.rip = code_at;
    cpu.flush_tlb(false);
    cpu.set_cpl(cpl);
  }

  CodeWatch code_epoch_;
  MemoryMap memory_;
  uint8_t* ram_;
  Decoder decoder_;
};

}  // namespace lodge::kvm::soft::testing
