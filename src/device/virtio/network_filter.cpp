#include "device/virtio/network_filter.hpp"

#include <algorithm>

namespace lodge::device::virtio {

namespace {

constexpr size_t mac_size = 6;
constexpr uint8_t VLAN_ADD = 0, VLAN_DEL = 1;

bool contains(const std::vector<uint8_t>& table, std::span<const uint8_t> address) noexcept {
  for (size_t at = 0; at + mac_size <= table.size(); at += mac_size)
    if (std::equal(address.begin(), address.end(), table.begin() + static_cast<ptrdiff_t>(at))) return true;
  return false;
}

// 5.1.6.5.2 struct virtio_net_ctrl_mac: a count of 32 bits and so many addresses. False when they are not
// there.
bool take_table(std::span<const uint8_t>& data, std::span<const uint8_t>& table) noexcept {
  if (data.size() < 4) return false;
  const uint32_t count = data[0] | uint32_t{data[1]} << 8 | uint32_t{data[2]} << 16 | uint32_t{data[3]} << 24;
  data = data.subspan(4);
  if (count > data.size() / mac_size) return false;
  table = data.first(count * mac_size);
  data = data.subspan(table.size());
  return true;
}

}  // namespace

bool ReceiveFilter::set_mode(uint8_t command, std::span<const uint8_t> data) noexcept {
  // 5.1.6.5.1, by number.
  bool* const modes[] = {&state_.promiscuous,  &state_.all_multicast, &state_.all_unicast,
                         &state_.no_multicast, &state_.no_unicast,    &state_.no_broadcast};
  if (command >= std::size(modes) || data.empty()) return false;
  *modes[command] = data[0] != 0;
  return true;
}

bool ReceiveFilter::set_tables(std::span<const uint8_t> data) noexcept {
  std::span<const uint8_t> unicast, multicast;
  if (!take_table(data, unicast) || !take_table(data, multicast)) return false;
  // An address too many stands for all: 5.1.6.5.2 allows more to come through, never less.
  const auto limited = [](std::span<const uint8_t> table) {
    return table.first(std::min(table.size(), (max_addresses + 1) * mac_size));
  };
  unicast = limited(unicast), multicast = limited(multicast);
  state_.unicast.assign(unicast.begin(), unicast.end());
  state_.multicast.assign(multicast.begin(), multicast.end());
  return true;
}

bool ReceiveFilter::set_vlan(uint8_t command, std::span<const uint8_t> data) noexcept {
  if (command > VLAN_DEL || data.size() < 2) return false;
  const unsigned id = data[0] | unsigned{data[1]} << 8;
  if (id >= 4096) return false;
  const auto bit = static_cast<uint8_t>(1u << (id % 8));
  uint8_t& byte = state_.vlans[id / 8];
  byte = static_cast<uint8_t>(command == VLAN_ADD ? byte | bit : byte & ~bit);
  return true;
}

bool ReceiveFilter::accepts(std::span<const uint8_t> frame, const Mac& own, bool with_vlans) const noexcept {
  if (frame.size() < mac_size) return false;
  if (with_vlans && frame.size() >= 16 && frame[12] == 0x81 && frame[13] == 0x00) {
    const unsigned id = (unsigned{frame[14]} << 8 | frame[15]) & 0xfff;
    if (!(state_.vlans[id / 8] >> (id % 8) & 1)) return false;
  }
  if (state_.promiscuous) return true;
  const auto to = frame.first(mac_size);
  constexpr size_t full = max_addresses * mac_size;
  if (std::ranges::all_of(to, [](uint8_t byte) { return byte == 0xff; })) return !state_.no_broadcast;
  if (to[0] & 1)
    return !state_.no_multicast &&
           (state_.all_multicast || state_.multicast.size() > full || contains(state_.multicast, to));
  return !state_.no_unicast && (state_.all_unicast || state_.unicast.size() > full ||
                                std::ranges::equal(to, own) || contains(state_.unicast, to));
}

bool ReceiveFilter::set_state(const FilterState& state) noexcept {
  for (const auto* table : {&state.unicast, &state.multicast})
    if (table->size() % mac_size != 0 || table->size() > (max_addresses + 1) * mac_size) return false;
  state_ = state;
  return true;
}

}  // namespace lodge::device::virtio
