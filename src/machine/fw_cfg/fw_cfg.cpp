// Firmware configuration, as QEMU documents it in docs/specs/fw_cfg.rst.
//
// Modelled: selector, data port (reading; writing has been a no-op there since QEMU 2.4), DMA with select,
// read, write and skip, the file directory. Missing: items that change while the guest runs, and the
// architecture-local numbers (0x8000 on): no guest needs them on a machine that makes its own ACPI and SMBIOS
// tables. A number that is not there reads as zeros, as an item's end does.
//
// A DMA goes on as long as the guest asked for, 4 GiB at most and only to RAM: it costs the vCPU that asked
// its time, like a string instruction of that length.
#include "machine/fw_cfg/fw_cfg.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "machine/boot/bzimage.hpp"
#include "machine/boot/placement.hpp"

namespace lodge::machine {

namespace {

constexpr uint64_t selector_at = 0, data_at = 1, dma_high_at = 4, dma_low_at = 8;
constexpr uint16_t write_channel = 0x4000;               // selector bit 14: without meaning since QEMU 2.4
constexpr uint64_t dma_signature = 0x51454d55'20434647;  // "QEMU CFG"
constexpr uint32_t interface_bit = 1, dma_bit = 2;
// Bits of a DMA's control word; the selector is in its upper half.
constexpr uint32_t dma_error = 1, dma_read_bit = 2, dma_skip = 4, dma_select = 8, dma_write_bit = 16;
constexpr size_t directory_entry = 64, name_size = 56;

constexpr uint16_t number(FwCfgKey key) {
  return static_cast<uint16_t>(key);
}

template <class T>
std::vector<uint8_t> little_endian(T value) {
  std::vector<uint8_t> bytes(sizeof value);
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

struct DmaRequest {
  uint32_t control;
  uint32_t length;
  uint64_t address;
};
static_assert(sizeof(DmaRequest) == 16);

template <class T>
void append_big_endian(std::vector<uint8_t>& bytes, T value) {
  for (size_t shift = sizeof value * 8; shift > 0; shift -= 8) {
    bytes.push_back(static_cast<uint8_t>(value >> (shift - 8)));
  }
}

}  // namespace

FwCfg::FwCfg(GuestMemory& memory) : memory_(memory) {
  set(FwCfgKey::signature, {'Q', 'E', 'M', 'U'});
  set_u32(FwCfgKey::id, interface_bit | dma_bit);
  write_directory();
}

void FwCfg::set(FwCfgKey key, std::vector<uint8_t> data) {
  const std::lock_guard lock(mutex_);
  items_[number(key)] = Item{.data = std::move(data)};
}

void FwCfg::set(FwCfgKey key, Mapping file) {
  const std::lock_guard lock(mutex_);
  items_[number(key)] = Item{.mapped = std::move(file)};
}

void FwCfg::set_u16(FwCfgKey key, uint16_t value) {
  set(key, little_endian(value));
}
void FwCfg::set_u32(FwCfgKey key, uint32_t value) {
  set(key, little_endian(value));
}
void FwCfg::set_u64(FwCfgKey key, uint64_t value) {
  set(key, little_endian(value));
}

void FwCfg::add_file(const std::string& name, std::vector<uint8_t> data, bool writable) {
  const bool printable = std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c <= '~'; });
  if (name.empty() || name.size() >= name_size || !printable) {
    usage_error("fw_cfg name '{}': give 1 to {} printable characters without blanks", name, name_size - 1);
  }
  {
    const std::lock_guard lock(mutex_);
    const uint16_t first = number(FwCfgKey::first_file);
    uint16_t key = first;
    while (items_.contains(key) && items_[key].name != name) ++key;
    if (key >= first + max_files)
      usage_error("fw_cfg name '{}': there are {} items already", name, max_files);
    items_[key] = Item{.data = std::move(data), .name = name, .writable = writable};
  }
  write_directory();
}

void FwCfg::write_directory() {
  std::vector<uint8_t> directory;
  {
    const std::lock_guard lock(mutex_);
    const auto first = items_.lower_bound(number(FwCfgKey::first_file));
    append_big_endian(directory, static_cast<uint32_t>(std::distance(first, items_.end())));
    for (auto item = first; item != items_.end(); ++item) {
      const size_t end = directory.size() + directory_entry;
      append_big_endian(directory, static_cast<uint32_t>(item->second.bytes().size()));
      append_big_endian(directory, item->first);
      append_big_endian(directory, uint16_t{0});
      directory.insert(directory.end(), item->second.name.begin(), item->second.name.end());
      directory.resize(end);
    }
  }
  set(FwCfgKey::file_directory, std::move(directory));
}

std::vector<uint8_t> FwCfg::file(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  for (const auto& [key, item] : items_) {
    if (!item.name.empty() && item.name == name) return {item.bytes().begin(), item.bytes().end()};
  }
  return {};
}

// Items keep what the guest wrote: after a reset the same firmware comes and writes it again.
void FwCfg::reset() noexcept {
  const std::lock_guard lock(mutex_);
  state_.selector = 0;
  state_.offset = 0;
  state_.dma_address_high = 0;
}

FwCfg::Item* FwCfg::selected() noexcept {
  const auto item = items_.find(state_.selector);
  return item == items_.end() ? nullptr : &item->second;
}

void FwCfg::select(uint16_t key) noexcept {
  state_.selector = static_cast<uint16_t>(key & ~write_channel);
  state_.offset = 0;
}

uint8_t FwCfg::next_byte() noexcept {
  const Item* item = selected();
  if (item == nullptr || state_.offset >= item->bytes().size()) return 0;
  return item->bytes()[state_.offset++];
}

uint64_t FwCfg::read(uint64_t offset, unsigned size) noexcept {
  const std::lock_guard lock(mutex_);
  uint64_t value = 0;
  for (unsigned index = 0; index < size; ++index) {
    const uint64_t at = offset + index;
    uint8_t byte = 0;
    if (at == data_at) byte = next_byte();
    if (at >= dma_high_at && at < window_size) {  // the register's bytes in big-endian order
      byte = static_cast<uint8_t>(dma_signature >> (8 * (7 - (at - dma_high_at))));
    }
    value |= uint64_t{byte} << (8 * index);
  }
  return value;
}

void FwCfg::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  const std::lock_guard lock(mutex_);
  if (offset == selector_at && size == 2) select(static_cast<uint16_t>(value));
  if (size != 4) return;
  const uint32_t half = __builtin_bswap32(static_cast<uint32_t>(value));
  if (offset == dma_high_at) state_.dma_address_high = half;
  if (offset == dma_low_at) {
    const uint64_t address = uint64_t{state_.dma_address_high} << 32 | half;
    state_.dma_address_high = 0;
    run_dma(address);
  }
}

// The request is read once: a second vCPU that changes it meanwhile changes nothing here.
void FwCfg::run_dma(uint64_t address) noexcept {
  DmaRequest request;
  if (!memory_.read(address, {reinterpret_cast<uint8_t*>(&request), sizeof request})) return;
  const uint32_t control = __builtin_bswap32(request.control);
  const uint32_t length = __builtin_bswap32(request.length);
  const uint64_t target = __builtin_bswap64(request.address);
  if ((control & dma_select) != 0) select(static_cast<uint16_t>(control >> 16));
  bool good = true;
  if ((control & dma_read_bit) != 0) {
    good = dma_read(target, length);
  } else if ((control & dma_write_bit) != 0) {
    good = dma_write(target, length);
  } else if ((control & dma_skip) != 0) {
    const Item* item = selected();
    const uint64_t size = item == nullptr ? 0 : item->bytes().size();
    state_.offset = static_cast<uint32_t>(std::min<uint64_t>(uint64_t{state_.offset} + length, size));
  }
  const uint32_t result = __builtin_bswap32(good ? 0 : dma_error);
  memory_.write(address, {reinterpret_cast<const uint8_t*>(&result), sizeof result});
}

bool FwCfg::dma_read(uint64_t address, uint32_t length) noexcept {
  if (length == 0) return true;
  const auto target = memory_.view(address, length);
  if (target.empty()) return false;
  const Item* item = selected();
  const auto bytes = item == nullptr ? std::span<const uint8_t>{} : item->bytes();
  const size_t rest = bytes.size() - std::min<size_t>(state_.offset, bytes.size());
  const size_t count = std::min<size_t>(rest, length);
  if (count != 0) std::memcpy(target.data(), bytes.data() + state_.offset, count);
  std::memset(target.data() + count, 0, length - count);
  state_.offset += static_cast<uint32_t>(count);
  memory_.note_write(address, length);
  return true;
}

bool FwCfg::dma_write(uint64_t address, uint32_t length) noexcept {
  Item* item = selected();
  if (item == nullptr || !item->writable) return false;
  if (state_.offset > item->data.size() || length > item->data.size() - state_.offset) return false;
  if (!memory_.read(address, std::span(item->data).subspan(state_.offset, length))) return false;
  state_.offset += length;
  return true;
}

void FwCfg::save(nlohmann::json& json) const {
  const std::lock_guard lock(mutex_);
  FwCfgState state = state_;
  for (const auto& [key, item] : items_) {
    if (item.writable) state.writable.insert(state.writable.end(), item.data.begin(), item.data.end());
  }
  save_state(std::move(state), json);
}

void FwCfg::load(const nlohmann::json& json) {
  auto state = load_state<FwCfgState>(json);
  const std::lock_guard lock(mutex_);
  size_t expected = 0;
  for (const auto& [key, item] : items_) expected += item.writable ? item.data.size() : 0;
  if (state.writable.size() != expected) {
    usage_error("saved state of fw_cfg: {} bytes of writable items, this machine has {}",
                state.writable.size(), expected);
  }
  auto from = state.writable.cbegin();
  for (auto& [key, item] : items_) {
    if (!item.writable) continue;
    std::copy_n(from, item.data.size(), item.data.begin());
    from += static_cast<std::ptrdiff_t>(item.data.size());
  }
  state.writable.clear();
  state_ = std::move(state);
}

void describe_machine(FwCfg& fw_cfg, const GuestMemory& memory, unsigned cpus) {
  fw_cfg.set_u64(FwCfgKey::ram_size, memory.size());
  fw_cfg.set_u16(FwCfgKey::cpu_count, static_cast<uint16_t>(cpus));
  fw_cfg.set_u16(FwCfgKey::max_cpus, static_cast<uint16_t>(cpus));
  fw_cfg.set_u16(FwCfgKey::nographic, 1);
  fw_cfg.set_u16(FwCfgKey::boot_menu, 0);
  const auto map = boot::e820_map(memory);
  std::vector<uint8_t> table(map.size() * 20);
  for (size_t index = 0; index < map.size(); ++index) {
    boot::put(table, index * 20, map[index].address);
    boot::put(table, index * 20 + 8, map[index].size);
    boot::put(table, index * 20 + 16, map[index].type);
  }
  fw_cfg.add_file("etc/e820", std::move(table));
}

void describe_kernel(FwCfg& fw_cfg, const std::string& kernel_path, const std::string& initrd_path,
                     const std::string& command_line) {
  // Where firmwares put the parts of a bzImage by tradition; they may choose otherwise.
  constexpr uint32_t setup_address = 0x10000, cmdline_address = 0x20000;
  const Mapping file = Mapping::file(kernel_path, "--kernel");
  const boot::Bytes kernel = file.bytes();
  const boot::BzImage image = boot::parse_bzimage(kernel, "--kernel " + kernel_path);
  const boot::Bytes setup = kernel.first(kernel.size() - image.protected_mode.size());
  fw_cfg.set_u32(FwCfgKey::setup_address, setup_address);
  fw_cfg.set_u32(FwCfgKey::setup_size, static_cast<uint32_t>(setup.size()));
  fw_cfg.set(FwCfgKey::setup_data, {setup.begin(), setup.end()});
  fw_cfg.set_u32(FwCfgKey::kernel_address, static_cast<uint32_t>(image.load_address));
  fw_cfg.set_u32(FwCfgKey::kernel_size, static_cast<uint32_t>(image.protected_mode.size()));
  fw_cfg.set(FwCfgKey::kernel_data, {image.protected_mode.begin(), image.protected_mode.end()});
  std::vector<uint8_t> line(command_line.begin(), command_line.end());
  line.push_back(0);
  fw_cfg.set_u32(FwCfgKey::cmdline_address, cmdline_address);
  fw_cfg.set_u32(FwCfgKey::cmdline_size, static_cast<uint32_t>(line.size()));
  fw_cfg.set(FwCfgKey::cmdline_data, std::move(line));
  if (initrd_path.empty()) {
    fw_cfg.set_u32(FwCfgKey::initrd_size, 0);
    return;
  }
  Mapping initrd = Mapping::file(initrd_path, "--initrd");
  fw_cfg.set_u32(FwCfgKey::initrd_size, static_cast<uint32_t>(initrd.size()));
  fw_cfg.set(FwCfgKey::initrd_data, std::move(initrd));
}

}  // namespace lodge::machine
