// A small builder of AML, ACPI's byte code: each function gives the encoding of one term, and terms nest by
// nesting calls. ACPI Specification 6.4, chapter 20 (AML grammar) and section 6.4 (resource descriptors).
//
//   device("COM1", {name("_HID", eisa_id("PNP0501")),
//                   name("_CRS", resources({io_ports(0x3f8, 8), irq(4)}))})
//
// Only for tables that Lodge writes itself: names and sizes are not checked against hostile input.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace lodge::machine::acpi::aml {

using Code = std::vector<uint8_t>;

Code join(std::initializer_list<Code> parts);
Code join(const std::vector<Code>& parts);

// Data objects.
Code integer(uint64_t value);  // the shortest encoding
Code string(std::string_view text);
Code buffer(const Code& bytes);
Code package(const std::vector<Code>& elements);  // at most 255 elements
Code eisa_id(std::string_view id);                // "PNP0501", packed as EISA defines
Code uuid(std::string_view text);                 // a buffer with the mixed byte order of ToUUID()

// Named objects. Paths: "\\_SB.PCI0", "COM1"; segments are padded to four characters.
Code path(std::string_view path);
Code name(std::string_view path, const Code& value);
Code scope(std::string_view path, const std::vector<Code>& terms);
Code device(std::string_view path, const std::vector<Code>& terms);
Code method(std::string_view path, unsigned arguments, const std::vector<Code>& terms);

// Ports that fields give names to, byte by byte: operation_region("PWR0", 0x600, 4) and
// byte_field("PWR0", {{"EVST", 3}}): EVST is the byte at offset 3.
Code operation_region(std::string_view path, uint16_t port, uint8_t count);
struct NamedByte {
  std::string_view name;
  unsigned offset;  // ascending
};
Code byte_field(std::string_view region, const std::vector<NamedByte>& fields);

// Statements and expressions inside methods.
Code arg(unsigned index);
Code local(unsigned index);
Code store(const Code& value, const Code& target);
Code and_(const Code& a, const Code& b, const Code& target);
Code or_(const Code& a, const Code& b, const Code& target);
Code equal(const Code& a, const Code& b);
Code not_(const Code& a);
Code if_(const Code& condition, const std::vector<Code>& terms);
Code else_(const std::vector<Code>& terms);
Code return_(const Code& value);
Code notify(std::string_view object, uint64_t value);
Code dword_field(const Code& buffer, const Code& byte_index, std::string_view field);

// Resource descriptors and the template that holds them.
Code resources(const std::vector<Code>& descriptors);
Code io_ports(uint16_t base, uint8_t count);  // 16-bit decode, fixed
Code irq(unsigned line);                      // ISA: edge, active high, exclusive
Code gsi_level(uint32_t gsi);                 // IOAPIC input: level, active high, shared
Code memory32(uint32_t base, uint32_t size);  // fixed, read and write
// Windows that a bridge passes on.
Code bus_numbers(uint16_t first, uint16_t last);
Code io_window(uint16_t first, uint16_t last);
Code memory_window32(uint32_t first, uint32_t last);
Code memory_window64(uint64_t first, uint64_t last);

}  // namespace lodge::machine::acpi::aml
