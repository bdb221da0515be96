#include "vm/machine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <system_error>

#include "base/error.hpp"
#include "device/pci/root.hpp"
#include "device/watchdog.hpp"
#include "guestfs/boot_files.hpp"
#include "machine/acpi/acpi.hpp"
#include "machine/layout.hpp"
#include "machine/smbios/smbios.hpp"

namespace lodge::vm {
namespace {

namespace layout = machine::layout;

constexpr uint32_t gsi_count = 24;

// Local vector table entries as firmware leaves them (Intel MultiProcessor Specification 1.4,
// section 3.6.2.2, "virtual wire"): the boot processor's LINT0 takes the 8259's interrupt, everyone's LINT1
// is NMI. Without 8259, LINT0 stays masked everywhere.
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
void set_up_vcpu(kvm::Vcpu& vcpu, bool takes_8259) {
  kvm_lapic_state lapic = vcpu.lapic();
  set_lvt(lapic, lapic_lvt_lint0, takes_8259 ? lvt_extint : lvt_extint | lvt_masked);
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

// What stands where a BIOS is entered after a reset, F000:FFF0: a reset of the machine. Linux restarts
// through it with reboot=bios, and on hardware-reduced machines always, because it asks EFI there and has
// none.
void install_reset_vector(machine::GuestMemory& memory, uint16_t reset_port) {
  constexpr uint64_t reset_vector = 0xffff0;
  const std::array<uint8_t, 9> code = {0xba,
                                       static_cast<uint8_t>(reset_port),
                                       static_cast<uint8_t>(reset_port >> 8),  // mov dx, port
                                       0xb0,
                                       layout::reset_value,  // mov al, value
                                       0xee,                 // out dx, al
                                       0xf4,                 // hlt
                                       0xeb,
                                       0xfd};  // jmp to the hlt
  memory.write(reset_vector, code);
}

}  // namespace

Machine::Machine(const VmConfig& config, kvm::System& system, Clock& clock, Backends& backends,
                 machine::Power& power)
    : backends_(backends),
      clock_(clock),
      power_(power),
      vm_(system.create_vm()),
      memory_(config.memory, config.memory_options, config.memory_progress) {
  memory_.attach(*vm_, 0);
  create_interrupt_inputs();
  chipset_ = create_chipset(config, {*vm_, memory_, ports_, mmio_, clock, power,
                                     [this](unsigned gsi) -> machine::Interrupt& { return interrupt(gsi); }});
  create_serial_ports(clock);
  create_optional_devices(config);
  create_vcpus(config, system);
  describe(config);
  load_kernel(config);
  // From here on the user's bytes may flow.
  for (size_t i = 0; i < serial_.size(); i++) backends_.serial(i).connect(*serial_[i]);
}

Machine::~Machine() {
  for (size_t i = 0; i < backends_.serial_ports(); i++) backends_.serial(i).disconnect();
}

void Machine::create_interrupt_inputs() {
  vm_->set_tss_addr(layout::tss_base);
  vm_->set_identity_map_addr(layout::identity_map_base);
  for (uint32_t gsi = 0; gsi < gsi_count; gsi++)
    inputs_.push_back(std::make_unique<InterruptInput>(*vm_, gsi));
}

void Machine::mount(machine::Bus& bus, uint64_t base, uint64_t size, machine::RegisterWindow& window,
                    const char* owner) {
  mounted_.emplace_back(bus, base, size, window, owner);
}

void Machine::create_serial_ports(Clock& clock) {
  for (size_t i = 0; i < backends_.serial_ports(); i++) {
    serial_.push_back(
        std::make_unique<device::Serial>(clock, interrupt(layout::serial_irqs[i]), backends_.serial(i)));
    mount(ports_, layout::serial_ports[i], device::Serial::window_size, *serial_[i], "serial port");
  }
}

device::DeviceContext Machine::device_context(unsigned cpus, bool running) {
  return {
      .ports = ports_,
      .memory = mmio_,
      .ram = memory_,
      .clock = clock_,
      .power = power_,
      .line = [this](unsigned gsi) -> machine::Interrupt& { return interrupt(gsi); },
      .open_backend = [this](const std::string& specification, const std::string& option, bool input)
          -> std::shared_ptr<device::CharBackend> { return backends_.open(specification, option, input); },
      .open_disk = [this](const std::string& path,
                          const block::OpenOptions& options) { return backends_.open_disk(path, options); },
      .open_network = [this](const net::Config& network) { return backends_.open_network(network); },
      .pci = chipset_->pci(),
      .virtio_mmio = chipset_->virtio_mmio(),
      .msi = platform_,
      .doorbells = platform_,
      .loop = loop_,
      .cpus = cpus,
      .running = running};
}

void Machine::create_optional_devices(const VmConfig& config) {
  const auto context = device_context(config.cpus, false);
  for (const bool first : {true, false})
    for (const auto& device : config.devices)
      if (device::created_first(device.name) == first)
        optional_.push_back(
            {device, device::create_device(context, device.name, device.options, device.spelling)});
  chipset_->devices_are_in();
}

namespace {

// In kHz; 0 on a host whose TSC has none that holds.
uint32_t tsc_frequency(kvm::Vcpu& vcpu, const kvm::Vm& vm) {
  if (vm.check_extension(KVM_CAP_GET_TSC_KHZ) <= 0) return 0;
  try {
    return vcpu.tsc_khz();
  } catch (const std::system_error&) {
    return 0;
  }
}

// As firmware does for AMD's processors: the TSC counts at the frequency of P0, or Linux complains about the
// firmware. Not to be had from every KVM (before 6.8), and nothing depends on it.
void select_tsc_frequency(kvm::Vcpu& vcpu) {
  constexpr uint32_t amd_hwcr = 0xc001'0015;
  const kvm_msr_entry hwcr{.index = amd_hwcr, .reserved = 0, .data = uint64_t{1} << 24};
  vcpu.set_msrs({&hwcr, 1});
}

}  // namespace

void Machine::create_vcpus(const VmConfig& config, kvm::System& system) {
  const int maximum = vm_->check_extension(KVM_CAP_MAX_VCPUS);
  if (maximum > 0 && config.cpus > static_cast<unsigned>(maximum)) {
    usage_error("--cpus: the {} accelerator runs at most {} CPUs in one machine", system.name(), maximum);
  }
  cpuid_ = model_cpuid(system, config.cpu);
  for (unsigned id = 0; id < config.cpus; id++) {
    auto vcpu = vm_->create_vcpu(id);
    auto cpuid = vcpu_cpuid(cpuid_, id, config.cpus);
    add_frequencies(cpuid, tsc_frequency(*vcpu, *vm_));
    vcpu->set_cpuid2(cpuid);
    select_tsc_frequency(*vcpu);
    set_up_vcpu(*vcpu, id == 0 && config.machine == MachineType::pc);
    vcpus_.push_back(std::move(vcpu));
  }
}

std::vector<Machine::NamedDisk> Machine::disks() {
  std::vector<NamedDisk> found;
  unsigned nameless = 0;
  for (const auto& [device, mounted] : optional_)
    if (device::Disk* disk = mounted->disk())
      found.push_back({disk->name().empty() ? fmt::format("disk{}", nameless++) : disk->name(), disk});
  return found;
}

device::Disk* Machine::disk(std::string_view name) noexcept {
  for (const NamedDisk& found : disks())
    if (found.name == name) return found.disk;
  return nullptr;
}

// --- Devices that come and go

void Machine::on_release(const std::function<void()>& released) {
  if (!chipset_->pci()) return;
  for (device::pci::RootPort* port : chipset_->pci()->ports()) port->on_release(released);
}

std::vector<Machine::Slot> Machine::slots() {
  std::vector<Slot> found;
  if (!chipset_->pci()) return found;
  for (const device::pci::RootPort* port : chipset_->pci()->ports()) {
    Slot slot{port->id(), nullptr, nullptr, port->leaving()};
    const auto in_it = std::ranges::find_if(optional_, [&](const Optional& each) {
      const auto bus = each.config.options.find("bus");
      return bus != each.config.options.end() && bus->second == slot.port;
    });
    // One that the guest has let go is as good as gone.
    if (in_it != optional_.end() && port->occupied())
      slot.device = &in_it->config, slot.mounted = in_it->mounted.get();
    found.push_back(std::move(slot));
  }
  return found;
}

void Machine::plug(const DeviceConfig& device) {
  try {
    optional_.push_back({device, device::create_device(device_context(cpus(), true), device.name,
                                                       device.options, device.spelling)});
  } catch (...) {
    backends_.close_unused();  // what it had opened before it failed
    throw;
  }
}

bool Machine::ask_to_let_go(std::string_view port) noexcept {
  auto* const found = chipset_->pci() ? chipset_->pci()->port(port) : nullptr;
  return found && found->ask_to_let_go();
}

void Machine::pull_leaving() noexcept {
  if (!chipset_->pci()) return;
  for (device::pci::RootPort* port : chipset_->pci()->ports())
    if (port->leaving()) port->unplug(false);
}

std::vector<DeviceConfig> Machine::take_released() {
  std::vector<DeviceConfig> gone;
  std::erase_if(optional_, [&](Optional& each) {
    const auto bus = each.config.options.find("bus");
    if (bus == each.config.options.end() || bus->second.empty()) return false;
    const auto* port = chipset_->pci()->port(bus->second);
    if (!port || port->occupied()) return false;
    gone.push_back(std::move(each.config));
    return true;
  });
  if (!gone.empty()) backends_.close_unused();
  return gone;
}

// The tables in which a guest reads what the machine is made of.
void Machine::describe(const VmConfig& config) {
  machine::acpi::Config acpi;
  acpi.cpus = config.cpus;
  acpi.serial_ports = static_cast<unsigned>(serial_.size());
  chipset_->describe(acpi);
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
  install_reset_vector(memory_, chipset_->reset_port());
}

// A kernel that the guest has installed counts from the next reset on: the disk is read as it is now.
machine::boot::BootState Machine::load_from_disk(const VmConfig& config, machine::boot::Request request) {
  const auto files =
      guestfs::find_boot_files(backends_.disk(config.boot_disk), config.boot_disk, memory_.size());
  if (config.seed && !files.cloud_init) {
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
