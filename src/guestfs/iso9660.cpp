#include "guestfs/iso9660.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <stdexcept>

namespace lodge::guestfs {
namespace {

constexpr size_t sector = 2048;
// The first 16 sectors are the system's (ECMA-119, 6.2.1).
constexpr uint32_t primary_descriptor = 16, terminator = 17, path_table_little = 18, path_table_big = 19,
                   root_directory = 20, first_file = 21;
constexpr size_t max_files = 10;  // their records fit into the directory's sector
constexpr size_t max_label = 32, max_name = 64;
constexpr uint64_t max_bytes = 1 << 30;
constexpr size_t path_table_size = 10;
constexpr uint8_t flag_directory = 2;
constexpr uint32_t mode_directory = 0040555, mode_file = 0100444;

// Appends the fields of the two standards; numbers that are there twice are little-endian first
// (7.2.3, 7.3.3).
class Bytes {
 public:
  size_t size() const { return bytes_.size(); }
  uint8_t& operator[](size_t at) { return bytes_[at]; }
  const std::vector<uint8_t>& get() const { return bytes_; }

  void put8(unsigned value) { bytes_.push_back(static_cast<uint8_t>(value)); }
  void put16(uint32_t value) { put_little(value, 2), put_big(value, 2); }
  void put32(uint32_t value) { put_little(value, 4), put_big(value, 4); }
  void put_little(uint32_t value, unsigned size) {
    for (unsigned i = 0; i < size; i++) put8(value >> (8 * i) & 0xff);
  }
  void put_big(uint32_t value, unsigned size) {
    for (unsigned i = size; i-- > 0;) put8(value >> (8 * i) & 0xff);
  }
  void put(std::string_view text) { bytes_.insert(bytes_.end(), text.begin(), text.end()); }
  void put(std::string_view text, size_t size) {
    put(text);
    fill(' ', size - text.size());
  }
  void fill(char value, size_t count) { bytes_.insert(bytes_.end(), count, static_cast<uint8_t>(value)); }
  // To the start of this sector, with zeros.
  void pad_to(uint32_t number) { bytes_.resize(number * sector); }

 private:
  std::vector<uint8_t> bytes_;
};

// 9.1.5: 1 January 1970. Zeros would be a month 0.
void put_date(Bytes& out) {
  for (const unsigned field : {70, 1, 1, 0, 0, 0, 0}) out.put8(field);
}

// RRIP 4.1.1, in the form of 36 bytes that all readers know: mode, links, owner, group.
void put_attributes(Bytes& out, uint32_t mode, uint32_t links) {
  out.put("PX");
  out.put8(36), out.put8(1);
  for (const uint32_t field : {mode, links, 0u, 0u}) out.put32(field);
}

// RRIP 4.1.4.
void put_name(Bytes& out, std::string_view name) {
  out.put("NM");
  out.put8(5 + static_cast<unsigned>(name.size()));
  out.put8(1), out.put8(0);
  out.put(name);
}

// What says that the system use fields follow SUSP (5.3), and which extension they have (5.5; RRIP 4.3). The
// texts for people, which would need an area of their own, are empty.
void put_extension(Bytes& out) {
  constexpr std::string_view id = "RRIP_1991A";
  out.put("SP");
  out.put8(7), out.put8(1), out.put8(0xbe), out.put8(0xef), out.put8(0);
  out.put("ER");
  out.put8(8 + static_cast<unsigned>(id.size()));
  out.put8(1), out.put8(static_cast<unsigned>(id.size())), out.put8(0), out.put8(0), out.put8(1);
  out.put(id);
}

// 9.1: a directory record, without the system use part that `system_use` has.
void put_record(Bytes& out, std::string_view identifier, uint32_t extent, uint64_t size, bool directory,
                const Bytes& system_use) {
  const size_t begin = out.size();
  out.put8(0);  // its length, later
  out.put8(0);
  out.put32(extent), out.put32(static_cast<uint32_t>(size));
  put_date(out);
  out.put8(directory ? flag_directory : 0);
  out.put8(0), out.put8(0);  // not interleaved
  out.put16(1);              // of the volume set
  out.put8(static_cast<unsigned>(identifier.size()));
  out.put(identifier);
  if ((out.size() - begin) % 2 != 0) out.put8(0);
  for (const uint8_t byte : system_use.get()) out.put8(byte);
  if ((out.size() - begin) % 2 != 0) out.put8(0);
  out[begin] = static_cast<uint8_t>(out.size() - begin);
}

constexpr std::string_view itself("\0", 1), parent("\1", 1);  // the identifiers of "." and ".." (6.8.2.2)

// 8.4. What is unspecified is spaces, dates zeros (8.4.26.1).
void put_primary_descriptor(Bytes& out, std::string_view label, uint32_t sectors) {
  out.put8(1), out.put("CD001"), out.put8(1), out.put8(0);
  out.put("", 32), out.put(label, 32);
  out.fill(0, 8), out.put32(sectors), out.fill(0, 32);
  out.put16(1), out.put16(1), out.put16(sector);
  out.put32(path_table_size);
  out.put_little(path_table_little, 4), out.put_little(0, 4);
  out.put_big(path_table_big, 4), out.put_big(0, 4);
  put_record(out, itself, root_directory, sector, true, {});
  out.put("", 4 * 128 +
                  3 * 37);  // volume set, publisher, preparer, application; copyright, abstract, bibliography
  for (unsigned date = 0; date < 4; date++) out.fill('0', 16), out.put8(0);
  out.put8(1), out.put8(0);
}

// 9.4: the root alone.
void put_path_table(Bytes& out, bool big) {
  const auto put = [&](uint32_t value, unsigned size) {
    big ? out.put_big(value, size) : out.put_little(value, size);
  };
  out.put8(1), out.put8(0);
  put(root_directory, 4), put(1, 2);
  out.put8(0), out.put8(0);
}

// 7.5: level 1, for readers without Rock Ridge: eight letters and digits.
std::string identifier_of(const std::string& name) {
  std::string identifier;
  for (const char c : name)
    if (std::isalnum(static_cast<unsigned char>(c)) && identifier.size() < 8)
      identifier += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return identifier + ".;1";
}

bool made_of(std::string_view text, size_t longest, std::string_view more, bool lower_case) {
  return !text.empty() && text.size() <= longest && std::ranges::all_of(text, [&](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || (lower_case && c >= 'a' && c <= 'z') ||
           more.find(c) != std::string_view::npos;
  });
}

void check(std::string_view label, const std::vector<VolumeFile>& files) {
  if (!made_of(label, max_label, "_", false)) throw std::invalid_argument("not a volume's label");
  if (files.size() > max_files) throw std::invalid_argument("too many files for a volume");
  uint64_t bytes = 0;
  for (const auto& file : files) {
    if (!made_of(file.name, max_name, "-_.", true)) throw std::invalid_argument("not a file's name");
    bytes += file.contents.size();
  }
  if (bytes > max_bytes) throw std::invalid_argument("the files are too large for a volume");
  const auto same = [](const VolumeFile& a, const VolumeFile& b) {
    return identifier_of(a.name) == identifier_of(b.name);
  };
  if (std::ranges::adjacent_find(files, same) != files.end())
    throw std::invalid_argument("two files of a volume have the same identifier");
}

uint32_t sectors_of(const VolumeFile& file) {
  return static_cast<uint32_t>((file.contents.size() + sector - 1) / sector);
}

void put_root(Bytes& out, const std::vector<VolumeFile>& files) {
  Bytes directory, self;
  put_attributes(directory, mode_directory, 2);
  put_extension(self);
  put_attributes(self, mode_directory, 2);
  put_record(out, itself, root_directory, sector, true, self);
  put_record(out, parent, root_directory, sector, true, directory);
  uint32_t extent = first_file;
  for (const auto& file : files) {
    Bytes system_use;
    put_attributes(system_use, mode_file, 1);
    put_name(system_use, file.name);
    put_record(out, identifier_of(file.name), extent, file.contents.size(), false, system_use);
    extent += sectors_of(file);
  }
}

}  // namespace

std::vector<uint8_t> make_iso9660(std::string_view label, std::vector<VolumeFile> files) {
  std::ranges::sort(files, {}, [](const VolumeFile& file) { return identifier_of(file.name); });  // 9.3
  check(label, files);
  uint32_t sectors = first_file;
  for (const auto& file : files) sectors += sectors_of(file);

  Bytes out;
  out.pad_to(primary_descriptor);
  put_primary_descriptor(out, label, sectors);
  out.pad_to(terminator);
  out.put8(255), out.put("CD001"), out.put8(1);
  out.pad_to(path_table_little);
  put_path_table(out, false);
  out.pad_to(path_table_big);
  put_path_table(out, true);
  out.pad_to(root_directory);
  put_root(out, files);
  uint32_t extent = first_file;
  for (const auto& file : files) {
    out.pad_to(extent);
    out.put(file.contents);
    extent += sectors_of(file);
  }
  out.pad_to(sectors);
  return out.get();
}

}  // namespace lodge::guestfs
