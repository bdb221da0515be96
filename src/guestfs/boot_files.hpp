// Finds the kernel that an installed Linux boots, on its disk: what a boot loader does elsewhere.
//
// Looked at are the ext4 file systems of the partitions (GPT, primary partitions of an MBR), or of a disk
// without a table. In each: the links /vmlinuz and /boot/vmlinuz, then the newest of /boot/vmlinuz-* and, for
// a /boot partition, of /vmlinuz-*. The initial RAM disk lies beside the kernel and carries its version.
#pragma once

#include <string>
#include <vector>

#include "block/image.hpp"

namespace lodge::guestfs {

struct BootFiles {
  std::string kernel_path, initrd_path;  // in their file system; no initrd: empty
  std::vector<uint8_t> kernel, initrd;
  std::string root;         // for root=: "PARTUUID=..." or "/dev/vda"
  bool cloud_init = false;  // the system has it installed
};

// Throws UsageError, one sentence that begins with `name`, when there is no kernel, when it is out of bounds
// (`limit`: bytes of kernel and of initrd each, at most) or when the file system cannot be read.
BootFiles find_boot_files(block::Image& image, const std::string& name, uint64_t limit);

}  // namespace lodge::guestfs
