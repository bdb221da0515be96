#include "vm/machine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <exception>

#include "base/error.hpp"
#include "device/pci/allocate.hpp"
#include "device/watchdog.hpp"
#include "guestfs/boot_files.hpp"
#include "machine/acpi/acpi.hpp"
#include "machine/layout.hpp"
#include "machine/smbios/smbios.hpp"

namespace lodge::vm {
namespace {

namespace layout = machine::layout;

constexpr uint32_t gsi_count = 24, keyboard_irq = 1, mouse_irq = 12;

// Local vector table entries as firmware leaves them (Intel MultiProcessor Specification 1.4,
// section 3.6.2.2, "virtual wire"): the boot processor's LINT0 takes the 8259's interrupt, everyone's LINT1
// is NMI.
constexpr unsigned lapic_lvt_lint0 = 0x350, lapic_lvt_lint1 = 0x360;
constexpr uint32_t lvt_extint = 0x700, lvt_nmi = 0x400, lvt_masked = 0x10000;

constexpr uint32_t msr_misc_enable = 0x1a0, msr_mtrr_def_type = 0x2ff, msr_amd_hwcr = 0xc001'0015;
constexpr uint64_t hwcr_tsc_freq_sel = 1u << 24;  // the TSC counts at P0's frequency
constexpr uint64_t misc_enable_fast_string = 1;
// Enabled, write-back by default: what is no RAM is left to the guest's page attributes, as KVM machines do.
constexpr uint64_t mtrr_write_back = 0x800 | 6;

// The kernel's consoles: those that somebody sees. The last is the one that is typed on.
std::string kernel_consoles(const VmConfig& config) {
  const bool serial = !config.serial.empty() && config.serial[0].kind != SerialConfig::Kind::null;
  const bool virtio = std::ranges::any_of(
      config.devices, [](const DeviceConfig& device) { return device.name == "virtio-console"; });
  return fmt::format("{}{}{}", serial ? "console=ttyS0" : "", serial && virtio ? " " : "",
                     virtio ? "console=hvc0" : "");
}

void set_lvt(kvm_lapic_state& lapic, unsigned offset, uint32_t value) {
  for (unsigned i = 0; i < 4; i++) lapic.regs[offset + i] = static_cast<char>(value >> (8 * i));
}

// What firmware would have set up before the kernel.
void set_up_vcpu(kvm::Vcpu& vcpu, bool boot_processor) {
  kvm_lapic_state lapic = vcpu.lapic();
  set_lvt(lapic, lapic_lvt_lint0, boot_processor ? lvt_extint : lvt_extint | lvt_masked);
  set_lvt(lapic, lapic_lvt_lint1, lvt_nmi);
  vcpu.set_lapic(lapic);
  // One by one: what a processor does not have (Intel and AMD differ here) it refuses, and the others still
  // count.
  for (const auto& [index, value] :
       {std::pair{msr_misc_enable, misc_enable_fast_string}, std::pair{msr_mtrr_def_type, mtrr_write_back},
        std::pair{msr_amd_hwcr, hwcr_tsc_freq_sel}}) {
    kvm_msr_entry entry{};
    entry.index = index, entry.data = value;
    vcpu.set_msrs({&entry, 1});
  }
}

}  // namespace

Machine::Machine(const VmConfig& config, kvm::System& system, Clock& clock, Backends& backends,
                 machine::Power& power)
    : backends_(backends), vm_(system.create_vm()), memory_(config.memory) {
  memory_.attach(*vm_, 0);
  create_irqchip();
  create_chipset(clock, power);
  create_timers(clock);  // after the chipset: the RTC also drives the ACPI chip
  create_pci();
  create_firmware_configuration(config);
  create_serial_ports(clock);
  create_optional_devices(config, clock, power);
  create_vcpus(config, system);
  describe(config);
  load_kernel(config);
  // From here on the user's bytes may flow.
  for (size_t i = 0; i < serial_.size(); i++) backends_.serial(i).connect(*serial_[i]);
}

Machine::~Machine() {
  for (size_t i = 0; i < backends_.serial_ports(); i++) backends_.serial(i).disconnect();
}

void Machine::create_irqchip() {
  vm_->set_tss_addr(layout::tss_base);
  vm_->set_identity_map_addr(layout::identity_map_base);
  vm_->create_irqchip();
  kvm_pit_config pit{};
  pit.flags = KVM_PIT_SPEAKER_DUMMY;  // port 0x61 answers
  vm_->create_pit2(pit);
  vm_->set_gsi_routing(pc_routing());
  for (uint32_t gsi = 0; gsi < gsi_count; gsi++)
    inputs_.push_back(std::make_unique<InterruptInput>(*vm_, gsi));
}

void Machine::mount(machine::Bus& bus, uint64_t base, uint64_t size, machine::RegisterWindow& window,
                    const char* owner) {
  mounted_.emplace_back(bus, base, size, window, owner);
}

// The HPET's legacy replacement takes IRQ 0 from the 8254, which is inside the accelerator (api.rst,
// KVM_SET_PIT2).
void Machine::replace_pit(bool replaced) noexcept {
  try {
    kvm_pit_state2 pit = vm_->pit2();
    pit.flags =
        replaced ? pit.flags | KVM_PIT_FLAGS_HPET_LEGACY : pit.flags & ~uint32_t{KVM_PIT_FLAGS_HPET_LEGACY};
    vm_->set_pit2(pit);
  } catch (const std::exception&) {
    // An accelerator without the flag: the guest gets both interrupts, as some boards do.
  }
}

void Machine::create_timers(Clock& clock) {
  hpet_ = std::make_unique<device::Hpet>(
      clock,
      device::HpetWiring{.irq0 = interrupt(0),
                         .irq8 = interrupt(layout::rtc_irq),
                         .line = [this](unsigned gsi) -> machine::Interrupt& { return interrupt(gsi); },
                         .legacy_replacement = [this](bool replaced) { replace_pit(replaced); }});
  mount(mmio_, layout::hpet_base, device::Hpet::window_size, *hpet_, "HPET");
  // Also to the ACPI chip: when the HPET has taken IRQ 8, Linux waits for alarms there.
  rtc_line_ = std::make_unique<device::SplitLine>(hpet_->rtc_input(), pm_->rtc_input());
  rtc_ = std::make_unique<device::Rtc>(clock, *rtc_line_);
  uint64_t low = 0, high = 0;
  for (const auto& range : memory_.ranges()) (range.gpa < layout::high_ram_base ? low : high) += range.size;
  rtc_->describe_memory(low, high);
  mount(ports_, layout::rtc_port, device::Rtc::window_size, *rtc_, "real-time clock");
}

void Machine::create_chipset(Clock& clock, machine::Power& power) {
  pm_ = std::make_unique<device::AcpiPm>(clock, interrupt(layout::sci_irq), power);
  mount(ports_, layout::acpi_pm_base, device::AcpiPm::window_size, *pm_, "ACPI power management");
  mount(ports_, layout::smi_command_port, 2, pm_->smi_window(), "SMI command port");
  i8042_ = std::make_unique<device::I8042>(interrupt(keyboard_irq), interrupt(mouse_irq), power);
  mount(ports_, 0x60, 1, i8042_->data_window(), "keyboard controller");
  mount(ports_, 0x64, 1, i8042_->command_window(), "keyboard controller");
  port92_ = std::make_unique<device::Port92>(power);
  mount(ports_, 0x92, 1, *port92_, "system control port A");
  reset_ = std::make_unique<device::ResetControl>(power);
  mount(ports_, 0x80, 16, post_, "POST code and DMA page registers");
  mount(ports_, 0xed, 1, delay_, "delay port");
}

void Machine::create_pci() {
  pci_ = std::make_unique<device::pci::Root>(
      ports_, mmio_, [this](unsigned gsi) -> machine::Interrupt& { return interrupt(gsi); }, *reset_);
  mount(ports_, device::pci::Root::ports_base, device::pci::Root::ports_size, pci_->port_window(),
        "PCI configuration");
  mount(mmio_, layout::ecam_base, layout::ecam_size, pci_->ecam_window(), "PCI Express configuration");
  pci_->add(device::pci::HostBridge::slot, 0, host_bridge_);
  pci_->add(device::pci::LpcBridge::slot, 0, lpc_bridge_);
}

void Machine::create_firmware_configuration(const VmConfig& config) {
  using Key = machine::FwCfgKey;
  fw_cfg_ = std::make_unique<machine::FwCfg>(memory_);
  fw_cfg_->set_u64(Key::ram_size, config.memory);
  fw_cfg_->set_u16(Key::cpu_count, static_cast<uint16_t>(config.cpus));
  fw_cfg_->set_u16(Key::max_cpus, static_cast<uint16_t>(config.cpus));
  fw_cfg_->set_u16(Key::nographic, 1);
  mount(ports_, layout::fw_cfg_port, machine::FwCfg::window_size, *fw_cfg_, "firmware configuration");
}

void Machine::create_serial_ports(Clock& clock) {
  for (size_t i = 0; i < backends_.serial_ports(); i++) {
    serial_.push_back(
        std::make_unique<device::Serial>(clock, interrupt(layout::serial_irqs[i]), backends_.serial(i)));
    mount(ports_, layout::serial_ports[i], device::Serial::window_size, *serial_[i], "serial port");
  }
}

void Machine::create_optional_devices(const VmConfig& config, Clock& clock, machine::Power& power) {
  const device::DeviceContext context{
      .ports = ports_,
      .memory = mmio_,
      .ram = memory_,
      .clock = clock,
      .power = power,
      .line = [this](unsigned gsi) -> machine::Interrupt& { return interrupt(gsi); },
      .open_backend = [this](const std::string& specification, const std::string& option, bool input)
          -> std::shared_ptr<device::CharBackend> { return backends_.open(specification, option, input); },
      .open_disk = [this](const std::string& path,
                          const block::OpenOptions& options) { return backends_.open_disk(path, options); },
      .open_user_network =
          [this](const std::string& forwards) { return backends_.open_user_network(forwards); },
      .pci = *pci_,
      .msi = platform_,
      .doorbells = platform_,
      .loop = loop_};
  for (const auto& device : config.devices)
    optional_.push_back(device::create_device(context, device.name, device.options));
  device::pci::assign_resources(*pci_);
}

void Machine::create_vcpus(const VmConfig& config, kvm::System& system) {
  const int maximum = vm_->check_extension(KVM_CAP_MAX_VCPUS);
  if (maximum > 0 && config.cpus > static_cast<unsigned>(maximum)) {
    usage_error("--cpus: the {} accelerator runs at most {} CPUs in one machine", system.name(), maximum);
  }
  cpuid_ = model_cpuid(system, config.cpu);
  for (unsigned id = 0; id < config.cpus; id++) {
    auto vcpu = vm_->create_vcpu(id);
    vcpu->set_cpuid2(vcpu_cpuid(cpuid_, id, config.cpus));
    set_up_vcpu(*vcpu, id == 0);
    vcpus_.push_back(std::move(vcpu));
  }
}

device::Disk* Machine::disk(std::string_view name) noexcept {
  unsigned nameless = 0;
  for (const auto& mounted : optional_) {
    device::Disk* disk = mounted->disk();
    if (!disk) continue;
    if (name == (disk->name().empty() ? fmt::format("disk{}", nameless++) : disk->name())) return disk;
  }
  return nullptr;
}

// The tables in which a guest reads what the machine is made of.
void Machine::describe(const VmConfig& config) {
  machine::acpi::Config acpi;
  acpi.cpus = config.cpus;
  acpi.serial_ports = static_cast<unsigned>(serial_.size());
  acpi.fw_cfg = true;
  const auto has = [&](std::string_view name) {
    return std::ranges::any_of(config.devices, [&](const auto& device) { return device.name == name; });
  };
  acpi.pvpanic = has("pvpanic");
  using device::Watchdog;
  if (has("watchdog")) acpi.watchdog = {Watchdog::ports, Watchdog::period_ms, Watchdog::max_count};
  rsdp_ = machine::acpi::install(acpi, memory_);

  machine::smbios::Config smbios;
  smbios.cpus = config.cpus;
  smbios.serial = config.name;
  smbios.cpu_name = brand_string(cpuid_);
  for (const auto& entry : cpuid_) {
    if (entry.function == 1) smbios.cpuid_eax = entry.eax, smbios.cpuid_edx = entry.edx;
  }
  machine::smbios::install(smbios, memory_);
}

// A kernel that the guest has installed counts from the next reset on: the disk is read as it is now.
machine::boot::BootState Machine::load_from_disk(const VmConfig& config, machine::boot::Request request) {
  const auto files =
      guestfs::find_boot_files(backends_.disk(config.boot_disk), config.boot_disk, memory_.size());
  if (config.seeded && !files.cloud_init) {
    usage_error(
        "{}: the system on this disk has no cloud-init, which --user-data, --ssh-key, --hostname and --run "
        "need; 'lodge image build' takes --package cloud-init, and --ssh-key and --hostname itself",
        config.boot_disk);
  }
  request.kernel = fmt::format("{} of {}", files.kernel_path, config.boot_disk);
  // What the user has appended comes last, and counts where it says something else.
  request.append = fmt::format("root={} ro {}{}{}", files.root, kernel_consoles(config),
                               request.append.empty() ? "" : " ", request.append);
  request.initrd = files.initrd;
  return machine::boot::load_bytes(files.kernel, request, memory_);
}

void Machine::load_kernel(const VmConfig& config) {
  machine::boot::Request request;
  request.acpi_rsdp = rsdp_;
  request.kernel = config.kernel;
  request.append = config.append;
  request.initrds = config.initrds;
  const auto state =
      config.kernel.empty() ? load_from_disk(config, request) : machine::boot::load(request, memory_);
  protocol_ = state.protocol;
  state.apply(*vcpus_[0]);
}

}  // namespace lodge::vm
