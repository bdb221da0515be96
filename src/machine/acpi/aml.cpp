#include "machine/acpi/aml.hpp"

#include <array>
#include <cstdlib>
#include <string>

namespace lodge::machine::acpi::aml {

namespace {

// Opcodes, by the names of section 20.3.
constexpr uint8_t zero_op = 0x00, one_op = 0x01, name_op = 0x08, byte_prefix = 0x0a, word_prefix = 0x0b,
                  dword_prefix = 0x0c, string_prefix = 0x0d, qword_prefix = 0x0e, scope_op = 0x10,
                  buffer_op = 0x11, package_op = 0x12, method_op = 0x14, dual_name_prefix = 0x2e,
                  multi_name_prefix = 0x2f, ext_prefix = 0x5b, local0_op = 0x60, arg0_op = 0x68,
                  store_op = 0x70, and_op = 0x7b, or_op = 0x7d, create_dword_field_op = 0x8a, lnot_op = 0x92,
                  notify_op = 0x86, ext_region_op = 0x80, ext_field_op = 0x81, lequal_op = 0x93, if_op = 0xa0,
                  else_op = 0xa1, return_op = 0xa4, ext_device_op = 0x82;

void append(Code& code, const Code& more) {
  code.insert(code.end(), more.begin(), more.end());
}

void little_endian(Code& code, uint64_t value, unsigned bytes) {
  for (unsigned index = 0; index < bytes; ++index) code.push_back(static_cast<uint8_t>(value >> (8 * index)));
}

// PkgLength counts itself: one byte holds up to 63, otherwise the first byte has four bits and the number of
// the bytes that follow.
Code with_length(const Code& body) {
  const size_t size = body.size();
  Code code;
  if (size + 1 < 64) {
    code.push_back(static_cast<uint8_t>(size + 1));
  } else {
    const unsigned more = size + 2 < (1u << 12) ? 1 : size + 3 < (1u << 20) ? 2 : 3;
    const size_t length = size + 1 + more;
    code.push_back(static_cast<uint8_t>(more << 6 | (length & 0xf)));
    little_endian(code, length >> 4, more);
  }
  append(code, body);
  return code;
}

Code term(std::initializer_list<uint8_t> opcode, const Code& body) {
  Code code(opcode);
  append(code, body);
  return code;
}

Code segment(std::string_view text) {
  Code code(4, '_');
  for (size_t index = 0; index < text.size() && index < 4; ++index)
    code[index] = static_cast<uint8_t>(text[index]);
  return code;
}

// Address space descriptors (6.4.3.5): the word, double word and quad word forms differ only in the field
// width.
Code address_space(uint8_t tag, uint8_t type, uint8_t type_flags, unsigned width, uint64_t first,
                   uint64_t last) {
  constexpr uint8_t producer_fixed_positive =
      0x0c;  // both ends fixed, positive decode, the bridge produces it
  Code body{type, producer_fixed_positive, type_flags};
  little_endian(body, 0, width);  // granularity
  little_endian(body, first, width);
  little_endian(body, last, width);
  little_endian(body, 0, width);  // no translation
  little_endian(body, last - first + 1, width);
  Code code{tag};
  little_endian(code, body.size(), 2);
  append(code, body);
  return code;
}

constexpr uint8_t word_space = 0x88, dword_space = 0x87, qword_space = 0x8a;
constexpr uint8_t memory_range = 0, io_range = 1, bus_range = 2;
constexpr uint8_t entire_range = 3;  // ISA and non-ISA ports
constexpr uint8_t read_write = 1;

}  // namespace

Code join(std::initializer_list<Code> parts) {
  Code code;
  for (const Code& part : parts) append(code, part);
  return code;
}

Code join(const std::vector<Code>& parts) {
  Code code;
  for (const Code& part : parts) append(code, part);
  return code;
}

Code integer(uint64_t value) {
  if (value == 0) return {zero_op};
  if (value == 1) return {one_op};
  const unsigned bytes = value <= 0xff ? 1 : value <= 0xffff ? 2 : value <= 0xffff'ffff ? 4 : 8;
  Code code{bytes == 1 ? byte_prefix : bytes == 2 ? word_prefix : bytes == 4 ? dword_prefix : qword_prefix};
  little_endian(code, value, bytes);
  return code;
}

Code string(std::string_view text) {
  return join({{string_prefix}, Code(text.begin(), text.end()), {0}});
}

Code buffer(const Code& bytes) {
  return term({buffer_op}, with_length(join({integer(bytes.size()), bytes})));
}

Code package(const std::vector<Code>& elements) {
  return term({package_op}, with_length(join({{static_cast<uint8_t>(elements.size())}, join(elements)})));
}

// Three letters of five bits each, then four hexadecimal digits, in big-endian order.
Code eisa_id(std::string_view id) {
  uint32_t value = 0;
  for (unsigned index = 0; index < 3; ++index) value = value << 5 | (static_cast<uint32_t>(id[index]) - '@');
  value =
      value << 16 | static_cast<uint32_t>(std::strtoul(std::string(id.substr(3, 4)).c_str(), nullptr, 16));
  return integer(__builtin_bswap32(value));
}

Code uuid(std::string_view text) {
  // The first three groups are little-endian, the last two are bytes in order: the position of each byte's
  // digits.
  constexpr std::array<unsigned, 16> order{6, 4, 2, 0, 11, 9, 16, 14, 19, 21, 24, 26, 28, 30, 32, 34};
  Code bytes;
  for (const unsigned at : order) {
    bytes.push_back(static_cast<uint8_t>(std::strtoul(std::string(text.substr(at, 2)).c_str(), nullptr, 16)));
  }
  return buffer(bytes);
}

Code path(std::string_view path) {
  Code code;
  if (path.starts_with('\\')) {
    code.push_back('\\');
    path.remove_prefix(1);
  }
  std::vector<Code> segments;
  while (!path.empty()) {
    const size_t dot = path.find('.');
    segments.push_back(segment(path.substr(0, dot)));
    path = dot == std::string_view::npos ? std::string_view{} : path.substr(dot + 1);
  }
  if (segments.empty()) code.push_back(0);  // NullName: the root itself
  if (segments.size() == 2) code.push_back(dual_name_prefix);
  if (segments.size() > 2) append(code, {multi_name_prefix, static_cast<uint8_t>(segments.size())});
  append(code, join(segments));
  return code;
}

Code name(std::string_view object, const Code& value) {
  return term({name_op}, join({path(object), value}));
}

Code scope(std::string_view object, const std::vector<Code>& terms) {
  return term({scope_op}, with_length(join({path(object), join(terms)})));
}

Code device(std::string_view object, const std::vector<Code>& terms) {
  return term({ext_prefix, ext_device_op}, with_length(join({path(object), join(terms)})));
}

Code method(std::string_view object, unsigned arguments, const std::vector<Code>& terms) {
  return term({method_op},
              with_length(join({path(object), {static_cast<uint8_t>(arguments & 7)}, join(terms)})));
}

Code operation_region(std::string_view region, uint16_t port, uint8_t count) {
  constexpr uint8_t system_io = 1;
  return term({ext_prefix, ext_region_op}, join({path(region), {system_io}, integer(port), integer(count)}));
}

Code byte_field(std::string_view region, const std::vector<NamedByte>& fields) {
  constexpr uint8_t byte_access_preserve = 1, reserved = 0, byte_bits = 8;
  Code list;
  unsigned at = 0;
  for (const NamedByte& field : fields) {
    // A length in bits; below 64 it is one byte, which is all that a few ports need.
    if (field.offset > at) append(list, {reserved, static_cast<uint8_t>((field.offset - at) * byte_bits)});
    append(list, segment(field.name));
    list.push_back(byte_bits);
    at = field.offset + 1;
  }
  return term({ext_prefix, ext_field_op}, with_length(join({path(region), {byte_access_preserve}, list})));
}

Code arg(unsigned index) {
  return {static_cast<uint8_t>(arg0_op + index)};
}
Code local(unsigned index) {
  return {static_cast<uint8_t>(local0_op + index)};
}
Code store(const Code& value, const Code& target) {
  return term({store_op}, join({value, target}));
}
Code and_(const Code& a, const Code& b, const Code& target) {
  return term({and_op}, join({a, b, target}));
}
Code or_(const Code& a, const Code& b, const Code& target) {
  return term({or_op}, join({a, b, target}));
}
Code equal(const Code& a, const Code& b) {
  return term({lequal_op}, join({a, b}));
}
Code not_(const Code& a) {
  return term({lnot_op}, a);
}

Code notify(std::string_view object, uint64_t value) {
  return term({notify_op}, join({path(object), integer(value)}));
}

Code if_(const Code& condition, const std::vector<Code>& terms) {
  return term({if_op}, with_length(join({condition, join(terms)})));
}

Code else_(const std::vector<Code>& terms) {
  return term({else_op}, with_length(join(terms)));
}
Code return_(const Code& value) {
  return term({return_op}, value);
}

Code dword_field(const Code& buffer, const Code& byte_index, std::string_view field) {
  return term({create_dword_field_op}, join({buffer, byte_index, path(field)}));
}

Code resources(const std::vector<Code>& descriptors) {
  constexpr uint8_t end_tag = 0x79, no_checksum = 0;
  return buffer(join({join(descriptors), {end_tag, no_checksum}}));
}

Code io_ports(uint16_t base, uint8_t count) {
  Code code{0x47, 1};
  little_endian(code, base, 2);
  little_endian(code, base, 2);
  append(code, {1, count});  // alignment
  return code;
}

Code irq(unsigned line) {
  Code code{0x22};  // without flags: edge, active high, exclusive
  little_endian(code, 1u << line, 2);
  return code;
}

Code gsi_level(uint32_t gsi) {
  constexpr uint8_t consumer_level_high_shared = 0x09, one_interrupt = 1;
  Code code{0x89, 6, 0, consumer_level_high_shared, one_interrupt};
  little_endian(code, gsi, 4);
  return code;
}

Code memory32(uint32_t base, uint32_t size) {
  Code code{0x86, 9, 0, read_write};
  little_endian(code, base, 4);
  little_endian(code, size, 4);
  return code;
}

Code bus_numbers(uint16_t first, uint16_t last) {
  return address_space(word_space, bus_range, 0, 2, first, last);
}

Code io_window(uint16_t first, uint16_t last) {
  return address_space(word_space, io_range, entire_range, 2, first, last);
}

Code memory_window32(uint32_t first, uint32_t last) {
  return address_space(dword_space, memory_range, read_write, 4, first, last);
}

Code memory_window64(uint64_t first, uint64_t last) {
  return address_space(qword_space, memory_range, read_write, 8, first, last);
}

}  // namespace lodge::machine::acpi::aml
