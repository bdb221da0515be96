// Plain and locked accesses to guest RAM through host addresses. Single instructions in assembler: guest
// memory is shared with other vCPUs and with the VMM, whose accesses race by design; the compiler must
// neither split nor repeat an access, and sanitizers must not read a meaning into them. Unaligned is fine.
#pragma once

#include <cstdint>
#include <cstring>

namespace lodge::kvm::soft {

template <class T>
[[gnu::always_inline]] inline T host_load(uint64_t address) noexcept {
  T value;
  if constexpr (sizeof(T) == 1)
    asm volatile("movb (%1), %0" : "=q"(value) : "r"(address) : "memory");
  else
    asm volatile("mov (%1), %0" : "=r"(value) : "r"(address) : "memory");
  return value;
}

template <class T>
[[gnu::always_inline]] inline void host_store(uint64_t address, T value) noexcept {
  if constexpr (sizeof(T) == 1)
    asm volatile("movb %0, (%1)" : : "q"(value), "r"(address) : "memory");
  else
    asm volatile("mov %0, (%1)" : : "r"(value), "r"(address) : "memory");
}

// Copies in the largest pieces that fit (each one instruction).
inline void host_read(uint64_t address, void* out, unsigned size) noexcept {
  auto* to = static_cast<uint8_t*>(out);
  const auto piece = [&]<class T>(T) {
    while (size >= sizeof(T)) {
      const T value = host_load<T>(address);
      std::memcpy(to, &value, sizeof value);
      to += sizeof(T);
      address += sizeof(T);
      size -= static_cast<unsigned>(sizeof(T));
    }
  };
  piece(uint64_t{}), piece(uint32_t{}), piece(uint16_t{}), piece(uint8_t{});
}

inline void host_write(uint64_t address, const void* data, unsigned size) noexcept {
  const auto* from = static_cast<const uint8_t*>(data);
  const auto piece = [&]<class T>(T) {
    while (size >= sizeof(T)) {
      T value;
      std::memcpy(&value, from, sizeof value);
      host_store<T>(address, value);
      from += sizeof(T);
      address += sizeof(T);
      size -= static_cast<unsigned>(sizeof(T));
    }
  };
  piece(uint64_t{}), piece(uint32_t{}), piece(uint16_t{}), piece(uint8_t{});
}

// Keeps host_store()s before it from passing those behind it. x86 stores are in order, so only the compiler
// is told (and not by std::atomic_thread_fence, which ThreadSanitizer does not know).
inline void host_store_fence() noexcept {
  asm volatile("" : : : "memory");
}

template <class T>
inline bool host_compare_exchange(uint64_t address, T expected, T desired) noexcept {
  bool done;
  asm volatile("lock cmpxchg %3, (%2)"
               : "=@ccz"(done), "+a"(expected)
               : "r"(address), "r"(desired)
               : "memory");
  return done;
}

}  // namespace lodge::kvm::soft
