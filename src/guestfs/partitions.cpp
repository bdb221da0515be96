#include "guestfs/partitions.hpp"

#include <fmt/format.h>
#include <sys/random.h>
#include <zlib.h>

#include <algorithm>
#include <string_view>

#include "base/error.hpp"

namespace lodge::guestfs {
namespace {

using Bytes = std::span<const uint8_t>;

// MBR (UEFI 5.2): four entries of 16 bytes, then the signature.
constexpr uint64_t mbr_disk_signature = 440, mbr_entries = 446, mbr_entry_size = 16, mbr_signature = 510;
constexpr uint8_t mbr_type_protective = 0xee;

// GPT header (UEFI 5.3.2).
constexpr std::string_view gpt_signature = "EFI PART";
constexpr uint64_t header_size_at = 12, header_crc_at = 16, my_lba_at = 24, alternate_lba_at = 32,
                   first_usable_at = 40, last_usable_at = 48, disk_guid_at = 56, entries_lba_at = 72,
                   entry_count_at = 80, entry_size_at = 84, entries_crc_at = 88, header_size = 92;
// Entry (UEFI 5.3.3).
constexpr uint64_t entry_type_at = 0, entry_guid_at = 16, entry_first_at = 32, entry_last_at = 40,
                   entry_name_at = 56, entry_size = 128;
constexpr uint32_t our_entries = 128;
// Whatever a header claims: tables in use have 128 entries of 128 bytes.
constexpr uint32_t max_entries = 1024, max_entry_size = 512;

constexpr uint64_t alignment = 1 << 20;

// 0fc63daf-8483-4772-8e79-3d69d8477de4: Linux file system data.
constexpr Guid linux_data = {0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47,
                             0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4};

uint32_t checksum(Bytes bytes) {
  return static_cast<uint32_t>(::crc32(0, bytes.data(), static_cast<uInt>(bytes.size())));
}

template <class T>
void put(std::span<uint8_t> bytes, uint64_t offset, const T& value) {
  std::memcpy(bytes.subspan(offset, sizeof value).data(), &value, sizeof value);
}

template <class T>
T get(Bytes bytes, uint64_t offset) {
  return field<T>(bytes, offset).value_or(T{});
}

// Checks the header's own checksum and that it is where it says.
bool is_header(std::span<uint8_t> sector, uint64_t lba) {
  if (std::memcmp(sector.data(), gpt_signature.data(), gpt_signature.size()) != 0) return false;
  const auto size = get<uint32_t>(sector, header_size_at);
  if (size < header_size || size > sector_size || get<uint64_t>(sector, my_lba_at) != lba) return false;
  const auto expected = get<uint32_t>(sector, header_crc_at);
  put(sector, header_crc_at, uint32_t{0});  // it was computed so
  return checksum(sector.first(size)) == expected;
}

// The table whose header is in sector `lba`; nothing when that is none.
std::optional<std::vector<Partition>> read_gpt(const View& disk, uint64_t lba) {
  std::array<uint8_t, sector_size> header{};
  if (!disk.read(header, lba * sector_size) || !is_header(header, lba)) return std::nullopt;
  const auto count = get<uint32_t>(header, entry_count_at), size = get<uint32_t>(header, entry_size_at);
  const auto entries_lba = get<uint64_t>(header, entries_lba_at);
  const uint64_t sectors = disk.size() / sector_size;
  if (count > max_entries || size < entry_size || size > max_entry_size || entries_lba >= sectors)
    return std::nullopt;
  std::vector<uint8_t> entries(uint64_t{count} * size);
  if (!disk.read(entries, entries_lba * sector_size)) return std::nullopt;
  if (checksum(entries) != get<uint32_t>(header, entries_crc_at)) return std::nullopt;

  std::vector<Partition> partitions;
  for (uint32_t i = 0; i < count; i++) {
    const auto entry = Bytes(entries).subspan(uint64_t{i} * size, size);
    const auto first = get<uint64_t>(entry, entry_first_at), last = get<uint64_t>(entry, entry_last_at);
    if (get<Guid>(entry, entry_type_at) == Guid{} || first > last || last >= sectors) continue;
    partitions.push_back({i + 1, first * sector_size, (last - first + 1) * sector_size,
                          to_string(get<Guid>(entry, entry_guid_at))});
  }
  return partitions;
}

std::vector<Partition> read_mbr(const View& disk, Bytes mbr) {
  std::vector<Partition> partitions;
  const auto signature = get<uint32_t>(mbr, mbr_disk_signature);
  for (unsigned i = 0; i < 4; i++) {
    const auto entry = mbr.subspan(mbr_entries + i * mbr_entry_size, mbr_entry_size);
    const auto type = get<uint8_t>(entry, 4);
    const uint64_t begin = get<uint32_t>(entry, 8) * sector_size,
                   size = get<uint32_t>(entry, 12) * sector_size;
    if (type == 0 || begin == 0 || size == 0 || begin >= disk.size()) continue;
    partitions.push_back({i + 1, begin, size, fmt::format("{:08x}-{:02x}", signature, i + 1)});
  }
  return partitions;
}

// The header of a table whose entries lie at `entries_lba`.
std::array<uint8_t, sector_size> make_header(uint64_t sectors, const Guid& disk, bool backup,
                                             uint32_t entries_crc) {
  constexpr uint64_t entries_sectors = our_entries * entry_size / sector_size;
  std::array<uint8_t, sector_size> header{};
  std::ranges::copy(gpt_signature, header.begin());
  put(header, 8, uint32_t{0x00010000});
  put(header, header_size_at, uint32_t{header_size});
  put(header, my_lba_at, backup ? sectors - 1 : uint64_t{1});
  put(header, alternate_lba_at, backup ? uint64_t{1} : sectors - 1);
  put(header, first_usable_at, 2 + entries_sectors);
  put(header, last_usable_at, sectors - 2 - entries_sectors);
  put(header, disk_guid_at, disk);
  put(header, entries_lba_at, backup ? sectors - 1 - entries_sectors : uint64_t{2});
  put(header, entry_count_at, our_entries);
  put(header, entry_size_at, uint32_t{entry_size});
  put(header, entries_crc_at, entries_crc);
  put(header, header_crc_at, checksum(std::span(header).first(header_size)));
  return header;
}

// One partition over the whole disk, for programs that know no GPT.
std::array<uint8_t, sector_size> make_protective_mbr(uint64_t sectors) {
  std::array<uint8_t, sector_size> mbr{};
  const std::span entry = std::span(mbr).subspan(mbr_entries, mbr_entry_size);
  put(entry, 1, std::array<uint8_t, 3>{0x00, 0x02, 0x00});  // CHS of sector 1
  put(entry, 4, mbr_type_protective);
  put(entry, 5, std::array<uint8_t, 3>{0xff, 0xff, 0xff});
  put(entry, 8, uint32_t{1});
  put(entry, 12, static_cast<uint32_t>(std::min<uint64_t>(sectors - 1, UINT32_MAX)));
  put(mbr, mbr_signature, uint16_t{0xaa55});
  return mbr;
}

}  // namespace

std::string to_string(const Guid& guid) {
  std::string text;
  // Bytes in the order in which the text form shows them.
  for (const size_t i : {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15}) {
    if (i == 5 || i == 7 || i == 8 || i == 10) text += '-';
    text += fmt::format("{:02x}", guid[i]);
  }
  return text;
}

Guid random_guid() {
  Guid guid;
  if (::getrandom(guid.data(), guid.size(), 0) != static_cast<ssize_t>(guid.size())) throw_errno("getrandom");
  guid[7] = static_cast<uint8_t>((guid[7] & 0x0f) | 0x40);  // RFC 4122: version 4,
  guid[8] = static_cast<uint8_t>((guid[8] & 0x3f) | 0x80);  // variant 1
  return guid;
}

std::vector<Partition> read_partitions(const View& disk) {
  std::array<uint8_t, sector_size> mbr{};
  if (!disk.read(mbr, 0)) return {};
  if (const auto first = read_gpt(disk, 1)) return *first;
  if (const auto backup = read_gpt(disk, disk.size() / sector_size - 1)) return *backup;
  if (get<uint16_t>(mbr, mbr_signature) != 0xaa55) return {};
  return read_mbr(disk, mbr);
}

GptLayout make_gpt(uint64_t disk_size, const Guid& disk, const Guid& partition) {
  const uint64_t sectors = disk_size / sector_size, end = (disk_size / alignment - 1) * alignment;
  GptLayout layout{.partition = {1, alignment, end - alignment, to_string(partition)}};
  std::vector<uint8_t> entries(our_entries * entry_size);
  put(entries, entry_type_at, linux_data);
  put(entries, entry_guid_at, partition);
  put(entries, entry_first_at, layout.partition.begin / sector_size);
  put(entries, entry_last_at, end / sector_size - 1);
  uint64_t at = entry_name_at;
  for (const char16_t unit : std::u16string_view(u"root")) put(entries, at, unit), at += 2;
  const uint32_t crc = checksum(entries);

  const auto append = [](std::vector<uint8_t>& to, Bytes bytes) {
    to.insert(to.end(), bytes.begin(), bytes.end());
  };
  append(layout.start, make_protective_mbr(sectors));
  append(layout.start, make_header(sectors, disk, false, crc));
  append(layout.start, entries);
  append(layout.end, entries);
  append(layout.end, make_header(sectors, disk, true, crc));
  return layout;
}

}  // namespace lodge::guestfs
