// Saved state. A device declares its state once, as a struct with a visitor:
//
//   struct RtcState {
//     static constexpr std::string_view name = "rtc";
//     static constexpr unsigned version = 1;
//     uint8_t index = 0;
//     std::array<uint8_t, 128> cmos{};
//     template <class V> void visit(V& v) { v("index", index); v("cmos", cmos); }
//   };
//
// save_state() turns it into JSON ({"device", "version", fields...}; byte arrays as hex), load_state() back.
// Loading checks name, version and every field, and throws UsageError naming what does not fit: a snapshot is
// untrusted input.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace lodge {

namespace state_detail {
class Writer {
 public:
  explicit Writer(nlohmann::json& json) : json_(json) {}
  template <class T>
  void operator()(std::string_view name, T& value) {
    if constexpr (std::is_enum_v<T>) {
      integer(name, static_cast<uint64_t>(value));
    } else if constexpr (std::is_integral_v<T>) {
      integer(name, static_cast<uint64_t>(value));
    } else if constexpr (std::is_same_v<T, std::vector<uint8_t>>) {
      bytes(name, value);
    } else if constexpr (std::is_trivially_copyable_v<T>) {  // arrays and plain structs: their bytes
      bytes(name, {reinterpret_cast<const uint8_t*>(&value), sizeof value});
    } else {
      static_assert(std::is_trivially_copyable_v<T>, "declare fields of this type one by one");
    }
  }

 private:
  void integer(std::string_view name, uint64_t value);
  void bytes(std::string_view name, std::span<const uint8_t> value);
  nlohmann::json& json_;
};

class Reader {
 public:
  Reader(const nlohmann::json& json, std::string_view device) : json_(json), device_(device) {}
  template <class T>
  void operator()(std::string_view name, T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      value = integer(name, 1) != 0;
    } else if constexpr (std::is_enum_v<T>) {
      value = static_cast<T>(integer(name, static_cast<std::make_unsigned_t<std::underlying_type_t<T>>>(-1)));
    } else if constexpr (std::is_integral_v<T>) {
      value = static_cast<T>(std::is_signed_v<T> ? integer(name, UINT64_MAX)
                                                 : integer(name, static_cast<std::make_unsigned_t<T>>(-1)));
    } else if constexpr (std::is_same_v<T, std::vector<uint8_t>>) {
      value = bytes(name);
    } else {
      fixed(name, {reinterpret_cast<uint8_t*>(&value), sizeof value});
    }
  }

 private:
  uint64_t integer(std::string_view name, uint64_t maximum);
  std::vector<uint8_t> bytes(std::string_view name);
  void fixed(std::string_view name, std::span<uint8_t> value);
  const nlohmann::json& json_;
  std::string_view device_;
};

void begin(nlohmann::json& json, std::string_view name, unsigned version);
void check(const nlohmann::json& json, std::string_view name, unsigned version);
}  // namespace state_detail

template <class State>
void save_state(State state, nlohmann::json& json) {
  state_detail::begin(json, State::name, State::version);
  state_detail::Writer writer(json);
  state.visit(writer);
}

template <class State>
State load_state(const nlohmann::json& json) {
  state_detail::check(json, State::name, State::version);
  State state{};
  state_detail::Reader reader(json, State::name);
  state.visit(reader);
  return state;
}

// What the machine asks of everything that has state. Called while no vCPU runs.
class Savable {
 public:
  virtual ~Savable() = default;
  virtual void save(nlohmann::json& json) const = 0;
  virtual void load(const nlohmann::json& json) = 0;  // throws UsageError; the device is unchanged then
};

}  // namespace lodge
