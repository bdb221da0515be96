// SHA-256 (FIPS 180-4) in scalar code: rotations, additions and table look-ups without a branch that depends
// on data. Each iteration hashes 64 KiB whose first block starts with the digest before.
#include <array>
#include <cstring>

#include "program.hpp"

namespace {

constexpr std::array<uint32_t, 64> round_constants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

using Digest = std::array<uint32_t, 8>;
constexpr Digest initial = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
constexpr size_t block_bytes = 64;

uint32_t big_endian(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return __builtin_bswap32(word);
}

void compress(Digest& digest, const uint8_t* block) {
  std::array<uint32_t, 64> w;
  for (size_t i = 0; i < 16; i++) w[i] = big_endian(block + 4 * i);
  for (size_t i = 16; i < 64; i++) {
    const uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
    const uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = digest;
  for (size_t i = 0; i < 64; i++) {
    const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + round_constants[i] + w[i];
    const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const Digest change = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < digest.size(); i++) digest[i] += change[i];
}

// `bytes` is a multiple of the block size.
Digest sha256(const uint8_t* data, size_t bytes) {
  Digest digest = initial;
  for (size_t at = 0; at < bytes; at += block_bytes) compress(digest, data + at);
  std::array<uint8_t, block_bytes> padding = {0x80};
  const uint64_t bits = __builtin_bswap64(bytes * 8);
  std::memcpy(padding.data() + block_bytes - sizeof bits, &bits, sizeof bits);
  compress(digest, padding.data());
  return digest;
}

std::array<uint8_t, 65536> message;

}  // namespace

int main(int argc, char** argv) {
  for (size_t i = 0; i < message.size(); i++) message[i] = static_cast<uint8_t>(i * 7 + (i >> 8));
  return compare::measure("hash", argc, argv, [](uint64_t iterations) {
    Digest digest{};
    while (iterations--) {
      for (size_t i = 0; i < digest.size(); i++) {
        const uint32_t word = __builtin_bswap32(digest[i]);
        std::memcpy(message.data() + 4 * i, &word, sizeof word);
      }
      digest = sha256(message.data(), message.size());
    }
    return uint64_t{digest[0]} << 32 | digest[1];
  });
}
