// Files of other programs' formats, by the marks that their descriptions give.
#include "block/probe.hpp"

#include <string_view>

#include "base/error.hpp"
#include "block/storage.hpp"

namespace lodge::block {
namespace {

using namespace std::string_view_literals;

// LUKS1 and LUKS2 alike (LUKS On-Disk Format Specification, "phdr" and "Binary header"; big-endian version
// next).
constexpr auto luks_magic = "LUKS\xba\xbe"sv;

struct Mark {
  uint64_t offset;
  std::string_view bytes;
  const char* format;  // as people call it
  const char* driver;  // as qemu-img calls it
};
constexpr std::array marks{
    Mark{0x40, "\x7f\x10\xda\xbe"sv, "VDI", "vdi"},
    Mark{0, "KDMV"sv, "VMDK", "vmdk"},
    Mark{0, "COWD"sv, "VMDK", "vmdk"},
    Mark{0, "# Disk DescriptorFile"sv, "VMDK", "vmdk"},
    Mark{0, "vhdxfile"sv, "VHDX", "vhdx"},
    Mark{0, "conectix"sv, "VHD", "vpc"},
    Mark{0, "QED\0"sv, "QED", "qed"},
    Mark{0, "WithoutFreeSpace"sv, "Parallels", "parallels"},
    Mark{0, "WithouFreSpacExt"sv, "Parallels", "parallels"},
};
// A VHD of fixed size is the disk itself with this behind it.
constexpr uint64_t vhd_footer = 512;
constexpr Mark fixed_vhd{0, "conectix"sv, "VHD", "vpc"};

template <class Bytes>
bool has(const Bytes& data, uint64_t offset, std::string_view mark) {
  return offset + mark.size() <= data.size() &&
         std::equal(mark.begin(), mark.end(), data.begin() + static_cast<ptrdiff_t>(offset),
                    [](char a, uint8_t b) { return static_cast<uint8_t>(a) == b; });
}

[[noreturn]] void refuse(const Mark& mark, const std::string& path) {
  usage_error(
      "{}: is a {} image, which Lodge does not read; 'qemu-img convert -f {} -O qcow2' makes a copy that it "
      "reads, or, if the guest itself is to see these bytes, say that its format is raw",
      path, mark.format, mark.driver);
}

}  // namespace

void refuse_foreign(Storage& storage) {
  std::array<uint8_t, 0x48> start{};
  if (const int error = storage.read(start.data(), start.size(), 0)) throw_errno(error, storage.path());
  if (has(start, 0, luks_magic))
    usage_error(
        "{}: is encrypted (LUKS), which Lodge cannot read; decrypt it with 'qemu-img convert' "
        "(docs/images.md), or, if the guest itself decrypts it, say that its format is raw",
        storage.path());
  for (const Mark& mark : marks)
    if (has(start, mark.offset, mark.bytes)) refuse(mark, storage.path());
  if (storage.size() < vhd_footer) return;
  std::array<uint8_t, fixed_vhd.bytes.size()> end{};
  if (const int error = storage.read(end.data(), end.size(), storage.size() - vhd_footer))
    throw_errno(error, storage.path());
  if (has(end, 0, fixed_vhd.bytes)) refuse(fixed_vhd, storage.path());
}

}  // namespace lodge::block
