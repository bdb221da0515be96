// What the generator puts between instructions of the pool: pointers, stack runs, control words, jumps and
// calls, counted loops, stores into the block.
#include <algorithm>
#include <cstring>

#include "block_generator.hpp"

namespace lodge::oracle {

void BlockGenerator::emit_pointer(Block& block) {
  const unsigned reg = favourite();
  const unsigned rex = reg >> 3;
  if (const auto from = any(Role::pointer); from && g_.chance(50)) {
    if (g_.chance(50)) {  // mov
      bits32_ ? add(block, {0x89, 0xc0 | *from << 3 | reg})
              : add(block, {0x48 | (*from >> 3) << 2 | rex, 0x89, 0xc0 | (*from & 7) << 3 | (reg & 7)});
    } else {  // lea with a displacement; of RSP too
      const auto disp = (static_cast<unsigned>(g_.below(128)) - 64) & 0xff;
      const bool narrow = g_.chance(20);
      const unsigned prefix = (narrow ? 0x40u : 0x48u) | (reg >> 3) << 2 | *from >> 3;
      std::array<uint8_t, 16> bytes{};
      unsigned n = 0;
      const auto put = [&](unsigned byte) { bytes[n++] = static_cast<uint8_t>(byte); };
      if (!bits32_ && g_.chance(10)) put(0x67);
      if (!bits32_) put(prefix);
      put(0x8d);
      put(0x40 | (reg & 7) << 3 | (*from & 7));
      if ((*from & 7) == 4) put(0x24);
      put(disp);
      add(block, bytes.data(), n);
    }
  } else {
    const auto value = static_cast<uint32_t>(address());
    std::array<unsigned, 4> v = {value & 0xff, value >> 8 & 0xff, value >> 16 & 0xff, value >> 24};
    bits32_ ? add(block, {0xb8 | reg, v[0], v[1], v[2], v[3]})
            : add(block, {0x40 | rex, 0xb8 | (reg & 7), v[0], v[1], v[2], v[3]});
  }
  role_[reg] = Role::pointer;
}

// What a POPF of user code may be made to change, the bits that it ignores included. No TF, whose trap comes
// behind one more instruction; DF seldom, because pointers then run out of the window.
unsigned BlockGenerator::changeable_flags(const Block& block) {
  constexpr unsigned ignored = 0x1b'3202;  // VIP, VIF, VM, RF, IOPL, IF, the fixed one
  return arithmetic_flags | 0x20'4000 | ignored | (g_.chance(10) ? 0x400 : 0) |
         (block.integer_only && g_.chance(20) ? 0x4'0000 : 0);
}

// MOV of the accumulator from and to an address in the instruction.
void BlockGenerator::emit_absolute(Block& block) {
  const auto opcode = 0xa0 | static_cast<unsigned>(g_.below(4));
  const auto at = static_cast<uint32_t>(address());
  const std::array<unsigned, 4> a = {at & 0xff, at >> 8 & 0xff, at >> 16 & 0xff, at >> 24};
  const bool added = !bits32_        ? add(block, {opcode, a[0], a[1], a[2], a[3], 0, 0, 0, 0})
                     : g_.chance(20) ? add(block, {0x66, opcode, a[0], a[1], a[2], a[3]})
                                     : add(block, {opcode, a[0], a[1], a[2], a[3]});
  if (added && (opcode & 2) == 0) role_[0] = Role::data;
}

// push value; LDMXCSR or FLDCW [rsp]: mostly with all exceptions masked, as programs have them.
void BlockGenerator::emit_control(Block& block) {
  if (block.integer_only || role_[sp] != Role::pointer) return emit_pointer(block);
  const bool x87 = g_.chance(50), masked = g_.chance(85);
  const auto any = static_cast<unsigned>(g_.random());
  const unsigned value = x87 ? (any & 0xf7f) | (masked ? 0x3f : 0) : (any & 0xffff) | (masked ? 0x1f80 : 0);
  if (!add(block, {0x68, value & 0xff, value >> 8 & 0xff, 0, 0})) return;
  x87 ? add(block, {0xd9, 0x2c, 0x24}) : add(block, {0x0f, 0xae, 0x14, 0x24});
}

// Pushes and pops, and adjustments of RSP in all the forms that compilers and others use.
void BlockGenerator::emit_stack(Block& block) {
  if (role_[sp] != Role::pointer) return emit_pointer(block);
  const auto small = static_cast<unsigned>(g_.below(12)) * (bits32_ ? 4 : 8);
  const unsigned rex = bits32_ || g_.chance(8) ? 0x40 : 0x48;  // ADD ESP clears the upper half
  const auto short_one = [&](unsigned opcode, unsigned reg) {
    bits32_ || reg < 8 ? add(block, {opcode | (reg & 7)}) : add(block, {0x41, opcode | (reg & 7)});
  };
  switch (g_.below(12)) {
    case 0:
    case 1:
    case 2:
    case 3: short_one(0x50, favourite()); return;
    case 4:
    case 5:
    case 6: {
      const unsigned reg = favourite();
      if (reg == sp && g_.chance(90)) return;
      short_one(0x58, reg);
      role_[reg] = Role::data;
      return;
    }
    case 7: add(block, {0x6a, static_cast<unsigned>(g_.below(256))}); return;
    case 8: bits32_ ? add(block, {0x83, 0xec, small}) : add(block, {rex, 0x83, 0xec, small}); return;
    case 9: bits32_ ? add(block, {0x83, 0xc4, small}) : add(block, {rex, 0x83, 0xc4, small}); return;
    case 10:
      bits32_ ? add(block, {0x8d, 0x64, 0x24, small}) : add(block, {rex, 0x8d, 0x64, 0x24, small});
      return;
    default:
      if (g_.chance(40)) {  // pushf; [xor dword [rsp], some;] popf
        add(block, {0x9c});
        if (g_.chance(60)) {
          const auto flags = static_cast<unsigned>(g_.random()) & changeable_flags(block);
          add(block, {0x81, 0x34, 0x24, flags & 0xff, flags >> 8 & 0xff, flags >> 16 & 0xff, flags >> 24});
        }
        add(block, {0x9d});
      } else if (role_[5] == Role::pointer) {
        add(block, {0xc9});
        role_[5] = Role::data;
      } else {  // mov ebp, esp
        bits32_ ? add(block, {0x89, 0xe5}) : add(block, {0x48, 0x89, 0xe5});
        role_[5] = Role::pointer;
      }
  }
}

// LOOPNE, LOOPE, LOOP or JRCXZ (`kind` 0 to 3), also with the other address size; without a distance to
// itself. A count of 64 bits and of 16 is not the one that a MOV to ECX has set.
void BlockGenerator::add_counted(Block& block, unsigned kind, std::optional<unsigned> distance) {
  role_[1] = Role::data;
  if ((distance || !bits32_) && g_.chance(20))
    add(block, {0x67, 0xe0 | kind, distance.value_or(0xfd)});
  else
    add(block, {0xe0 | kind, distance.value_or(0xfe)});
}

// Jumps over what follows, calls with their return, and loops that are counted in memory.
void BlockGenerator::emit_flow(Block& block) {
  const auto forward = [&](unsigned width) {
    forward_.push_back(
        {.displacement = block.program.length - width, .parts_left = 1 + static_cast<unsigned>(g_.below(5))});
  };
  const auto condition = static_cast<unsigned>(g_.below(16));
  switch (g_.below(10)) {
    case 0:
    case 1:
      if (add(block, {0x0f, 0x80 | condition, 0, 0, 0, 0})) forward(4);
      return;
    case 2:
      if (add(block, {0xe9, 0, 0, 0, 0})) forward(4);
      return;
    case 3:  // the return address is what follows: a pop, or the RET below
      if (role_[sp] == Role::pointer && add(block, {0xe8, 0, 0, 0, 0})) forward(4);
      return;
    case 4: {  // call; jmp over; ... ret
      if (role_[sp] != Role::pointer) return;
      if (!add(block, {0xe8, 5, 0, 0, 0}) || !add(block, {0xe9, 0, 0, 0, 0})) return;
      const auto jump = block.program.length;
      const auto body = g_.below(4);
      for (uint64_t i = 0; i < body; ++i) g_.chance(50) ? emit_from_pool(block) : emit_stack(block);
      const bool frees = g_.chance(20);
      frees ? add(block, {0xc2, 8, 0}) : add(block, {0xc3});
      const auto distance = static_cast<uint32_t>(block.program.length - jump);
      std::memcpy(&block.program.code[jump - 4], &distance, 4);
      return;
    }
    case 5: {  // a jump or a call through a register or memory, to what follows it
      const unsigned reg = bits32_ ? static_cast<unsigned>(g_.below(8)) : favourite();
      if (reg == sp) return;
      const bool call = role_[sp] == Role::pointer && g_.chance(40);
      const auto through = any(Role::pointer);
      const bool memory =
          through && g_.chance(50) && *through != reg && (*through & 7) != 4 && (*through & 7) != 5;
      // mov reg, target; [mov [p], reg;] jmp reg or [p]
      const unsigned size = (bits32_ ? 5 : 6) + (memory ? (bits32_ ? 2 : 3) : 0) + (bits32_ ? 2 : 3);
      const auto target = static_cast<uint32_t>(block.program.state.rip + block.program.length + size);
      const std::array<unsigned, 4> t = {target & 0xff, target >> 8 & 0xff, target >> 16 & 0xff,
                                         target >> 24};
      const unsigned high = reg >> 3, operation = call ? 0x10 : 0x20;
      bits32_ ? add(block, {0xb8 | reg, t[0], t[1], t[2], t[3]})
              : add(block, {0x40 | high, 0xb8 | (reg & 7), t[0], t[1], t[2], t[3]});
      if (memory) {
        const unsigned p = *through & 7, ph = *through >> 3;
        bits32_ ? add(block, {0x89, reg << 3 | p})
                : add(block, {0x48 | high << 2 | ph, 0x89, (reg & 7) << 3 | p});
        bits32_ ? add(block, {0xff, operation | p}) : add(block, {0x40 | ph, 0xff, operation | p});
      } else {
        bits32_ ? add(block, {0xff, 0xc0 | operation | reg})
                : add(block, {0x40 | high, 0xff, 0xc0 | operation | (reg & 7)});
      }
      role_[reg] = Role::data;
      return;
    }
    case 6:  // [mov ecx, few;] LOOP, LOOPE, LOOPNE or JRCXZ over a jump
      if (g_.chance(60)) add(block, {0xb9, static_cast<unsigned>(g_.below(3)), 0, 0, 0});
      add_counted(block, static_cast<unsigned>(g_.below(4)), 5);
      if (add(block, {0xe9, 0, 0, 0, 0})) forward(4);
      return;
    case 7:  // mov ecx, few; a LOOP to itself
      if (!add(block, {0xb9, 1 + static_cast<unsigned>(g_.below(5)), 0, 0, 0})) return;
      add_counted(block, static_cast<unsigned>(g_.below(3)), std::nullopt);
      return;
    default: {  // sub dword [counter], 1; jg back: a loop that is entered again runs once
      if (block.parts.empty() || counters_ > 2) return;
      const auto counter = static_cast<uint32_t>(counter_base + 64 * counters_++);
      const std::array<unsigned, 4> c = {counter & 0xff, counter >> 8 & 0xff, counter >> 16 & 0xff,
                                         counter >> 24};
      const Block::Part& target =
          block.parts[block.parts.size() - 1 - g_.below(std::min<size_t>(block.parts.size(), 12))];
      const auto& counted = target.decoded.insn;
      if (counted.raw.imm[0].value.s == -int64_t{counted.length} && counted.raw.imm[0].is_relative != 0)
        return;  // a LOOP to itself, whose count has been used up
      const auto back = target.offset;
      const bool added = bits32_ ? add(block, {0x83, 0x2d, c[0], c[1], c[2], c[3], 1})
                                 : add(block, {0x83, 0x2c, 0x25, c[0], c[1], c[2], c[3], 1});
      if (!added) return;
      const uint32_t distance = back - (block.program.length + 6u);
      add(block, {0x0f, 0x8f, distance & 0xff, distance >> 8 & 0xff, distance >> 16 & 0xff, distance >> 24});
    }
  }
}

// A store into an instruction that follows: its immediate, or all of it, by one that treats flags alike: the
// translator does not keep flags for a store that the code behind it, as it was, would not have read.
void BlockGenerator::emit_patch(Block& block) {
  constexpr std::array<unsigned, 3> plain = {0x90, 0x98, 0x99}, carry = {0xf8, 0xf9, 0xf8};
  const auto& bytes = g_.chance(50) ? plain : carry;
  const auto value = static_cast<unsigned>(g_.random());
  const bool immediate = g_.chance(60);
  const unsigned between = static_cast<unsigned>(g_.below(4));  // NOPs
  // mov byte [place], value
  const unsigned length = bits32_ ? 7 : 8;
  const unsigned place = block.program.length + length + between + (immediate ? 1 : 0);
  const auto linear = static_cast<uint32_t>(block.program.state.rip + place);
  const std::array<unsigned, 4> p = {linear & 0xff, linear >> 8 & 0xff, linear >> 16 & 0xff, linear >> 24};
  const unsigned byte = immediate ? value & 0xff : bytes[g_.below(bytes.size())];
  const bool added = bits32_ ? add(block, {0xc6, 0x05, p[0], p[1], p[2], p[3], byte})
                             : add(block, {0xc6, 0x04, 0x25, p[0], p[1], p[2], p[3], byte});
  if (!added) return;
  for (unsigned i = 0; i < between; ++i) add(block, {0x90});
  if (immediate)
    add(block, {0xb8 | 1, 0, 0, 0, 0});  // mov ecx, imm32
  else
    add(block, {bytes[g_.below(bytes.size())]});
  role_[0] = role_[1] = role_[2] = Role::data;
  block.changes_itself = true;
}

void BlockGenerator::emit(Block& block) {
  const uint64_t what = g_.below(100);
  if (!any(Role::pointer) || what < 6) return emit_pointer(block);
  if (what < 24) return emit_stack(block);
  if (what < 32) return emit_flow(block);
  if (what >= 98) return emit_absolute(block);
  if (what >= 96) return emit_control(block);
  if (block.changes_itself && what < 36) return emit_patch(block);
  emit_from_pool(block);
}

}  // namespace lodge::oracle
