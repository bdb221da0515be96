// A processor with a little memory for tests of single instructions: 64-bit mode at CPL 0 unless changed, the
// first 2 MiB mapped one to one of which the first 64 KiB are RAM, everything switched on.
#pragma once

#include <atomic>
#include <initializer_list>
#include <vector>

#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/cpu/quiet_platform.hpp"
#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/interpret/vector/exchange.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft::simd {

struct TestMachine {
  static constexpr uint64_t ram_size = 0x10000, tables = 0x1000, data = 0x8000, code = 0x6000;
  // The page behind `data` is not mapped.
  static constexpr uint64_t hole = data + 0x1000;

  TestMachine() : ram(ram_size + page_size) {
    host = reinterpret_cast<uint8_t*>((reinterpret_cast<uint64_t>(ram.data()) + page_mask) & ~page_mask);
    entry(tables, 0, (tables + 0x1000) | 7);
    entry(tables + 0x1000, 0, (tables + 0x2000) | 7);
    entry(tables + 0x2000, 0, (tables + 0x3000) | 7);
    for (uint64_t i = 0; i < 16; ++i)
      if (i * page_size != hole) entry(tables + 0x3000, i, i * page_size | 7);
    kvm_userspace_memory_region region = {};
    region.memory_size = ram_size;
    region.userspace_addr = reinterpret_cast<uint64_t>(host);
    map.insert(std::make_shared<Slot>(region, code_epoch));
    cpu.memory = &map;
    cpu.cr0 = cr0::pe | cr0::mp | cr0::et | cr0::ne | cr0::pg;
    cpu.cr3 = tables;
    cpu.cr4 = cr4::pae | cr4::osfxsr | cr4::osxmmexcpt | cr4::osxsave;
    cpu.efer = efer::lme | efer::lma;
    cpu.xcr0 = supported_xcr0();
    cpu.features = Features(host_cpuid());
    reset_vector(cpu.vector, false);
    for (const auto s : {seg_es, seg_ss, seg_ds}) cpu.segment[s] = segment(0x10, 0xc093);
    cpu.segment[seg_cs] = segment(0x8, 0xa09b);
    cpu.set_cpl(0);
    decoder.configure(cpu.features);
  }

  static Segment segment(uint16_t selector, uint16_t attributes) {
    return {.base = 0, .limit = 0xffff'ffff, .selector = selector, .attributes = attributes};
  }
  void protected_mode_32() {
    cpu.efer = 0;
    cpu.cr0 &= ~cr0::pg;
    cpu.segment[seg_cs] = segment(0x8, 0xc09b);
    cpu.state_changed();
  }
  void entry(uint64_t table, uint64_t index, uint64_t value) {
    std::memcpy(host + table + 8 * index, &value, 8);
  }

  // Runs one instruction; true when it raised nothing.
  bool run(std::initializer_list<uint8_t> bytes) {
    std::vector<uint8_t> padded(bytes);
    padded.resize(16, 0x90);
    cpu.pending = {};
    cpu.rip = code;
    cpu.gpr[gpr_rip] = code;
    std::array<Op, 2> ops{};
    decoder.decode(cpu, code, padded.data(), 15, ops[0]);
    ops[1] = Decoder::end_of_block(ops[0].length);
    cpu.alone = true;
    ops[0].handler(cpu, ops.data());
    return !cpu.pending.valid;
  }
  // Runs one and expects this exception.
  bool raises(Exception vector, std::initializer_list<uint8_t> bytes) {
    return !run(bytes) && cpu.pending.vector == vector && cpu.rip == code;
  }

  template <class T>
  T& at(uint64_t address) {
    return *reinterpret_cast<T*>(host + address);
  }
  template <class T>
  T lane(unsigned reg, unsigned i) {
    T value;
    std::memcpy(&value, &cpu.vector.zmm[reg][i * sizeof(T)], sizeof(T));
    return value;
  }
  template <class T>
  void set_lane(unsigned reg, unsigned i, T value) {
    std::memcpy(&cpu.vector.zmm[reg][i * sizeof(T)], &value, sizeof(T));
  }

  std::vector<uint8_t> ram;
  uint8_t* host = nullptr;
  QuietPlatform platform;
  CodeWatch code_epoch;
  MemoryMap map;
  Cpu cpu{platform, 0};
  Decoder decoder;
};

}  // namespace lodge::kvm::soft::simd
