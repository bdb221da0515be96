// The firmware configuration device: named and numbered blobs that a firmware or a guest reads through two
// ports or by DMA, compatible with QEMU's (docs/specs/fw_cfg.rst).
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapping.hpp"
#include "base/state.hpp"
#include "machine/io.hpp"
#include "machine/memory.hpp"

namespace lodge::machine {

// Item numbers with a fixed meaning. Numbers from first_file on belong to named files, in the order of
// addition.
enum class FwCfgKey : uint16_t {
  signature = 0x00,  // "QEMU"
  id = 0x01,         // u32: bit 0 this interface, bit 1 DMA
  uuid = 0x02,       // 16 bytes
  ram_size = 0x03,   // u64, bytes
  nographic = 0x04,  // u16
  cpu_count = 0x05,  // u16
  kernel_address = 0x07,
  kernel_size = 0x08,
  initrd_address = 0x0a,
  initrd_size = 0x0b,
  boot_menu = 0x0e,  // u16
  max_cpus = 0x0f,   // u16
  kernel_data = 0x11,
  initrd_data = 0x12,
  cmdline_address = 0x13,
  cmdline_size = 0x14,  // with the terminating zero
  cmdline_data = 0x15,
  setup_address = 0x16,
  setup_size = 0x17,
  setup_data = 0x18,
  file_directory = 0x19,
  first_file = 0x20,
};

struct FwCfgState {
  static constexpr std::string_view name = "fw_cfg";
  static constexpr unsigned version = 1;

  uint16_t selector = 0;
  uint32_t offset = 0;            // of the next byte in the selected item
  uint32_t dma_address_high = 0;  // written, and waiting for the low half
  std::vector<uint8_t>
      writable{};  // the contents of all writable items, by number: the rest comes from the set-up

  template <class V>
  void visit(V& v) {
    v("selector", selector), v("offset", offset), v("dma_address_high", dma_address_high);
    v("writable", writable);
  }
};

// The window is window_size ports at layout::fw_cfg_port: selector +0 (16 bits, write only), data +1 (8
// bits), DMA address +4 (two big-endian halves).
class FwCfg final : public RegisterWindow, public Savable {
 public:
  static constexpr uint64_t window_size = 12;
  static constexpr size_t max_files = 256;

  // `memory` is where DMA goes; it must outlive the device. The device begins with signature, id and an empty
  // directory.
  explicit FwCfg(GuestMemory& memory);

  // Adds or replaces an item. Before the guest runs.
  void set(FwCfgKey key, std::vector<uint8_t> data);
  void set(FwCfgKey key, Mapping file);  // large ones, without a copy
  void set_u16(FwCfgKey key, uint16_t value);
  void set_u32(FwCfgKey key, uint32_t value);
  void set_u64(FwCfgKey key, uint64_t value);
  // Adds a named item ("etc/e820", "opt/org.example/x") and its entry in the directory, or replaces the data
  // of a name that is there. What is writable can be changed by the guest (DMA only), never resized. Throws
  // UsageError when the name has no 1 to 55 printable characters or when there are max_files already.
  void add_file(const std::string& name, std::vector<uint8_t> data, bool writable = false);

  // The present contents of a named item, as the guest may have changed it; empty when there is none. Any
  // thread.
  std::vector<uint8_t> file(const std::string& name) const;

  void reset() noexcept;

  uint64_t read(uint64_t offset, unsigned size) noexcept override;
  void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  struct Item {
    std::vector<uint8_t> data{};
    Mapping mapped{};    // instead of data
    std::string name{};  // of a file
    bool writable = false;
    std::span<const uint8_t> bytes() const noexcept {
      return mapped ? std::span<const uint8_t>(mapped.bytes()) : std::span<const uint8_t>(data);
    }
  };

  Item* selected() noexcept;
  void select(uint16_t key) noexcept;
  uint8_t next_byte() noexcept;
  void run_dma(uint64_t address) noexcept;
  bool dma_read(uint64_t address, uint32_t length) noexcept;
  bool dma_write(uint64_t address, uint32_t length) noexcept;
  void write_directory();

  GuestMemory& memory_;
  mutable std::mutex mutex_;
  std::map<uint16_t, Item> items_;
  FwCfgState state_;  // .writable is only filled by save()
};

// What the machine says about itself: RAM size, processors, the memory map (etc/e820).
void describe_machine(FwCfg& fw_cfg, const GuestMemory& memory, unsigned cpus);

// A Linux kernel for a firmware to boot: the real-mode and the protected-mode part of the bzImage as they are
// in the file, initrd (may be empty) and command line. Throws UsageError for what is no bzImage.
void describe_kernel(FwCfg& fw_cfg, const std::string& kernel_path, const std::string& initrd_path,
                     const std::string& command_line);

}  // namespace lodge::machine
