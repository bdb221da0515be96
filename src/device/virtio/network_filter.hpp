// Which frames a network card takes, as its driver has said by the control queue (VirtIO 1.2, 5.1.6.5.1 to
// 5.1.6.5.3).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace lodge::device::virtio {

using Mac = std::array<uint8_t, 6>;

struct FilterState {
  static constexpr std::string_view name = "virtio-net-filter";
  static constexpr unsigned version = 1;
  // Until a driver says otherwise, everything is let through.
  bool promiscuous = true, all_multicast = false, all_unicast = false;
  bool no_multicast = false, no_unicast = false, no_broadcast = false;
  std::vector<uint8_t> unicast, multicast;  // addresses, 6 bytes each
  std::array<uint8_t, 512> vlans{};         // a bit for each
  template <class V>
  void visit(V& v) {
    v("promiscuous", promiscuous), v("all_multicast", all_multicast), v("all_unicast", all_unicast);
    v("no_multicast", no_multicast), v("no_unicast", no_unicast), v("no_broadcast", no_broadcast);
    v("unicast", unicast), v("multicast", multicast), v("vlans", vlans);
  }
};

// Not synchronised: its card guards it.
class ReceiveFilter {
 public:
  // More addresses than that and the table is full: all of the kind are let through.
  static constexpr size_t max_addresses = 64;

  // The commands of a class, with what follows them; false: unknown or malformed, and nothing has changed.
  bool set_mode(uint8_t command, std::span<const uint8_t> data) noexcept;
  bool set_tables(std::span<const uint8_t> data) noexcept;
  bool set_vlan(uint8_t command, std::span<const uint8_t> data) noexcept;

  // `frame` has at least its first 18 bytes, as far as there are so many. Tags count only `with_vlans`.
  bool accepts(std::span<const uint8_t> frame, const Mac& own, bool with_vlans) const noexcept;

  const FilterState& state() const noexcept { return state_; }
  // False, and nothing has changed, when the state is impossible.
  bool set_state(const FilterState& state) noexcept;

 private:
  FilterState state_;
};

}  // namespace lodge::device::virtio
