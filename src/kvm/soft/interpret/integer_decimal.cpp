// Decimal adjustments (SDM volume 2): none of them exists in 64-bit mode. And BOUND.
#include "kvm/soft/interpret/integer_operands.hpp"

namespace lodge::kvm::soft::integer {

namespace {
void set_szp(Cpu& cpu, uint8_t result, bool carry, bool adjust) noexcept {
  uint16_t f = 0;
  alu<Alu::test, uint8_t>(result, result, f);
  cpu.arith = static_cast<uint16_t>((f & ~0x1101) | (carry ? 0x100 : 0) | (adjust ? 0x1000 : 0));
}
}  // namespace

template <bool Subtract>
Step decimal(Cpu& cpu, const Op&) noexcept {
  const auto old = cpu.reg<uint8_t>(0);
  const bool old_carry = cpu.cf();
  const bool adjust = (old & 15) > 9 || (cpu.arith & 0x1000) != 0;
  const bool high = old > 0x99 || old_carry;
  auto al = old;
  bool carry = high;
  if (adjust) {
    if (Subtract) carry = carry || old < 6;
    al = static_cast<uint8_t>(Subtract ? al - 6 : al + 6);
  }
  if (high) al = static_cast<uint8_t>(Subtract ? al - 0x60 : al + 0x60);
  cpu.reg<uint8_t>(0) = al;
  set_szp(cpu, al, carry, adjust);
  return Step::next;
}

template <bool Subtract>
Step ascii(Cpu& cpu, const Op&) noexcept {
  auto ax = cpu.reg<uint16_t>(0);
  const bool adjust = (ax & 15) > 9 || (cpu.arith & 0x1000) != 0;
  if (adjust) ax = static_cast<uint16_t>(Subtract ? ax - 0x106 : ax + 0x106);
  ax &= 0xff0f;
  cpu.reg<uint16_t>(0) = ax;
  set_szp(cpu, static_cast<uint8_t>(ax), adjust, adjust);
  return Step::next;
}

Step aam(Cpu& cpu, const Op& op) noexcept {
  const auto base = static_cast<uint8_t>(op.imm);
  if (base == 0) return done(cpu.raise(Exception::de));
  const auto al = cpu.reg<uint8_t>(0);
  cpu.reg<uint8_t>(1) = al / base;
  cpu.reg<uint8_t>(0) = al % base;
  set_szp(cpu, al % base, false, false);
  return Step::next;
}

Step aad(Cpu& cpu, const Op& op) noexcept {
  const auto al =
      static_cast<uint8_t>(cpu.reg<uint8_t>(0) + cpu.reg<uint8_t>(1) * static_cast<uint8_t>(op.imm));
  cpu.reg<uint16_t>(0) = al;
  set_szp(cpu, al, false, false);
  return Step::next;
}

Step bound(Cpu& cpu, const Op& op) noexcept {
  uint64_t lin = 0;
  if (!cpu.linear(op, op.size * 2, false, lin)) return Step::fault;
  uint64_t pair = 0;
  if (!cpu.read_bytes(lin, &pair, op.size * 2)) return Step::fault;
  const bool outside =
      op.size == 2 ? static_cast<int16_t>(cpu.reg<uint16_t>(op.dst)) < static_cast<int16_t>(pair) ||
                         static_cast<int16_t>(cpu.reg<uint16_t>(op.dst)) > static_cast<int16_t>(pair >> 16)
                   : static_cast<int32_t>(cpu.reg<uint32_t>(op.dst)) < static_cast<int32_t>(pair) ||
                         static_cast<int32_t>(cpu.reg<uint32_t>(op.dst)) > static_cast<int32_t>(pair >> 32);
  return done(!outside || cpu.raise(Exception::br));
}

Complex decimal_instruction(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_AAA: return ascii<false>;
    case ZYDIS_MNEMONIC_AAS: return ascii<true>;
    case ZYDIS_MNEMONIC_AAD: return aad;
    case ZYDIS_MNEMONIC_AAM: return aam;
    case ZYDIS_MNEMONIC_DAA: return decimal<false>;
    case ZYDIS_MNEMONIC_DAS: return decimal<true>;
    case ZYDIS_MNEMONIC_BOUND: return bound;
    default: return nullptr;
  }
}

}  // namespace lodge::kvm::soft::integer
