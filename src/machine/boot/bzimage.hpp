// The header of a Linux bzImage (Documentation/x86/boot.rst), read from an untrusted file.
#pragma once

#include <string>

#include "machine/boot/bytes.hpp"

namespace lodge::machine::boot {

struct BzImage {
  uint16_t version;            // boot protocol, 0x20f is 2.15
  Bytes setup_header;          // bytes 0x1f1 up to the end of the header: copied into boot_params
  Bytes protected_mode;        // what runs at `load_address`
  Bytes payload;               // the packed kernel inside it; empty when the header names none
  uint64_t load_address;       // where `protected_mode` goes
  uint64_t preferred_address;  // where the unpacked kernel goes
  uint64_t init_size;          // memory that the kernel needs from the higher of both addresses on
  uint64_t initrd_max;         // last byte that an initrd may use
  uint32_t command_line_size;  // longest command line, without its terminating zero
  bool has_64bit_entry;        // XLF_KERNEL_64: at load_address + 0x200
};

bool is_bzimage(Bytes file) noexcept;

// `name` ("--kernel vmlinuz") begins the messages. Throws UsageError when the file is truncated, contradicts
// itself or is older than boot protocol 2.06 (Linux 2.6.22, 2007).
BzImage parse_bzimage(Bytes file, const std::string& name);

}  // namespace lodge::machine::boot
