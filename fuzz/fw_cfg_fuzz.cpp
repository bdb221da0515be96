// The firmware configuration device under a hostile guest: any sequence of port accesses, with DMA requests
// that the guest has prepared in its memory.
#include <algorithm>
#include <cstring>

#include "machine/fw_cfg/fw_cfg.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lodge::machine;
  static GuestMemory memory(1 << 20);
  FwCfg device(memory);
  describe_machine(device, memory, 2);
  device.add_file("opt/open", std::vector<uint8_t>(48), true);
  // The input is also what lies in guest memory: the fuzzer writes its DMA requests there.
  memory.write(0, {data, std::min<size_t>(size, 4096)});
  while (size >= 6) {
    uint32_t value;
    std::memcpy(&value, data + 2, sizeof value);
    const unsigned access = 1u << (data[0] >> 4) % 3;
    const uint64_t offset = data[1] % (FwCfg::window_size - access + 1);
    // Every second DMA points at a request that is there: random addresses hardly ever do.
    if (offset == 8 && (data[0] & 2) != 0) value = __builtin_bswap32(value % 4096);
    if ((data[0] & 1) != 0) {
      device.read(offset, access);
    } else {
      device.write(offset, access, value);
    }
    data += 6;
    size -= 6;
  }
  return 0;
}
