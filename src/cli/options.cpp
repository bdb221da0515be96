#include "cli/options.hpp"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <charconv>

#include "base/error.hpp"
#include "cli/version.hpp"
#include "device/table.hpp"
#include "net/user.hpp"
#include "vm/control/socket.hpp"
#include "vm/ending.hpp"

namespace lodge::cli {
namespace detail {
namespace {

constexpr const char* footer = R"(
Examples:
  lodge run debian.qcow2
  lodge run --snapshot --memory 1G --forward 2222:22 debian.qcow2
  lodge run --hostname web --ssh-key ~/.ssh/id_ed25519.pub --run "apt-get update" cloud.qcow2
  lodge run --kernel vmlinuz --initrd initramfs --append console=ttyS0
  lodge run --kernel vmlinuz --cpus 2 --memory 1G --accel soft --cpu x86-64-v3
  lodge run --machine micro --kernel vmlinuz --initrd initramfs --append "console=ttyS0 quiet"
  lodge run --kernel vmlinuz --append root=/dev/vda --disk debian.qcow2,snapshot
  lodge run --kernel vmlinuz --initrd initramfs --net user --forward 2222:22
  lodge run --kernel vmlinuz --initrd initramfs --share /home/me/src:src,readonly
  lodge run --kernel vmlinuz --initrd initramfs --vsock cid=3,path=/tmp/vm.sock
  lodge run --kernel vmlinuz --append root=/dev/vda --disk server.qcow2 --watchdog reset
  lodge run --kernel vmlinuz --initrd initramfs --net tap,ifname=tap0 --net stream,listen=/tmp/cable
  lodge run --kernel test.elf --serial file:out.txt --device isa-debug-exit,port=0xf4
  lodge image build --output debian.qcow2
  lodge image create disk.qcow2 20G
  lodge run --kernel vmlinuz --name web --serial null &   lodge ctl web status
  lodge kvm -- qemu-system-x86_64 -accel kvm -m 1G disk.img
  lodge doctor
  source <(lodge completion bash)
)";

std::string run_footer() {
  std::string text = "\nDevices (--device NAME,KEY=VALUE,...):\n";
  for (const auto& device : device::device_table()) {
    text += fmt::format("  {:<16} {}\n", device.name, device.help);
    for (const auto& option : device.options) {
      text += fmt::format("    {:<14} {} (default {})\n", option.name, option.help, option.fallback);
    }
  }
  text +=
      "\nKeys while the terminal belongs to the guest:\n"
      "  Ctrl-A X  end the machine      Ctrl-A B  press its power button\n"
      "  Ctrl-A R  reset it             Ctrl-A A  send Ctrl-A\n"
      "  Ctrl-A H  help\n"
      "\nSignals: SIGTERM and SIGINT press the power button; a second one, or 10 s, ends the machine.\n"
      "\nExit status:\n";
  for (const auto& [status, meaning] : vm::exit_statuses())
    text += fmt::format("  {:>3}  {}\n", status, meaning);
  return text + footer;
}

void describe_memory(CLI::App& run, RawOptions& raw) {
  run.add_flag(
      "--no-balloon", raw.no_balloon,
      "without the balloon that every machine has: memory which the guest frees stays with the process");
  run.add_flag("--ksm", raw.ksm, "the host's kernel merges equal pages of this and other machines (KSM)");
  run.add_option("--transparent-hugepages", raw.transparent_huge_pages,
                 "auto, on or off: the kernel may use huge pages for RAM where its own settings permit")
      ->type_name("MODE")
      ->capture_default_str();
  run.add_option("--hugepages", raw.huge_pages,
                 "RAM in explicit huge pages of 2M or 1G, from the host's pool")
      ->type_name("SIZE");
  run.add_flag("--preallocate", raw.preallocate, "take all RAM from the host before the guest starts");
  run.add_option("--numa-node", raw.numa_node, "take RAM from this memory node alone")->type_name("N");
  run.add_flag("--memory-lock", raw.memory_lock, "RAM that is touched is never swapped out");
}

void describe_control(CLI::App& app, RawOptions& raw) {
  auto* ctl = app.add_subcommand("ctl", "Ask or steer a running machine");
  ctl->add_option("machine", raw.ctl.machine, "its --name, or the path of its control socket")->required();
  ctl->add_option("command", raw.ctl.command, "see below")->required();
  ctl->add_option("arguments", raw.ctl.arguments, "of the command");
  ctl->add_flag("--json", raw.ctl.json, "print the machine's answer as one line of JSON");
  ctl->footer(ctl_commands_help() + "\nExample:\n  lodge ctl web balloon 256M\n");

  auto* list = app.add_subcommand("list", "List the machines that run with a name");
  list->add_flag("--json", raw.list.json, "print them as one line of JSON");
}

void describe_kvm(CLI::App& app, KvmCommand& raw) {
  auto* kvm = app.add_subcommand("kvm", "Run a program that needs /dev/kvm on the soft accelerator");
  kvm->add_option("program", raw.program, "the program and its arguments, behind --")->required();
  kvm->add_flag("--check", raw.check, "only say whether it can work");
  kvm->add_option("--engine", raw.engine, "translate, interpret or lockstep (both, one CPU)")
      ->type_name("NAME")
      ->capture_default_str();
  kvm->add_option("--code-cache", raw.code_cache_text, "host code that the CPUs may hold, at most")
      ->type_name("SIZE")
      ->capture_default_str();
  kvm->add_flag("--trace", raw.trace, "name on stderr what the accelerator refuses");
  kvm->footer("\nExample:\n  lodge kvm -- qemu-system-x86_64 -accel kvm -m 1G -nographic disk.img\n");
}

}  // namespace

std::unique_ptr<CLI::App> describe_command_line(RawOptions& raw) {
  auto app =
      std::make_unique<CLI::App>("Lodge runs x86-64 virtual machines, with or without /dev/kvm.", "lodge");
  app->set_version_flag("--version", std::string("lodge ") + version);
  app->require_subcommand(1);
  app->footer(footer);
  app->get_formatter()->column_width(34);

  auto* run = app->add_subcommand("run", "Run a virtual machine");
  run->add_option(
         "disk", raw.boot_disk,
         "boot the Linux on this disk image: FILE, with options as --disk has them; it gets a console, "
         "network, entropy and a balloon")
      ->type_name("DISK");
  run->add_flag("--snapshot", raw.snapshot, "throw changes to the booted disk away at the end");
  run->add_option("--kernel", raw.kernel, "Linux bzImage, ELF vmlinux (PVH) or multiboot kernel")
      ->type_name("FILE");
  run->add_option("--initrd", raw.initrds,
                  "initial RAM disk, or multiboot module with arguments (repeatable)")
      ->type_name("FILE")
      ->allow_extra_args(false);
  run->add_option("--append", raw.append, "the kernel's command line")->type_name("TEXT");
  run->add_option("--cpus", raw.cpus, "number of processors")->type_name("N")->capture_default_str();
  run->add_option("--memory", raw.memory, "RAM: 512M, 2G...")->type_name("SIZE")->capture_default_str();
  run->add_option("--machine", raw.machine,
                  "pc, or micro: no PCI and no legacy beyond a serial port, for the fastest start")
      ->type_name("NAME")
      ->capture_default_str();
  describe_memory(*run, raw);
  run->add_option("--accel", raw.accel, "auto, kvm or soft (see lodge doctor)")
      ->type_name("NAME")
      ->capture_default_str();
  run->add_option("--engine", raw.engine, "of the soft accelerator: translate, interpret or lockstep (both)")
      ->type_name("NAME")
      ->capture_default_str();
  run->add_option("--code-cache", raw.code_cache,
                  "of the soft accelerator: host code that its CPUs may hold, at most")
      ->type_name("SIZE")
      ->capture_default_str();
  run->add_option("--cpu", raw.cpu, "processor model: host or x86-64-v1 to -v4")
      ->type_name("MODEL")
      ->capture_default_str();
  run->add_option("--serial", raw.serial, "a serial port: stdio, file:PATH, pty or null; up to 4 times")
      ->type_name("WHERE")
      ->allow_extra_args(false);
  run->add_option(
         "--net", raw.networks,
         "a network card: user[,...], tap,ifname=NAME[,queues=N] or stream,listen=ADDRESS or "
         "connect=ADDRESS; each also with mac=, mtu=, pcap=FILE, rate=SIZE; or none; repeatable (default: "
         "none, with a DISK user)")
      ->type_name("NETWORK")
      ->allow_extra_args(false);
  run->add_option(
         "--forward", raw.forwards,
         "a port of the host that leads into the guest: [udp:][ADDRESS:]HOST:GUEST; implies --net user; "
         "repeatable")
      ->type_name("PORTS")
      ->allow_extra_args(false);
  run->add_option(
         "--disk", raw.disks,
         "a disk: "
         "FILE[,readonly][,snapshot][,format=raw|qcow2][,serial=TEXT][,queues=N][,iops=N][,bps=SIZE]; "
         "a comma in FILE is written twice; repeatable")
      ->type_name("DISK")
      ->allow_extra_args(false);
  run->add_option(
         "--console", raw.console,
         "a virtio console (Linux: console=hvc0): stdio, file:PATH, pty or null; without --serial the "
         "serial port is nobody's then")
      ->type_name("WHERE");
  run->add_option("--share", raw.shares,
                  "a folder for the guest (Linux: mount -t virtiofs TAG DIRECTORY): "
                  "PATH:TAG[,readonly][,owner=UID:GID]; a comma in PATH is written twice; repeatable")
      ->type_name("FOLDER")
      ->allow_extra_args(false);
  run->add_option(
         "--vsock", raw.vsock,
         "sockets between guest and host: [cid=N,]path=SOCKET; on the host, connect to SOCKET and write "
         "CONNECT PORT, or listen at SOCKET_PORT")
      ->type_name("SOCKET");
  run->add_option(
         "--watchdog", raw.watchdog,
         "a watchdog (Linux: module wdat_wdt, /dev/watchdog0) and what it does when the guest hangs: reset, "
         "poweroff or none")
      ->type_name("ACTION");
  run->add_option(
         "--hotplug", raw.hotplug,
         "slots for devices that come and go while the guest runs (lodge ctl NAME add-disk), up to 8")
      ->type_name("N")
      ->capture_default_str();
  describe_seed(*run, raw.seed);
  run->add_option("--name", raw.name,
                  "the machine's name, as ps shows it; gives it a control socket (lodge ctl NAME)")
      ->type_name("NAME")
      ->capture_default_str();
  run->add_option("--control", raw.control, "a control socket at PATH (lodge ctl PATH)")->type_name("PATH");
  run->add_flag("--no-reboot", raw.no_reboot, "end when the guest resets the machine");
  run->add_option("--device", raw.devices, "add a device: NAME,KEY=VALUE,...")
      ->type_name("DEVICE")
      ->allow_extra_args(false);
  run->add_flag("--perf-map", raw.perf_map,
                "of the soft accelerator: name translated code for perf (/tmp/perf-PID.map)");
  run->add_flag("--stats", raw.stats, "print times and what was counted to stderr at the end");
  run->add_flag("--json", raw.run_json, "print them as one line of JSON");
  run->footer(run_footer());

  auto* doctor = app->add_subcommand("doctor", "Report what this host offers and which accelerator fits");
  doctor->add_flag("--json", raw.doctor_json, "print the report as JSON");

  describe_image(*app, raw.image);
  describe_control(*app, raw);
  describe_kvm(*app, raw.kvm);

  auto* completion = app->add_subcommand("completion", "Print a shell's completion script");
  completion->add_option("shell", raw.shell, "bash, zsh or fish")->required();
  return app;
}

Values values_of(const std::string& option) {
  if (option == "disk" || option == "--kernel" || option == "--initrd" || option == "--disk" ||
      option == "--share")
    return {{}, true};
  if (option == "--hugepages") return {{"2M", "1G"}, false};
  if (option == "--transparent-hugepages") return {{"auto", "on", "off"}, false};
  if (option == "program") return {{}, true};
  if (option == "command") return {ctl_command_names(), false};
  if (option == "--control") return {{}, true};
  if (option == "--accel") return {{"auto", "kvm", "soft"}, false};
  if (option == "--machine") return {{"pc", "micro"}, false};
  if (option == "--engine") return {{"translate", "interpret", "lockstep"}, false};
  if (option == "--distribution") return {{"debian"}, false};
  if (option == "--ssh-key" || option == "--output" || option == "--user-data") return {{}, true};
  if (option == "file" || option == "--backing" || option == "--data-file") return {{}, true};
  if (option == "--format" || option == "--source-format" || option == "--backing-format")
    return {{"raw", "qcow2"}, false};
  if (option == "--repair") return {{"leaks", "all"}, false};
  if (option == "--compression") return {{"zlib", "zstd"}, false};
  if (option == "--preallocation") return {{"off", "full"}, false};
  if (option == "--serial" || option == "--console") return {{"stdio", "file:", "pty", "null"}, false};
  if (option == "--watchdog") return {{"reset", "poweroff", "none"}, false};
  if (option == "--net") return {{"user", "tap,ifname=", "stream,listen=", "stream,connect=", "none"}, false};
  if (option == "--cpu") return {{vm::cpu_models().begin(), vm::cpu_models().end()}, false};
  if (option == "shell") return {{"bash", "zsh", "fish"}, false};
  if (option == "--device") {
    Values values;
    for (const auto& device : device::device_table()) values.words.emplace_back(device.name);
    return values;
  }
  return {};
}

}  // namespace detail

namespace {

// The disk comes first, so that it is vda; then what an installed system expects of a machine.
void add_boot_disk(const detail::RawOptions& raw, vm::VmConfig& config) {
  auto disk = vm::parse_disk("DISK", raw.boot_disk);
  if (raw.snapshot) disk.options["snapshot"] = "on";
  config.boot_disk = disk.options["file"];
  config.devices.push_back(std::move(disk));
  const bool given = std::ranges::any_of(raw.devices, [](const std::string& text) {
    return vm::parse_device("--device", text).name == "virtio-rng";
  });
  if (!given) config.devices.push_back({"virtio-rng", {}});
}

std::optional<unsigned> number(std::string_view text) {
  unsigned value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

machine::MemoryOptions understand_memory(const detail::RawOptions& raw) {
  machine::MemoryOptions options;
  options.mergeable = raw.ksm;
  options.transparent_huge_pages =
      vm::parse_transparent("--transparent-hugepages", raw.transparent_huge_pages);
  if (!raw.huge_pages.empty()) options.huge_page_size = vm::parse_huge_pages("--hugepages", raw.huge_pages);
  options.preallocate = raw.preallocate;
  options.lock = raw.memory_lock;
  if (raw.numa_node) {
    options.numa_node = number(*raw.numa_node);
    if (!options.numa_node)
      usage_error("--numa-node: '{}' is not the number of a memory node; give 0, 1...", *raw.numa_node);
  }
  return options;
}

// Behind all other devices, so that it takes none of their places.
void add_balloon(vm::VmConfig& config) {
  if (std::ranges::find(config.devices, "virtio-balloon", &vm::DeviceConfig::name) == config.devices.end())
    config.devices.push_back({"virtio-balloon", {}});
}

// Ports in the last places of the bus, so that they take none of those that other devices get.
void add_slots(const std::string& text, vm::VmConfig& config) {
  constexpr unsigned most = 8, last_place = 0x1e;
  const auto given = number(text);
  if (!given) usage_error("--hotplug: '{}' is not a number of slots from 0 to {}", text, most);
  const unsigned count = *given;
  if (count > most) usage_error("--hotplug: {} are more than the {} that a machine can have", count, most);
  if (count != 0 && config.machine == vm::MachineType::micro)
    usage_error("--hotplug: --machine micro has no PCI; take --machine pc");
  for (unsigned i = 0; i < count; i++)
    config.devices.push_back(
        {"pcie-root-port",
         {{"id", fmt::format("hotplug{}", i + 1)}, {"slot", fmt::format("{:#x}", last_place - i)}}});
}

// Forwards belong to the first user-mode network, which they imply.
void add_networks(const detail::RawOptions& raw, vm::VmConfig& config) {
  std::vector<vm::DeviceConfig> cards;
  if (std::ranges::find(raw.networks, "none") != raw.networks.end()) {
    if (raw.networks.size() > 1) usage_error("--net: 'none' and a network exclude each other; leave one out");
    if (!raw.forwards.empty())
      usage_error("--forward: a port leads into the guest through --net user; leave --net none out");
  }
  if (raw.networks.empty() && !raw.boot_disk.empty()) cards.push_back(vm::parse_network("--net", "user"));
  for (const auto& text : raw.networks)
    if (text != "none") cards.push_back(vm::parse_network("--net", text));
  if (!raw.forwards.empty()) {
    for (const auto& text : raw.forwards) net::parse_forward("--forward", text);
    const auto is_user = [](const vm::DeviceConfig& card) { return card.options.at("net") == "user"; };
    auto user = std::ranges::find_if(cards, is_user);
    if (user == cards.end())
      user = cards.insert(cards.end(), {"virtio-net", {{"net", "user"}}, {"--forward", {"net"}}});
    auto& forward = user->options["forward"];
    if (!forward.empty()) forward += "+";
    forward += fmt::format("{}", fmt::join(raw.forwards, "+"));
  }
  std::ranges::move(cards, std::back_inserter(config.devices));
}

RunCommand understand_run(const detail::RawOptions& raw) {
  RunCommand command;
  auto& config = command.config;
  config.kernel = raw.kernel;
  config.initrds = raw.initrds;
  config.append = raw.append;
  config.name = raw.name;
  config.cpu = raw.cpu;
  config.reboot = !raw.no_reboot;
  config.cpus = vm::parse_cpus("--cpus", raw.cpus);
  config.memory = vm::parse_size("--memory", raw.memory);
  config.machine = vm::parse_machine("--machine", raw.machine);
  config.memory_options = understand_memory(raw);
  config.accelerator = vm::parse_accelerator("--accel", raw.accel);
  config.soft.engine = vm::parse_engine("--engine", raw.engine);
  config.soft.code_cache = vm::parse_code_cache("--code-cache", raw.code_cache);
  if (!raw.serial.empty()) {
    config.serial.clear();
    for (const auto& text : raw.serial) config.serial.push_back(vm::parse_serial("--serial", text));
  }
  std::string console = raw.console;
  if (raw.boot_disk.empty()) {
    if (raw.snapshot) usage_error("--snapshot: is for the disk that is booted; give --disk FILE,snapshot");
  } else {
    add_boot_disk(raw, config);
    if (console.empty() && raw.serial.empty()) console = "stdio";
  }
  if (!console.empty()) {
    vm::parse_serial("--console", console);
    if (raw.serial.empty()) config.serial = {{vm::SerialConfig::Kind::null, {}}};
    config.devices.push_back({"virtio-console", {{"console", console}}, {"--console", {"console"}}});
  }
  add_networks(raw, config);
  for (const auto& text : raw.disks) config.devices.push_back(vm::parse_disk("--disk", text));
  add_seed(raw.seed, config);
  for (const auto& text : raw.shares) config.devices.push_back(vm::parse_share("--share", text));
  if (!raw.vsock.empty()) {
    config.devices.push_back(vm::parse_device("--vsock", "virtio-vsock," + raw.vsock));
    config.devices.back().spelling.option = "--vsock";
  }
  if (!raw.watchdog.empty())
    config.devices.push_back(
        {"watchdog", {{"action", raw.watchdog}}, {"--watchdog " + raw.watchdog, {"action"}}});
  for (const auto& text : raw.devices) config.devices.push_back(vm::parse_device("--device", text));
  add_slots(raw.hotplug, config);
  if (!raw.no_balloon) add_balloon(config);
  command.control = raw.control;
  command.stats = raw.stats || raw.run_json;
  config.soft.count = command.stats;
  config.soft.perf_map = raw.perf_map;
  command.json = raw.run_json;
  return command;
}

KvmCommand understand_kvm(KvmCommand command) {
  vm::parse_engine("--engine", command.engine);
  command.code_cache = vm::parse_code_cache("--code-cache", command.code_cache_text);
  return command;
}

// The subcommand that was named, or else the program: whose help is meant.
const CLI::App* innermost(const CLI::App& app) {
  const auto chosen = app.get_subcommands();
  return chosen.empty() ? &app : innermost(*chosen.front());
}

// "lodge image create": how one gets to a subcommand.
std::string words_to(const CLI::App& app) {
  return app.get_parent() ? words_to(*app.get_parent()) + " " + app.get_name() : app.get_name();
}

// The word at `at` must be one of the group's commands, and so on for groups in it.
void refuse_unknown_command(const CLI::App& group, std::span<const char* const> arguments, size_t at) {
  const auto known = group.get_subcommands([](const CLI::App*) { return true; });
  if (known.empty() || arguments.size() <= at || arguments[at][0] == '-') return;
  const std::string word = arguments[at];
  std::string names;
  for (const auto* sub : known) {
    if (sub->check_name(word)) return refuse_unknown_command(*sub, arguments, at + 1);
    names += (names.empty() ? "" : sub == known.back() ? " and " : ", ") + sub->get_name();
  }
  const std::string path = words_to(group).substr(5);  // without "lodge"
  usage_error("unknown command '{}{}'; there are {}, see '{} --help'",
              path.empty() ? "" : path.substr(1) + " ", word, names, words_to(group));
}

}  // namespace

Command parse_command_line(std::span<const char* const> arguments) {
  detail::RawOptions raw;
  const auto app = detail::describe_command_line(raw);
  refuse_unknown_command(*app, arguments, 1);
  // CLI11 takes the words in reverse order and without the program's name.
  std::vector<std::string> words(arguments.begin() + 1, arguments.end());
  std::ranges::reverse(words);
  try {
    app->parse(std::move(words));
  } catch (const CLI::CallForVersion& call) {
    return PrintCommand{std::string(call.what()) + "\n"};
  } catch (const CLI::CallForHelp&) {
    const auto* meant = innermost(*app);
    return PrintCommand{meant->help(meant == app.get() ? "" : words_to(*meant->get_parent()))};
  } catch (const CLI::ParseError& error) {
    const auto* meant = innermost(*app);
    std::string text = error.what();
    std::ranges::replace(text, '\n', ' ');
    usage_error("{}; see '{} --help'", text, words_to(*meant));
  }
  if (app->got_subcommand("run")) {
    RunCommand run = understand_run(raw);
    if (run.control.empty() && app->get_subcommand("run")->count("--name") > 0)
      run.control = vm::control::socket_path(run.config.name);
    return run;
  }
  if (app->got_subcommand("ctl")) return raw.ctl;
  if (app->got_subcommand("kvm")) return understand_kvm(raw.kvm);
  if (app->got_subcommand("list")) return raw.list;
  if (app->got_subcommand("image")) return understand_image(innermost(*app)->get_name(), raw.image);
  if (app->got_subcommand("doctor")) return DoctorCommand{raw.doctor_json};
  return CompletionCommand{raw.shell};
}

}  // namespace lodge::cli
