// Reads the setup header. Document: Linux Documentation/x86/boot.rst, "The Real-Mode Kernel Header". The
// real-mode part of the kernel is never run: Lodge enters in protected or long mode.
#include "machine/boot/bzimage.hpp"

#include <cstring>

#include "base/error.hpp"

namespace lodge::machine::boot {

namespace {

constexpr uint64_t setup_sects_at = 0x1f1, syssize_at = 0x1f4, boot_flag_at = 0x1fe, jump_at = 0x201,
                   magic_at = 0x202, version_at = 0x206, loadflags_at = 0x211, code32_start_at = 0x214,
                   initrd_max_at = 0x22c, relocatable_at = 0x234, xloadflags_at = 0x236,
                   cmdline_size_at = 0x238, payload_offset_at = 0x248, payload_length_at = 0x24c,
                   pref_address_at = 0x258, init_size_at = 0x260;
constexpr uint64_t sector = 512;
constexpr uint64_t header_max =
    0x290;  // boot_params has the E820 map from 0x2d0, the EDD signatures from 0x290 on
constexpr uint8_t loaded_high = 1;
constexpr uint16_t xlf_kernel_64 = 1;
constexpr uint64_t address_limit = 1ull << 32;

}  // namespace

bool is_bzimage(Bytes file) noexcept {
  const auto flag = get<uint16_t>(file, boot_flag_at);
  const auto magic = slice(file, magic_at, 4);
  return flag == 0xaa55 && magic && std::memcmp(magic->data(), "HdrS", 4) == 0;
}

BzImage parse_bzimage(Bytes file, const std::string& name) {
  if (!is_bzimage(file)) usage_error("{}: not a Linux bzImage", name);
  if (file.size() < header_max) usage_error("{}: the file is truncated (no complete setup header)", name);
  const auto field = [&]<class T>(uint64_t at, T) { return get<T>(file, at).value_or(0); };

  BzImage image{.version = field(version_at, uint16_t{})};
  if (image.version < 0x206) {
    usage_error("{}: boot protocol {}.{:02} is too old, Lodge needs 2.06 (Linux 2.6.22) or newer", name,
                image.version >> 8, image.version & 0xff);
  }
  if ((field(loadflags_at, uint8_t{}) & loaded_high) == 0) {
    usage_error("{}: a zImage (loaded below 1 MiB) is not supported, give a bzImage", name);
  }
  const uint64_t header_end = magic_at + field(jump_at, uint8_t{});
  if (header_end > header_max || header_end < cmdline_size_at + 4) {
    usage_error("{}: the setup header has an impossible size", name);
  }
  image.setup_header = file.subspan(setup_sects_at, header_end - setup_sects_at);

  const uint8_t sectors = field(setup_sects_at, uint8_t{});
  const uint64_t setup_size = (uint64_t{sectors == 0 ? uint8_t{4} : sectors} + 1) * sector;
  const uint64_t promised = uint64_t{field(syssize_at, uint32_t{})} * 16;  // rounded up to paragraphs
  if (setup_size >= file.size() || file.size() - setup_size + 15 < promised) {
    usage_error("{}: the file is truncated ({} bytes, its header promises {})", name, file.size(),
                setup_size + promised);
  }
  image.protected_mode = file.subspan(setup_size);

  const auto has = [&](uint16_t version, uint64_t end) {
    return image.version >= version && header_end >= end;
  };
  image.command_line_size = field(cmdline_size_at, uint32_t{});
  image.initrd_max = field(initrd_max_at, uint32_t{});
  image.load_address = field(code32_start_at, uint32_t{});
  image.preferred_address = image.load_address;
  image.init_size = image.protected_mode.size();
  if (has(0x208, payload_length_at + 4)) {
    const auto payload = slice(image.protected_mode, field(payload_offset_at, uint32_t{}),
                               field(payload_length_at, uint32_t{}));
    if (!payload) usage_error("{}: the packed kernel lies outside the file", name);
    image.payload = *payload;
  }
  if (has(0x20a, init_size_at + 4)) {
    image.preferred_address = field(pref_address_at, uint64_t{});
    image.init_size = std::max<uint64_t>(image.init_size, field(init_size_at, uint32_t{}));
    // Where it wants to be is where it needs the least work; only relocatable kernels may be put there.
    if (field(relocatable_at, uint8_t{}) != 0) image.load_address = image.preferred_address;
  }
  if (image.preferred_address >= address_limit || image.load_address < 0x10000) {
    usage_error("{}: the setup header has an impossible load address", name);
  }
  image.has_64bit_entry =
      has(0x20c, xloadflags_at + 2) && (field(xloadflags_at, uint16_t{}) & xlf_kernel_64) != 0;
  if (image.has_64bit_entry && image.protected_mode.size() <= 0x200) {
    usage_error("{}: the file is truncated (no 64-bit entry)", name);
  }
  return image;
}

}  // namespace lodge::machine::boot
