// Gathers and scatters, packed into Op::imm.
#pragma once

#include <bit>
#include <cstdint>

namespace lodge::kvm::soft::simd {

struct Gather {
  uint8_t data = 0, index = 0, mask = 0;  // register numbers; mask: vector (VEX) or opmask (EVEX)
  uint8_t element_log = 0;                // log2 of an element's bytes: 2 or 3
  uint8_t index_log = 0;                  // of an index
  uint8_t count = 0;                      // of elements
  uint8_t vector_size = 0;                // bytes of the data register: what is above is cleared (gathers)
  uint8_t evex = 0;
};
static_assert(sizeof(Gather) == 8);

}  // namespace lodge::kvm::soft::simd
