// A small read-only volume of a few files, for a guest to read settings from: ECMA-119 (ISO 9660) with one
// directory, and the files' real names by Rock Ridge (IEEE P1282 draft 1.10 in SUSP, IEEE P1281 draft 1.12),
// as ISO 9660's own know neither lower case nor '-'.
//
// Not made: Joliet, directories, boot records, dates (the same files give the same bytes).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lodge::guestfs {

struct VolumeFile {
  std::string name;  // 1 to 64 of the letters, digits, '-', '_' and '.'; their first 8 letters and digits
                     // differ between the files
  std::string contents;
};

// The volume's bytes, a multiple of 2048. `label`: 1 to 32 upper-case letters, digits and '_'. Files are
// root's and readable for all. At most 10 of them, 1 GiB together. Throws std::invalid_argument otherwise.
std::vector<uint8_t> make_iso9660(std::string_view label, std::vector<VolumeFile> files);

}  // namespace lodge::guestfs
