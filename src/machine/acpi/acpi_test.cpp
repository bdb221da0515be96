#include "machine/acpi/acpi.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <sstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::acpi {
namespace {

using Bytes = std::vector<uint8_t>;

template <class T>
T field(const Bytes& bytes, size_t at) {
  T value{};
  EXPECT_LE(at + sizeof value, bytes.size());
  if (at + sizeof value <= bytes.size()) std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

uint8_t sum(const Bytes& bytes, size_t size) {
  return static_cast<uint8_t>(
      std::accumulate(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size), 0u));
}

// Finds the tables as an operating system does: from the RSDP on, in guest memory.
class Tables {
 public:
  explicit Tables(const Config& config) : memory_(2 * layout::MiB) {
    const uint64_t gpa = install(config, memory_);
    rsdp = read(gpa, 36);
    xsdt = table(field<uint64_t>(rsdp, 24));
    rsdt = table(field<uint32_t>(rsdp, 16));
    for (size_t at = 36; at < xsdt.size(); at += 8) add(table(field<uint64_t>(xsdt, at)));
    add(table(field<uint64_t>(by_name.at("FACP"), 140)));
    const auto facs_gpa = field<uint32_t>(by_name.at("FACP"), 36);
    facs = read(facs_gpa, 64);
    EXPECT_EQ(facs_gpa % 64, 0u);
  }
  const Bytes& operator[](const std::string& name) const { return by_name.at(name); }

  Bytes rsdp, rsdt, xsdt, facs;
  std::map<std::string, Bytes> by_name;

 private:
  Bytes read(uint64_t gpa, size_t size) {
    Bytes bytes(size);
    EXPECT_TRUE(memory_.read(gpa, bytes));
    return bytes;
  }
  Bytes table(uint64_t gpa) { return read(gpa, field<uint32_t>(read(gpa, 36), 4)); }
  void add(Bytes bytes) {
    const std::string name(bytes.begin(), bytes.begin() + 4);
    by_name[name] = std::move(bytes);
  }
  GuestMemory memory_;
};

TEST(AcpiTest, EveryChecksumIsZero) {
  const Tables tables({.cpus = 3});
  EXPECT_EQ(sum(tables.rsdp, 20), 0) << "the part of ACPI 1.0";
  EXPECT_EQ(sum(tables.rsdp, 36), 0);
  EXPECT_EQ(sum(tables.rsdt, tables.rsdt.size()), 0);
  EXPECT_EQ(sum(tables.xsdt, tables.xsdt.size()), 0);
  for (const auto& [name, bytes] : tables.by_name) EXPECT_EQ(sum(bytes, bytes.size()), 0) << name;
}

TEST(AcpiTest, RootsListTheSameTables) {
  const Tables tables({});
  EXPECT_EQ(std::string(tables.rsdp.begin(), tables.rsdp.begin() + 8), "RSD PTR ");
  ASSERT_EQ((tables.rsdt.size() - 36) / 4, (tables.xsdt.size() - 36) / 8);
  for (size_t index = 0; index < (tables.rsdt.size() - 36) / 4; ++index) {
    EXPECT_EQ(field<uint32_t>(tables.rsdt, 36 + 4 * index), field<uint64_t>(tables.xsdt, 36 + 8 * index));
  }
  std::vector<std::string> names;
  for (const auto& [name, bytes] : tables.by_name) names.push_back(name);
  EXPECT_THAT(names, testing::ElementsAre("APIC", "DSDT", "FACP", "HPET", "MCFG", "WAET"));
}

TEST(AcpiTest, FadtDescribesThePowerManagementChip) {
  const Tables tables({.keyboard = true});
  const Bytes& fadt = tables["FACP"];
  ASSERT_EQ(fadt.size(), 276u) << "revision 6";
  EXPECT_EQ(field<uint16_t>(fadt, 46), layout::sci_irq);
  EXPECT_EQ(field<uint32_t>(fadt, 48), layout::smi_command_port);
  EXPECT_EQ(field<uint32_t>(fadt, 56), layout::acpi_pm_base);
  EXPECT_EQ(field<uint32_t>(fadt, 64), layout::acpi_pm_base + 4u);
  EXPECT_EQ(field<uint32_t>(fadt, 76), layout::acpi_pm_base + 8u);
  EXPECT_EQ(field<uint32_t>(fadt, 80), layout::acpi_pm_base + layout::acpi_gpe0_offset);
  EXPECT_EQ(field<uint8_t>(fadt, 92), layout::acpi_gpe0_size);
  EXPECT_EQ(field<uint8_t>(fadt, 108), layout::rtc_century);
  EXPECT_EQ(field<uint16_t>(fadt, 109) & 2, 2) << "i8042";
  EXPECT_EQ(field<uint32_t>(fadt, 112) & (1 << 4 | 1 << 20), 0u)
      << "a fixed power button, not hardware-reduced";
  EXPECT_EQ(field<uint32_t>(fadt, 112) & 1 << 6, 0u) << "the RTC's alarm is a fixed event";
  EXPECT_EQ(field<uint32_t>(fadt, 112) >> 10 & 1, 1u) << "reset register";
  EXPECT_EQ(field<uint64_t>(fadt, 120), layout::reset_port);
  EXPECT_EQ(field<uint8_t>(fadt, 128), layout::reset_value);
  EXPECT_EQ(field<uint32_t>(fadt, 40), field<uint64_t>(fadt, 140)) << "both name the DSDT";
  // The extended blocks say the same as the old ones, also in bits.
  for (const auto& [old_at, length_at, extended_at] :
       {std::tuple{56, 88, 148}, {64, 89, 172}, {76, 91, 208}, {80, 92, 220}}) {
    EXPECT_EQ(field<uint8_t>(fadt, static_cast<size_t>(extended_at)), 1) << "I/O space";
    EXPECT_EQ(field<uint8_t>(fadt, static_cast<size_t>(extended_at + 1)),
              8 * field<uint8_t>(fadt, static_cast<size_t>(length_at)));
    EXPECT_EQ(field<uint64_t>(fadt, static_cast<size_t>(extended_at + 4)),
              field<uint32_t>(fadt, static_cast<size_t>(old_at)));
  }
}

TEST(AcpiTest, WithoutKeyboardNobodyLooksForOne) {
  EXPECT_EQ(field<uint16_t>(Tables({})["FACP"], 109) & 2, 0);
}

TEST(AcpiTest, FacsIsWhole) {
  const Tables tables({});
  EXPECT_EQ(std::string(tables.facs.begin(), tables.facs.begin() + 4), "FACS");
  EXPECT_EQ(field<uint32_t>(tables.facs, 4), 64u);
  EXPECT_EQ(tables.facs[32], 2) << "version";
}

TEST(AcpiTest, MadtListsProcessorsAndInterruptOverrides) {
  const Tables tables({.cpus = 255});
  const Bytes& madt = tables["APIC"];
  EXPECT_EQ(field<uint32_t>(madt, 36), layout::lapic_base);
  unsigned processors = 0, ioapics = 0, nmis = 0;
  std::map<unsigned, std::pair<unsigned, unsigned>> overrides;
  for (size_t at = 44; at < madt.size(); at += madt[at + 1]) {
    ASSERT_GE(madt[at + 1], 2);
    switch (madt[at]) {
      case 0:
        EXPECT_EQ(madt[at + 2], processors) << "UID";
        EXPECT_EQ(madt[at + 3], processors) << "APIC ID";
        EXPECT_EQ(field<uint32_t>(madt, at + 4), 1u);
        ++processors;
        break;
      case 1:
        EXPECT_EQ(field<uint32_t>(madt, at + 4), layout::ioapic_base);
        ++ioapics;
        break;
      case 2: overrides[madt[at + 3]] = {field<uint32_t>(madt, at + 4), field<uint16_t>(madt, at + 8)}; break;
      case 4:
        EXPECT_EQ(madt[at + 5], 1) << "LINT1";
        ++nmis;
        break;
      default: ADD_FAILURE() << "unexpected entry " << unsigned{madt[at]};
    }
  }
  EXPECT_EQ(processors, 255u);
  EXPECT_EQ(ioapics, 1u);
  EXPECT_EQ(nmis, 1u);
  EXPECT_EQ(overrides.at(0), std::pair(2u, 0u));
  EXPECT_EQ(overrides.at(9), std::pair(9u, 0xdu)) << "level, active high";
}

TEST(AcpiTest, McfgCoversTheEcamWindow) {
  const Tables tables({});
  const Bytes& mcfg = tables["MCFG"];
  EXPECT_EQ(field<uint64_t>(mcfg, 44), layout::ecam_base);
  EXPECT_EQ((field<uint8_t>(mcfg, 55) + 1) * layout::MiB, layout::ecam_size);
}

Config micro() {
  Config config{.pc = false, .cpus = 2, .serial_ports = 1, .hpet = false, .rtc = false};
  config.virtio = {{layout::virtio_mmio_base, 16}, {layout::virtio_mmio_base + 0x1000, 17}};
  return config;
}

TEST(AcpiTest, AReducedMachineHasNoFixedHardware) {
  const Config config = micro();
  std::map<std::string, Bytes> by_name;
  for (const Table& table : build(config))
    by_name[std::string(table.bytes.begin(), table.bytes.begin() + 4)] = table.bytes;
  std::vector<std::string> names;
  for (const auto& [name, bytes] : by_name) {
    names.push_back(name);
    EXPECT_EQ(sum(bytes, name == "RSD " ? 36 : bytes.size()), 0) << name;
  }
  EXPECT_THAT(names, testing::ElementsAre("APIC", "DSDT", "FACP", "RSD ", "RSDT", "XSDT"));
  const Bytes& fadt = by_name.at("FACP");
  ASSERT_EQ(fadt.size(), 276u);
  EXPECT_TRUE(std::all_of(fadt.begin() + 46, fadt.begin() + 109, [](uint8_t byte) { return byte == 0; }));
  EXPECT_EQ(field<uint32_t>(fadt, 112) >> 20 & 1, 1u) << "hardware-reduced";
  EXPECT_EQ(field<uint32_t>(fadt, 112) >> 4 & 1, 1u) << "the power button is a device";
  EXPECT_EQ(field<uint16_t>(fadt, 109) & 0x20, 0x20) << "no real-time clock";
  EXPECT_EQ(field<uint64_t>(fadt, 120), layout::reduced_power_port + layout::reduced_power_reset);
  EXPECT_EQ(field<uint8_t>(fadt, 128), layout::reset_value);
  EXPECT_TRUE(std::all_of(fadt.begin() + 148, fadt.begin() + 244, [](uint8_t byte) { return byte == 0; }));
  EXPECT_EQ(field<uint64_t>(fadt, 248), layout::reduced_power_port) << "sleep control";
  EXPECT_EQ(field<uint64_t>(fadt, 260), layout::reduced_power_port + 1u) << "sleep status";
  const Bytes& madt = by_name.at("APIC");
  EXPECT_EQ(field<uint32_t>(madt, 40), 0u) << "no 8259";
}

TEST(AcpiTest, HpetIsOptional) {
  EXPECT_EQ(Tables({.hpet = false}).by_name.count("HPET"), 0u);
  EXPECT_EQ(field<uint64_t>(Tables({})["HPET"], 44), layout::hpet_base);
}

TEST(AcpiTest, WatchdogIsDescribedWhenThereIsOne) {
  EXPECT_EQ(Tables({}).by_name.count("WDAT"), 0u);
  const Tables tables({.watchdog = {0x580, 100, 0xffff}});
  const Bytes& wdat = tables["WDAT"];
  EXPECT_EQ(field<uint32_t>(wdat, 48), 100u);
  EXPECT_EQ(field<uint32_t>(wdat, 52), 0xffffu);
  const uint32_t entries = field<uint32_t>(wdat, 64);
  EXPECT_EQ(wdat.size(), 68 + 24 * entries);
  for (uint32_t i = 0; i < entries; i++) {
    const uint64_t port = field<uint64_t>(wdat, 68 + 24 * i + 8);
    EXPECT_TRUE(port >= 0x580 && port < 0x590 && port % 4 == 0) << port;
  }
}

TEST(AcpiTest, TablesStayInTheirArea) {
  uint64_t end = layout::acpi_base;
  for (const Table& table :
       build({.cpus = 255, .keyboard = true, .mouse = true, .fw_cfg = true, .pvpanic = true})) {
    EXPECT_GE(table.gpa, end);
    end = table.gpa + table.bytes.size();
  }
  EXPECT_LE(end, layout::acpi_base + layout::acpi_size);
}

TEST(AcpiTest, RefusesImpossibleConfigurations) {
  EXPECT_THROW(build({.cpus = 0}), UsageError);
  EXPECT_THROW(build({.cpus = 256}), UsageError);
  EXPECT_THROW(build({.serial_ports = 5}), UsageError);
  GuestMemory small(512 * layout::KiB);
  EXPECT_THROW(install({}, small), UsageError);
}

// --- the compiler and disassembler of the ACPI reference implementation
// ----------------------------------------------

class IaslTest : public testing::Test {
 protected:
  void SetUp() override {
    if (run("iasl -v") != 0) GTEST_SKIP() << "iasl is missing: install acpica-tools";
  }
  // Runs in the test's folder; output() is what it said.
  int run(const std::string& command) {
    const std::string where = "cd " + folder_.path() + " && ";
    std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen((where + command + " 2>&1").c_str(), "r"), ::pclose);
    output_.clear();
    for (int c = std::fgetc(pipe.get()); c != EOF; c = std::fgetc(pipe.get()))
      output_ += static_cast<char>(c);
    return ::pclose(pipe.release());
  }
  void write(const std::string& name, const Bytes& bytes) {
    std::ofstream(folder_ / name, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  std::string text(const std::string& name) {
    std::stringstream all;
    all << std::ifstream(folder_ / name).rdbuf();
    return all.str();
  }
  // Disassembles, compiles that again, compares, and gives the source.
  std::string there_and_back(const Bytes& dsdt) {
    write("dsdt.dat", dsdt);
    EXPECT_EQ(run("iasl -d dsdt.dat"), 0) << output_;
    EXPECT_THAT(output_, testing::Not(testing::ContainsRegex("[Ww]arning|[Ee]rror")));
    EXPECT_EQ(run("iasl -oa -p again dsdt.dsl"), 0) << output_;
    EXPECT_THAT(output_, testing::HasSubstr("0 Errors, 0 Warnings")) << output_;
    const std::string again = text("again.aml");
    // Behind the header, where iasl writes its own name; with -oa it keeps the paths as they are written.
    EXPECT_EQ(again.size(), dsdt.size());
    if (again.size() == dsdt.size()) {
      EXPECT_EQ(std::memcmp(again.data() + 36, dsdt.data() + 36, dsdt.size() - 36), 0);
    }
    return text("dsdt.dsl");
  }
  TemporaryDirectory folder_;
  std::string output_;
};

TEST_F(IaslTest, DsdtDisassemblesAndCompilesBackToTheSameCode) {
  const Tables tables({.cpus = 4, .keyboard = true, .mouse = true, .fw_cfg = true, .pvpanic = true});
  const std::string source = there_and_back(tables["DSDT"]);
  for (const char* expected :
       {"Device (C003)", "EisaId (\"PNP0A08\")", "EisaId (\"PNP0501\")", "Name (\\_S5", "Method (_OSC, 4",
        "EisaId (\"PNP0B00\")", "EisaId (\"PNP0303\")", "EisaId (\"PNP0C02\")", "\"QEMU0002\"",
        "\"QEMU0001\"", "ToUUID (\"33db4d5b-1ff7-401c-9657-7441c03dd766\")", "0xB0000000"}) {
    EXPECT_NE(source.find(expected), std::string::npos) << expected;
  }
}

TEST_F(IaslTest, TheDsdtOfAReducedMachineToo) {
  for (const Table& table : build(micro())) {
    if (std::memcmp(table.bytes.data(), "DSDT", 4) != 0) continue;
    const std::string source = there_and_back(table.bytes);
    for (const char* expected :
         {"\"ACPI0013\"", "EisaId (\"PNP0C0C\")", "Method (_EVT, 1", "Notify (PWRB, 0x80)", "\"LNRO0005\"",
          "Interrupt (ResourceConsumer, Level, ActiveHigh, Shared", "0xD0001000",
          "OperationRegion (PWRR, SystemIO, 0x0600, 0x04)", "Offset (0x03)"}) {
      EXPECT_NE(source.find(expected), std::string::npos) << expected << " in\n" << source;
    }
    EXPECT_EQ(source.find("PNP0A08"), std::string::npos) << "no PCI";
  }
}

TEST_F(IaslTest, DataTablesDisassembleWithoutComplaint) {
  const Tables tables({.cpus = 2, .watchdog = {0x580, 100, 0xffff}});
  for (const auto& [name, bytes] : tables.by_name) {
    if (name == "DSDT") continue;
    write(name + ".dat", bytes);
    ASSERT_EQ(run("iasl -d " + name + ".dat"), 0) << output_;
    EXPECT_THAT(output_ + text(name + ".dsl"),
                testing::Not(testing::ContainsRegex("\\*\\*\\*|[Ii]nvalid|[Ee]rror|[Ww]arning|Incorrect")))
        << name;
  }
}

}  // namespace
}  // namespace lodge::machine::acpi
