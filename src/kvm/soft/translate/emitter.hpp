// Writes the host instructions that translated code is made of. Only the forms that are needed; the guest's
// own instructions are copied with their operands patched (copy.hpp).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace lodge::kvm::soft {

// Host registers by number. The guest's registers live in the host's registers of the same number, but for
// RSP, R10 and R11: their home is Cpu::gpr, the host's R10 and R11 are the translator's own, and the host's
// RSP points at the Cpu.
inline constexpr uint8_t scratch0 = 10, scratch1 = 11;
// Registers as a set.
constexpr uint16_t register_bit(unsigned reg) {
  return static_cast<uint16_t>(1u << reg);
}
inline constexpr uint16_t homeless_registers =
    register_bit(4) | register_bit(scratch0) | register_bit(scratch1);
constexpr bool lives_in_memory(unsigned guest_register) {
  return (homeless_registers & register_bit(guest_register)) != 0;
}
constexpr unsigned count_homeless(uint16_t registers) {
  return static_cast<unsigned>(std::popcount(static_cast<uint16_t>(registers & homeless_registers)));
}

class Emitter {
 public:
  Emitter(uint8_t* begin, uint8_t* end) noexcept : at_(begin), end_(end) {}

  uint8_t* at() const noexcept { return at_; }
  // Whether `size` more bytes fit; asked once for every guest instruction.
  bool room(size_t size) const noexcept { return static_cast<size_t>(end_ - at_) >= size; }

  void u8(unsigned value) noexcept { *at_++ = static_cast<uint8_t>(value); }
  void u32(uint64_t value) noexcept {
    const auto low = static_cast<uint32_t>(value);
    std::memcpy(at_, &low, 4);
    at_ += 4;
  }
  void u64(uint64_t value) noexcept {
    std::memcpy(at_, &value, 8);
    at_ += 8;
  }
  void bytes(const uint8_t* data, size_t size) noexcept {
    std::memcpy(at_, data, size);
    at_ += size;
  }

  // reg, [rsp + disp] of the state; `opcode` may have a 0x0f00 map.
  void state(unsigned opcode, unsigned reg, int64_t disp, bool wide = true) noexcept {
    const unsigned rex = 0x40u | (wide ? 8u : 0u) | (reg >> 3 & 1) << 2;
    if (rex != 0x40) u8(rex);
    opcode_bytes(opcode);
    state_operand(reg, disp);
  }
  // The ModRM, SIB and displacement of [rsp + disp].
  void state_operand(unsigned reg, int64_t disp) noexcept {
    const bool near = disp == static_cast<int8_t>(disp);
    u8((near ? 0x44u : 0x84u) | (reg & 7) << 3);
    u8(0x24);
    near ? u8(static_cast<unsigned>(disp)) : u32(static_cast<uint64_t>(disp));
  }
  void load(unsigned reg, int64_t disp) noexcept { state(0x8b, reg, disp); }
  void load32(unsigned reg, int64_t disp) noexcept { state(0x8b, reg, disp, false); }
  void store(int64_t disp, unsigned reg) noexcept { state(0x89, reg, disp); }

  // reg, [rsp + index << scale + disp]
  void indexed(unsigned opcode, unsigned reg, unsigned index, unsigned scale, int64_t disp) noexcept {
    u8(0x48u | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1);
    opcode_bytes(opcode);
    u8(0x84u | (reg & 7) << 3);
    u8(scale << 6 | (index & 7) << 3 | 4);
    u32(static_cast<uint64_t>(disp));
  }

  void move(unsigned to, unsigned from, bool wide = true) noexcept {
    const unsigned rex = 0x40u | (wide ? 8u : 0u) | (from >> 3 & 1) << 2 | (to >> 3 & 1);
    if (rex != 0x40) u8(rex);
    u8(0x89);
    u8(0xc0u | (from & 7) << 3 | (to & 7));
  }
  void move_immediate(unsigned reg, uint64_t value) noexcept {
    if (value >> 32 == 0) {
      if (reg >= 8) u8(0x41);
      u8(0xb8 | (reg & 7));
      u32(value);
    } else if (static_cast<uint64_t>(static_cast<int32_t>(value)) == value) {
      u8(0x48 | (reg >> 3 & 1));
      u8(0xc7);
      u8(0xc0 | (reg & 7));
      u32(value);
    } else {
      move_address(reg, value);
    }
  }
  void move_address(unsigned reg, uint64_t value) noexcept {
    u8(0x48 | (reg >> 3 & 1));
    u8(0xb8 | (reg & 7));
    u64(value);
  }
  // reg = base + (index << scale) + disp; 32 bits of it unless `wide`. Registers 16 and up are absent.
  void lea(unsigned reg, unsigned base, unsigned index, unsigned scale, int64_t disp, bool wide) noexcept {
    const bool has_base = base < 16;
    const bool has_index = index < 16;
    const unsigned rex = 0x40u | (wide ? 8u : 0u) | (reg >> 3 & 1) << 2 |
                         (has_index ? (index >> 3 & 1) << 1 : 0u) | (has_base ? base >> 3 & 1 : 0u);
    if (rex != 0x40) u8(rex);
    u8(0x8d);
    memory_operand(reg, has_base ? base : 5, has_base, has_index ? index : 4, has_index, scale, disp);
  }
  // ModRM, SIB and displacement of [reg of number `base` + disp], for base R10 and R11; 32-bit displacements
  // where 8-bit ones are scaled (EVEX).
  void scratch_operand(unsigned reg, unsigned base, int64_t disp, bool scaled) noexcept {
    if (disp == 0) {
      u8((reg & 7) << 3 | (base & 7));
    } else if (disp == static_cast<int8_t>(disp) && !scaled) {
      u8(0x40u | (reg & 7) << 3 | (base & 7));
      u8(static_cast<unsigned>(disp));
    } else {
      u8(0x80u | (reg & 7) << 3 | (base & 7));
      u32(static_cast<uint64_t>(disp));
    }
  }

  // reg <- [r10 + disp] and back, `size` bytes: 1, 2, 4 or 8.
  void load_at_scratch(unsigned reg, int64_t disp, int size) noexcept { at_scratch(0x8b, reg, disp, size); }
  void store_at_scratch(int64_t disp, unsigned reg, int size) noexcept { at_scratch(0x89, reg, disp, size); }
  // reg, [r10 + disp]; `opcode` is that of more than a byte.
  void at_scratch(unsigned opcode, unsigned reg, int64_t disp, int size) noexcept {
    if (size == 2) u8(0x66);
    u8((size == 8 ? 0x49u : 0x41u) | (reg >> 3 & 1) << 2);
    u8(size == 1 ? opcode - 1 : opcode);
    scratch_operand(reg, scratch0, disp, false);
  }

  // Jumps with a 32-bit displacement; return the place of the displacement.
  uint8_t* jump() noexcept { return u8(0xe9), displacement(); }
  uint8_t* jump_if(unsigned condition) noexcept { return u8(0x0f), u8(0x80 | condition), displacement(); }
  void jump_to(const void* target) noexcept { patch(jump(), target); }
  void jump_through_state(int64_t disp) noexcept {
    u8(0xff);
    state_operand(4, disp);
  }
  static void patch(uint8_t* displacement, const void* target) noexcept {
    const auto relative = static_cast<int32_t>(static_cast<const uint8_t*>(target) - (displacement + 4));
    std::memcpy(displacement, &relative, 4);
  }

  // jrcxz, or jecxz; returns the place of the 8-bit displacement.
  uint8_t* jump_if_rcx_is_zero(bool wide) noexcept {
    if (!wide) u8(0x67);
    u8(0xe3), u8(0);
    return at_ - 1;
  }
  static void patch_short(uint8_t* displacement, const void* target) noexcept {
    *displacement = static_cast<uint8_t>(static_cast<const uint8_t*>(target) - (displacement + 1));
  }

  // jne, when some of these bits of a 32-bit word of the state are set. Destroys flags.
  uint8_t* jump_if_any(int64_t word, uint64_t bits) noexcept {
    state(0xf7, 0, word, false);  // test dword [word], bits
    u32(bits);
    return jump_if(5);
  }
  // The same for any bit of it.
  uint8_t* jump_if_set(int64_t word) noexcept {
    state(0x83, 7, word, false);  // cmp dword [word], 0
    u8(0);
    return jump_if(5);
  }

  // The same while other vCPUs may be running the jump: they see the old target or the new one, because the
  // displacement is aligned (align_displacement()).
  static void patch_running(uint8_t* displacement, const void* target) noexcept {
    const auto relative = static_cast<int32_t>(static_cast<const uint8_t*>(target) - (displacement + 4));
    __atomic_store_n(reinterpret_cast<int32_t*>(displacement), relative, __ATOMIC_RELEASE);
  }
  // So that the displacement of a jump with `opcode` bytes before it, which comes next, is aligned.
  void align_displacement(unsigned opcode) noexcept {
    static constexpr uint8_t nop[4][3] = {{}, {0x90}, {0x66, 0x90}, {0x0f, 0x1f, 0x00}};
    const auto missing = static_cast<unsigned>(-(reinterpret_cast<uintptr_t>(at_) + opcode) & 3);
    bytes(nop[missing], missing);
  }

  // Keep the arithmetic flags in `home` (as Cpu::arith has them); RAX is saved in `temp`.
  void save_flags(int64_t home, unsigned temp) noexcept {
    move(temp, 0);
    u8(0x9f);                      // lahf
    u8(0x0f), u8(0x90), u8(0xc0);  // seto al
    u8(0x66);                      // mov [home], ax
    state(0x89, 0, home, false);
    move(0, temp);
  }
  void load_flags(int64_t home, unsigned temp) noexcept {
    move(temp, 0);
    state(0x0fb7, 0, home, false);  // movzx eax, word [home]
    u8(0x04), u8(0x7f);             // add al, 127
    u8(0x9e);                       // sahf
    move(0, temp);
  }

 private:
  void opcode_bytes(unsigned opcode) noexcept {
    if (opcode > 0xff) u8(opcode >> 8);
    u8(opcode);
  }
  uint8_t* displacement() noexcept {
    u32(0);
    return at_ - 4;
  }
  void memory_operand(unsigned reg, unsigned base, bool has_base, unsigned index, bool has_index,
                      unsigned scale, int64_t disp) noexcept {
    const bool sib = has_index || !has_base || (base & 7) == 4;
    unsigned mod = 2;
    if (!has_base)
      mod = 0;
    else if (disp == 0 && (base & 7) != 5)
      mod = 0;
    else if (disp == static_cast<int8_t>(disp))
      mod = 1;
    u8(mod << 6 | (reg & 7) << 3 | (sib ? 4 : base & 7));
    if (sib) u8(scale << 6 | (index & 7) << 3 | (base & 7));
    if (mod == 1)
      u8(static_cast<unsigned>(disp));
    else if (mod == 2 || !has_base)
      u32(static_cast<uint64_t>(disp));
  }

  uint8_t* at_;
  uint8_t* end_;
};

}  // namespace lodge::kvm::soft
