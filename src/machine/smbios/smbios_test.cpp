#include "machine/smbios/smbios.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <numeric>
#include <set>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::smbios {
namespace {

using Bytes = std::vector<uint8_t>;
using layout::GiB, layout::KiB, layout::MiB;

struct Structure {
  Bytes fields;
  std::vector<std::string> strings;

  template <class T>
  T get(size_t at) const {
    T value{};
    EXPECT_LE(at + sizeof value, fields.size());
    if (at + sizeof value <= fields.size()) std::memcpy(&value, fields.data() + at, sizeof value);
    return value;
  }
  // The string that the field at `at` refers to.
  std::string text(size_t at) const {
    const auto number = get<uint8_t>(at);
    EXPECT_LE(number, strings.size());
    return number == 0 || number > strings.size() ? "" : strings[number - 1];
  }
};

std::vector<Structure> parse(const Bytes& bytes) {
  std::vector<Structure> all;
  size_t at = 0;
  while (at + 4 <= bytes.size()) {
    Structure s;
    const size_t length = bytes[at + 1];
    EXPECT_GE(length, 4u);
    EXPECT_LE(at + length + 2, bytes.size());
    s.fields.assign(bytes.begin() + static_cast<ptrdiff_t>(at),
                    bytes.begin() + static_cast<ptrdiff_t>(at + length));
    at += length;
    while (at < bytes.size() && bytes[at] != 0) {
      s.strings.emplace_back(reinterpret_cast<const char*>(bytes.data() + at));
      at += s.strings.back().size() + 1;
    }
    at += s.strings.empty() ? 2 : 1;
    all.push_back(s);
    if (s.fields[0] == 127) break;
  }
  EXPECT_EQ(at, bytes.size()) << "the end mark is the end";
  return all;
}

Structure find(const std::vector<Structure>& all, uint8_t type) {
  for (const Structure& s : all) {
    if (s.fields[0] == type) return s;
  }
  ADD_FAILURE() << "no type " << unsigned{type};
  return {};
}

std::vector<Structure> build(const Config& config, uint64_t memory) {
  const std::vector<RamRange> ranges =
      memory > 2 * GiB ? std::vector<RamRange>{{0, 2 * GiB, 0}, {4 * GiB, memory - 2 * GiB, 2 * GiB}}
                       : std::vector<RamRange>{{0, memory, 0}};
  return parse(structures(config, ranges));
}

uint8_t sum(const Bytes& bytes) {
  return static_cast<uint8_t>(std::accumulate(bytes.begin(), bytes.end(), 0u));
}

TEST(SmbiosTest, HasTheStructuresOfTheSpecification) {
  const auto all = build({}, 3 * GiB);
  std::vector<unsigned> types;
  std::set<uint16_t> handles;
  for (const Structure& s : all) {
    types.push_back(s.fields[0]);
    handles.insert(s.get<uint16_t>(2));
  }
  EXPECT_THAT(types, testing::ElementsAre(0, 1, 3, 4, 16, 17, 19, 19, 32, 127));
  EXPECT_EQ(handles.size(), all.size()) << "handles are unique";
  // Lengths that section 7 fixes for version 3.0.
  const std::map<uint8_t, size_t> lengths{{0, 0x18},  {1, 0x1b},  {3, 0x16},  {4, 0x30}, {16, 0x17},
                                          {17, 0x28}, {19, 0x1f}, {32, 0x0b}, {127, 4}};
  for (const auto& [type, length] : lengths)
    EXPECT_EQ(find(all, type).fields.size(), length) << unsigned{type};
}

TEST(SmbiosTest, NamesTheMachine) {
  const auto all = build({.cpu_name = "Some CPU", .serial = "S-1"}, MiB);
  const Structure bios = find(all, 0), system = find(all, 1), cpu = find(all, 4);
  EXPECT_EQ(bios.text(4), "Lodge");
  EXPECT_EQ(bios.get<uint8_t>(0x13) & 0x10, 0x10) << "says that it is a virtual machine";
  EXPECT_EQ(system.text(4), "Lodge");
  EXPECT_EQ(system.text(5), "PC");
  EXPECT_EQ(system.text(7), "S-1");
  EXPECT_EQ(cpu.text(0x10), "Some CPU");
}

TEST(SmbiosTest, WritesTheUuidsFirstGroupsLittleEndian) {
  Config config;
  std::iota(config.uuid.begin(), config.uuid.end(), uint8_t{0});  // 00010203-0405-0607-0809-0a0b0c0d0e0f
  const Structure system = find(build(config, MiB), 1);
  const Bytes uuid(system.fields.begin() + 8, system.fields.begin() + 24);
  EXPECT_THAT(uuid, testing::ElementsAre(3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15));
}

TEST(SmbiosTest, CountsProcessorsAsCoresOfOneSocket) {
  const Structure cpu = find(build({.cpus = 255}, MiB), 4);
  EXPECT_EQ(cpu.get<uint8_t>(0x23), 255);
  EXPECT_EQ(cpu.get<uint16_t>(0x2a), 255);
  EXPECT_EQ(cpu.get<uint16_t>(0x2e), 255);
}

TEST(SmbiosTest, ReportsMemoryOfEverySize) {
  auto device_mib = [](uint64_t memory) -> uint64_t {
    const Structure device = find(build({}, memory), 17);
    const auto size = device.get<uint16_t>(0x0c);
    return size == 0x7fff ? device.get<uint32_t>(0x1c) : size;
  };
  EXPECT_EQ(device_mib(512 * MiB), 512u);
  EXPECT_EQ(device_mib(0x7ffe * MiB), 0x7ffeu);
  EXPECT_EQ(device_mib(0x7fff * MiB), 0x7fffu);
  EXPECT_EQ(device_mib(64 * 1024 * GiB), 64u << 20);
  EXPECT_EQ(find(build({}, 512 * KiB), 17).get<uint16_t>(0x0c), 0x8000 | 512) << "in KiB";
  const Structure array = find(build({}, 3 * 1024 * GiB), 16);
  EXPECT_EQ(array.get<uint32_t>(7), 0x80000000u);
  EXPECT_EQ(array.get<uint64_t>(0x0f), 3 * 1024 * GiB);
}

TEST(SmbiosTest, MapsRamBelowAndAboveTheHole) {
  const auto all = build({}, 8192 * GiB);
  std::vector<Structure> maps;
  for (const Structure& s : all) {
    if (s.fields[0] == 19) maps.push_back(s);
  }
  ASSERT_EQ(maps.size(), 2u);
  EXPECT_EQ(maps[0].get<uint32_t>(4), 0u);
  EXPECT_EQ(maps[0].get<uint32_t>(8), 2 * GiB / KiB - 1);
  EXPECT_EQ(maps[1].get<uint32_t>(4), 0xffffffffu) << "too far for KiB in 32 bits";
  EXPECT_EQ(maps[1].get<uint64_t>(0x0f), 4 * GiB);
  EXPECT_EQ(maps[1].get<uint64_t>(0x17), 8194 * GiB - 1);
}

TEST(SmbiosTest, EntryPointsHaveGoodChecksumsAndLeadToTheStructures) {
  GuestMemory memory(4 * MiB);
  install({.cpus = 2}, memory);
  const auto read = [&](uint64_t gpa, size_t size) {
    Bytes bytes(size);
    EXPECT_TRUE(memory.read(gpa, bytes));
    return bytes;
  };
  const auto number = [](const Bytes& bytes, size_t at, size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, bytes.data() + at, size);
    return value;
  };
  const Bytes entry3 = read(layout::smbios_base, 24), entry2 = read(layout::smbios_base + 0x20, 31);
  EXPECT_EQ(std::string(entry3.begin(), entry3.begin() + 5), "_SM3_");
  EXPECT_EQ(sum(entry3), 0);
  EXPECT_EQ(std::string(entry2.begin(), entry2.begin() + 4), "_SM_");
  EXPECT_EQ(std::string(entry2.begin() + 16, entry2.begin() + 21), "_DMI_");
  EXPECT_EQ(sum(entry2), 0);
  EXPECT_EQ(sum(Bytes(entry2.begin() + 16, entry2.end())), 0);
  EXPECT_EQ(number(entry3, 16, 8), number(entry2, 24, 4));
  EXPECT_EQ(number(entry3, 12, 4), number(entry2, 22, 2));
  const auto all = parse(read(number(entry3, 16, 8), number(entry3, 12, 4)));
  EXPECT_EQ(all.size(), number(entry2, 28, 2));
  size_t longest = 0;
  for (const Structure& s : all) {
    size_t size = s.fields.size() + (s.strings.empty() ? 2 : 1);
    for (const std::string& text : s.strings) size += text.size() + 1;
    longest = std::max(longest, size);
  }
  EXPECT_EQ(number(entry2, 8, 2), longest);
}

TEST(SmbiosTest, RefusesWhatDoesNotFit) {
  GuestMemory small(512 * KiB), memory(2 * MiB);
  EXPECT_THROW(install({}, small), UsageError);
  EXPECT_THROW(install({.serial = std::string(70000, 'x')}, memory), UsageError);
}

}  // namespace
}  // namespace lodge::machine::smbios
