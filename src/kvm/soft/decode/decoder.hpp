// From guest bytes to blocks of ops. Zydis parses; the families (interpret/) choose the handlers.
#pragma once

#include <Zydis/Zydis.h>

#include <cstdint>

#include "kvm/soft/interpret/block.hpp"

namespace lodge::kvm::soft {

// The modes that decoding and translating depend on, as a number below 65536 (part of a block's identity).
uint32_t decode_key(const Cpu& cpu) noexcept;
namespace key {
inline constexpr uint32_t mode = 7, flat = 8, user = 0x10;
inline constexpr unsigned tlb_shift = 5;  // two bits: which TLB set
inline constexpr uint32_t ts = 0x80, em = 0x100, osfxsr = 0x200, avx = 0x400, avx512 = 0x800,
                          tsc_direct = 0x2000,  // RDTSC is the host's, plus an offset
    kernel = 0x4000,                            // CPL 0
    smm = 0x8000,                               // system-management mode, whose memory is another one
    fp_unmasked = 0x1000;                       // some x87 or SIMD exception is not masked
}  // namespace key

// Sets what encodings mean under the guest's CPUID.
void configure_decoder(ZydisDecoder& decoder, const Features& features) noexcept;

class Decoder {
 public:
  // To be called when the vCPU's CPUID changes: some encodings mean another instruction where a feature is
  // hidden.
  void configure(const Features& features) noexcept;

  enum class Result : uint8_t {
    ok,         // `op` is ready
    last,       // the same, and the block must end behind it
    more,       // the bytes end within the instruction
    undefined,  // #UD: op raises it
  };
  // Decodes the instruction at `bytes` (1 to 15 or more), which lies op.offset bytes behind the block's start
  // at `block_rip`. Never throws; total for every byte string.
  Result decode(Cpu& cpu, uint64_t block_rip, const uint8_t* bytes, unsigned available, Op& op) noexcept;

  // The op that ends a block whose last instruction does not branch: continues at op.offset.
  static Op end_of_block(unsigned offset) noexcept;

 private:
  ZydisDecoder decoders_[5];  // by machine_mode()
};

}  // namespace lodge::kvm::soft
