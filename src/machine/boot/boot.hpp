// Loads a kernel into guest memory and says how to enter it.
//
//   const boot::BootState state = boot::load({.kernel = "vmlinuz", .append = "console=ttyS0"}, memory);
//   state.apply(*boot_vcpu);
//
// Recognized, in this order:
//   * Linux bzImage (boot protocol 2.06 on). The payload is unpacked here and its 64-bit or 32-bit kernel
//   entered
//     directly; what cannot be unpacked is entered at the image's own 64-bit or 32-bit entry and unpacks
//     itself.
//   * multiboot 1, ELF or with address fields: 32-bit protected mode, EAX = 0x2badb002, EBX = information.
//   * ELF with a PVH note (vmlinux): 32-bit protected mode, EBX = hvm_start_info.
//   * any other static ELF64: long mode with the first 4 GiB mapped one to one, RSI = a Linux boot_params
//   page, no
//     stack (RSP = 0). Other static ELF32: flat protected mode, ESI = boot_params.
// Any of them may be a gzip file (xen.gz).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine/boot/bytes.hpp"
#include "machine/boot/entry.hpp"
#include "machine/memory.hpp"

namespace lodge::machine::boot {

struct Request {
  std::string kernel;  // path
  std::vector<std::string>
      initrds;             // Linux and PVH: joined to one initramfs; multiboot: modules, "path arguments"
  Bytes initrd{};          // one that is in memory already, before those files
  std::string append;      // command line
  uint64_t acpi_rsdp = 0;  // guest-physical; 0: no ACPI tables
};

// Throws UsageError, one line that names the option and the remedy, for everything a file or a size can be
// wrong about; std::system_error when the host refuses memory. May be called again (machine reset) on the
// same memory.
BootState load(const Request& request, GuestMemory& memory);

// The same for a kernel that is already in memory (tests, fuzzing); request.kernel is only its name in
// messages.
BootState load_bytes(Bytes kernel, const Request& request, GuestMemory& memory);

}  // namespace lodge::machine::boot
