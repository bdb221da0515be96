// A small LZ77 compressor (greedy matches found through a table of 4-byte hashes) and its decompressor, over
// 256 KiB of made-up text: byte loads, hash look-ups, branches that depend on data, copies of a few bytes.
//
// Format: a byte n < 128 and n + 1 literal bytes; or 128 + length - 4 (length 4 to 131) and a 16-bit
// distance.
#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <vector>

#include "program.hpp"

namespace {

constexpr size_t text_bytes = 256 << 10, hash_bits = 13, shortest = 4, longest = 131, literals = 128;
constexpr size_t farthest = 65535;
using Bytes = std::vector<uint8_t>;

Bytes make_text() {
  constexpr std::array<std::string_view, 16> words = {
      "the ",    "machine ", "of ",   "a ",     "guest ",  "page ", "memory ", "register",
      "table, ", "and ",     "then ", "reads ", "writes ", "is\n",  "not ",    "processor "};
  compare::Random random;
  Bytes text;
  while (text.size() < text_bytes) {
    if (random.below(8) == 0) {
      for (int digit = 0; digit < 6; digit++) text.push_back(static_cast<uint8_t>('0' + random.below(10)));
    } else {
      const auto word = words[random.below(words.size())];
      text.insert(text.end(), word.begin(), word.end());
    }
  }
  text.resize(text_bytes);
  return text;
}

uint32_t four(const uint8_t* at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}
size_t hash(uint32_t word) {
  return word * 2654435761u >> (32 - hash_bits);
}

class Writer {
 public:
  explicit Writer(Bytes& out) : out_(out) {}
  void literal(const uint8_t* from, const uint8_t* to) {
    while (from < to) {
      const size_t run = std::min(static_cast<size_t>(to - from), literals);
      out_.push_back(static_cast<uint8_t>(run - 1));
      out_.insert(out_.end(), from, from + run);
      from += run;
    }
  }
  void match(size_t length, size_t distance) {
    out_.push_back(static_cast<uint8_t>(128 + length - shortest));
    out_.push_back(static_cast<uint8_t>(distance));
    out_.push_back(static_cast<uint8_t>(distance >> 8));
  }

 private:
  Bytes& out_;
};

void pack(const Bytes& in, Bytes& out) {
  std::array<uint32_t, 1 << hash_bits> last{};  // position + 1 of the last four bytes with that hash
  out.clear();
  Writer writer(out);
  const uint8_t *begin = in.data(), *end = begin + in.size(), *pending = begin, *at = begin;
  while (at + shortest <= end) {
    uint32_t& entry = last[hash(four(at))];
    const uint8_t* candidate = begin + entry - 1;
    const bool known = entry != 0;
    entry = static_cast<uint32_t>(at - begin) + 1;
    if (!known || static_cast<size_t>(at - candidate) > farthest || four(candidate) != four(at)) {
      at++;
      continue;
    }
    size_t length = shortest;
    const size_t most = std::min(longest, static_cast<size_t>(end - at));
    while (length < most && candidate[length] == at[length]) length++;
    writer.literal(pending, at);
    writer.match(length, static_cast<size_t>(at - candidate));
    pending = at += length;
  }
  writer.literal(pending, end);
}

void unpack(const Bytes& in, Bytes& out) {
  out.clear();
  for (size_t at = 0; at < in.size();) {
    const size_t code = in[at++];
    if (code < 128) {
      out.insert(out.end(), in.begin() + static_cast<ptrdiff_t>(at),
                 in.begin() + static_cast<ptrdiff_t>(at + code + 1));
      at += code + 1;
    } else {
      const size_t distance = in[at] | size_t{in[at + 1]} << 8, from = out.size() - distance;
      at += 2;
      // Byte by byte: a match may overlap what it makes.
      for (size_t i = 0; i < code - 128 + shortest; i++) out.push_back(out[from + i]);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Bytes text = make_text(), packed, unpacked;
  packed.reserve(2 * text_bytes);
  unpacked.reserve(text_bytes);
  return compare::measure("compression", argc, argv, [&](uint64_t iterations) {
    compare::Checksum sum;
    while (iterations--) {
      pack(text, packed);
      unpack(packed, unpacked);
      if (unpacked != text) std::abort();
      sum.add(packed.size());
      for (size_t i = 0; i + 8 <= packed.size(); i += 256) sum.add(four(&packed[i]));
      text[sum.value() % text.size()] ^= 1;
    }
    return sum.value();
  });
}
