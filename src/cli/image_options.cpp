#include "cli/image_options.hpp"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <bit>
#include <charconv>

#include "base/error.hpp"

namespace lodge::cli {
namespace detail {
namespace {

constexpr const char *default_cluster_size = "64K", *default_refcount_bits = "16", *default_version = "3",
                     *default_compression = "zlib";

constexpr const char* sizes_help =
    "\nSizes are bytes, or numbers with K, M, G or T.\n"
    "Exit status: 0 done, 1 check has found damage, 2 wrong usage or an image that cannot be used, 12 an "
    "error "
    "of the host, 3 check has found leaked clusters only.\n";

CLI::App* add(CLI::App& group, RawImageOptions& raw, const char* name, const char* help, const char* file) {
  auto* command = group.add_subcommand(name, help);
  command->add_option("file", raw.file, file)->required()->type_name("FILE");
  command->add_flag("--json", raw.json, "print the result as JSON");
  return command;
}

void add_format(CLI::App& command, RawImageOptions& raw, const char* help) {
  command.add_option("--format", raw.format, help)->type_name("FORMAT");
}

void add_layout(CLI::App& command, RawImageOptions& raw) {
  const auto value = [&](const char* name, std::optional<std::string>& text, const char* help,
                         const char* type, const char* fallback) {
    command.add_option(name, text, help)->type_name(type)->default_str(fallback);
  };
  command.add_option("--backing", raw.backing, "start with this image's contents and keep only changes")
      ->type_name("FILE");
  command.add_option("--backing-format", raw.backing_format, "the backing file's format: raw or qcow2")
      ->type_name("FORMAT");
  value("--cluster-size", raw.cluster_size, "qcow2: unit of allocation, 512 to 2M", "SIZE",
        default_cluster_size);
  value("--compression", raw.compression, "qcow2: of compressed clusters, zlib or zstd", "METHOD",
        default_compression);
  value("--refcount-bits", raw.refcount_bits, "qcow2: width of reference counts, 1 to 64", "N",
        default_refcount_bits);
  value("--qcow2-version", raw.version, "qcow2: 2 or 3", "N", default_version);
  command.add_option("--data-file", raw.data_file, "qcow2: keep the data in this file of its own")
      ->type_name("FILE");
  command.add_flag("--raw-data", raw.raw_data, "qcow2: the data file is a raw image at any time");
  command.add_flag("--lazy-refcounts", raw.lazy_refcounts, "qcow2: write reference counts at the end only");
  command.add_flag("--subclusters", raw.subclusters, "qcow2: allocate in 32nds of a cluster");
}

void add_progress(CLI::App& command, RawImageOptions& raw) {
  command.add_flag("--progress", raw.progress, "show progress also where stderr is no terminal");
}

void describe_create(CLI::App& group, RawImageOptions& raw) {
  auto* create = add(group, raw, "create", "Make a new, empty image", "the image; must not exist");
  create->add_option("size", raw.size, "of the disk; with --backing: that file's, if not given")
      ->type_name("SIZE");
  add_format(*create, raw, "qcow2 or raw (default: qcow2)");
  add_layout(*create, raw);
  create->add_option("--preallocation", raw.preallocation, "of space on the host: off or full (raw images)")
      ->type_name("MODE")
      ->capture_default_str();
  create->footer(std::string(sizes_help) +
                 "\nExamples:\n"
                 "  lodge image create disk.qcow2 20G\n"
                 "  lodge image create --backing base.qcow2 overlay.qcow2\n"
                 "  lodge image create --format raw --preallocation full disk.raw 8G\n");
}

void describe_info(CLI::App& group, RawImageOptions& raw) {
  auto* info = add(group, raw, "info", "Tell what an image is", "the image");
  add_format(*info, raw, "raw or qcow2 (default: by contents)");
  info->add_flag("--chain", raw.chain, "also all backing files behind it");
  info->footer("\nExample:\n  lodge image info --chain --json disk.qcow2\n");
}

void describe_check(CLI::App& group, RawImageOptions& raw) {
  auto* check = add(group, raw, "check", "Look for damage in a qcow2 image", "the image");
  check->add_option("--repair", raw.repair, "leaks: give lost space back; all: also mend damage")
      ->type_name("WHAT");
  add_progress(*check, raw);
  check->footer(std::string(sizes_help) + "\nExample:\n  lodge image check --repair leaks disk.qcow2\n");
}

void describe_convert(CLI::App& group, RawImageOptions& raw) {
  auto* convert = add(group, raw, "convert", "Copy an image into another format", "the image to copy");
  convert->add_option("target", raw.target, "the copy; must not exist")->required()->type_name("TARGET");
  convert->add_option("--source-format", raw.source_format, "raw or qcow2 (default: by contents)")
      ->type_name("FORMAT");
  add_format(*convert, raw, "of the copy: qcow2 or raw (default: qcow2)");
  convert->add_flag("--compress", raw.compress, "qcow2: compress the copy's contents");
  add_layout(*convert, raw);
  add_progress(*convert, raw);
  convert->footer(
      "\nExamples:\n"
      "  lodge image convert debian.raw debian.qcow2\n"
      "  lodge image convert --compress --compression zstd disk.qcow2 small.qcow2\n"
      "  lodge image convert --format raw disk.qcow2 disk.raw\n");
}

void describe_resize(CLI::App& group, RawImageOptions& raw) {
  auto* resize = add(group, raw, "resize", "Change the size of a disk", "the image");
  resize->add_option("size", raw.size, "the new size, or +SIZE or -SIZE")->required()->type_name("SIZE");
  add_format(*resize, raw, "raw or qcow2 (default: by contents)");
  resize->add_flag("--shrink", raw.shrink, "allow it to become smaller: what lies behind the end is lost");
  resize->footer(std::string(sizes_help) + "\nExample:\n  lodge image resize disk.qcow2 +10G\n");
}

void describe_snapshot(CLI::App& group, RawImageOptions& raw) {
  auto* snapshot = add(group, raw, "snapshot", "Snapshots inside a qcow2 image", "the image");
  snapshot->add_flag("--list", raw.list, "list them (what happens when nothing else is asked for)");
  snapshot->add_option("--create", raw.create_name, "keep the contents of now under this name")
      ->type_name("NAME");
  snapshot->add_option("--apply", raw.apply_name, "go back to these contents; those of now are lost")
      ->type_name("NAME");
  snapshot->add_option("--delete", raw.delete_name, "forget it")->type_name("NAME");
  snapshot->footer(
      "\nExamples:\n"
      "  lodge image snapshot disk.qcow2 --create before-upgrade\n"
      "  lodge image snapshot disk.qcow2 --apply before-upgrade\n");
}

void describe_rebase(CLI::App& group, RawImageOptions& raw) {
  auto* rebase = add(group, raw, "rebase", "Put another backing file under a qcow2 image", "the image");
  rebase->add_option("--backing", raw.backing, "the new backing file")->type_name("FILE");
  rebase->add_option("--backing-format", raw.backing_format, "its format: raw or qcow2")->type_name("FORMAT");
  rebase->add_flag("--no-backing", raw.no_backing, "make the image stand alone");
  rebase->add_flag("--unsafe", raw.unsafe, "only change the name: for a file that was moved or is the same");
  add_progress(*rebase, raw);
  rebase->footer(
      "\nContents stay the same: what the new backing file does not show is copied into the image first.\n"
      "\nExamples:\n"
      "  lodge image rebase --backing base-2.qcow2 overlay.qcow2\n"
      "  lodge image rebase --no-backing overlay.qcow2\n");
}

void describe_build(CLI::App& group, RawImageOptions& raw) {
  auto* build = group.add_subcommand("build", "Make a disk with an installed Debian, without root");
  const auto value = [&](const char* name, std::string& text, const char* help, const char* type) {
    return build->add_option(name, text, help)->type_name(type);
  };
  value("--output", raw.file, "the image; must not exist", "FILE")->required();
  value("--distribution", raw.distribution, "debian", "NAME")->capture_default_str();
  value("--suite", raw.suite, "the release: bookworm, trixie, sid...", "NAME")->capture_default_str();
  value("--size", raw.build_size, "of the disk; the image has only what is used", "SIZE")
      ->capture_default_str();
  build->add_option("--package", raw.packages, "another package; repeatable")
      ->type_name("NAME")
      ->allow_extra_args(false);
  value("--hostname", raw.hostname, "the machine's name", "NAME")->capture_default_str();
  value("--ssh-key", raw.ssh_key, "who may log in as root by SSH: a public key, or a file with keys", "KEY");
  value("--password", raw.password,
        "of root on the console (without: logged in there unasked, and nowhere else)", "TEXT");
  value("--mirror", raw.mirror, "of Debian's archive (default: deb.debian.org)", "URL");
  add_format(*build, raw, "qcow2 or raw (default: qcow2)");
  build->add_flag("--verbose", raw.verbose, "show what the tools print");
  build->add_flag("--json", raw.json, "print the result as JSON");
  add_progress(*build, raw);
  build->footer(
      "\nNeeds the Debian packages mmdebstrap, e2fsprogs and, when not run by root, uidmap.\n"
      "\nExamples:\n"
      "  lodge image build --output debian.qcow2\n"
      "  lodge image build --output web.qcow2 --hostname web --package nginx --ssh-key "
      "~/.ssh/id_ed25519.pub\n"
      "  lodge run --forward 2222:22 web.qcow2\n");
}

}  // namespace

void describe_image(CLI::App& app, RawImageOptions& raw) {
  auto* image = app.add_subcommand("image", "Make, examine and change disk images");
  image->require_subcommand(1);
  image->footer(
      "\nExamples:\n"
      "  lodge image create disk.qcow2 20G\n"
      "  lodge image convert --compress debian.raw debian.qcow2\n"
      "  lodge image snapshot disk.qcow2 --create before-upgrade\n");
  describe_build(*image, raw);
  describe_create(*image, raw);
  describe_info(*image, raw);
  describe_check(*image, raw);
  describe_convert(*image, raw);
  describe_resize(*image, raw);
  describe_snapshot(*image, raw);
  describe_rebase(*image, raw);
}

}  // namespace detail

namespace {

uint64_t parse_bytes(std::string_view option, std::string_view text) {
  uint64_t value = 0, unit = 1;
  std::string_view digits = text;
  if (!text.empty()) {
    const auto suffix = std::string_view("KMGT").find(static_cast<char>(text.back() & ~0x20));
    if (text.back() > '9' && suffix != std::string_view::npos) {
      unit = uint64_t{1} << (10 * (suffix + 1));
      digits.remove_suffix(1);
    }
  }
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || end != digits.data() + digits.size())
    usage_error("{}: '{}' is not a size; give bytes, or a number with K, M, G or T, like 20G", option, text);
  if (value > (uint64_t{1} << 61) / unit) usage_error("{}: {} is more than a disk can have", option, text);
  return value * unit;
}

unsigned power(std::string_view option, uint64_t value, uint64_t least, uint64_t most) {
  if (!std::has_single_bit(value) || value < least || value > most)
    usage_error("{}: {} is not a power of two from {} to {}", option, value, least, most);
  return static_cast<unsigned>(std::countr_zero(value));
}

void one_of(std::string_view option, const std::string& text, std::initializer_list<std::string_view> words) {
  for (const auto word : words)
    if (text == word) return;
  std::string known;
  for (const auto word : words)
    if (!word.empty()) known += (known.empty() ? "" : " or ") + std::string(word);
  usage_error("{}: unknown '{}'; choose {}", option, text, known);
}

ImageCommand::Action action_of(const std::string& name) {
  using enum ImageCommand::Action;
  for (const auto& [action, text] :
       std::initializer_list<std::pair<ImageCommand::Action, const char*>>{{create, "create"},
                                                                           {check, "check"},
                                                                           {convert, "convert"},
                                                                           {resize, "resize"},
                                                                           {snapshot, "snapshot"},
                                                                           {rebase, "rebase"},
                                                                           {build, "build"}})
    if (name == text) return action;
  return info;
}

}  // namespace

namespace {

void understand_build(const detail::RawImageOptions& raw, ImageCommand& c) {
  one_of("--distribution", raw.distribution, {"debian"});
  c.size = parse_bytes("--size", raw.build_size);
  c.disk = {.suite = raw.suite,
            .mirror = raw.mirror,
            .hostname = raw.hostname,
            .password = raw.password,
            .ssh_keys = {},
            .packages = raw.packages};
  c.ssh_key = raw.ssh_key;
  c.verbose = raw.verbose;
}

std::string snapshot_name(const char* option, const std::optional<std::string>& given) {
  constexpr size_t longest = 255;
  if (given && (given->empty() || given->size() > longest))
    usage_error("image snapshot {}: a name has 1 to {} bytes, and this one has {}", option, longest,
                given->size());
  return given.value_or("");
}

// What create and convert are told about the image that they make.
void understand_layout(const std::string& action, const detail::RawImageOptions& raw, ImageCommand& c) {
  if (c.format == "raw") {
    for (const auto& [option, given] : {std::pair{"--backing", !raw.backing.empty()},
                                        {"--cluster-size", raw.cluster_size.has_value()},
                                        {"--compression", raw.compression.has_value()},
                                        {"--refcount-bits", raw.refcount_bits.has_value()},
                                        {"--qcow2-version", raw.version.has_value()},
                                        {"--data-file", !raw.data_file.empty()},
                                        {"--raw-data", raw.raw_data},
                                        {"--lazy-refcounts", raw.lazy_refcounts},
                                        {"--subclusters", raw.subclusters},
                                        {"--compress", raw.compress}})
      if (given)
        usage_error("image {}: a raw image has no {}; leave it out, or use --format qcow2", action, option);
  }
  if (!raw.backing_format.empty() && raw.backing.empty())
    usage_error("image {}: --backing-format is the format of the backing file; give --backing FILE too",
                action);
  if (raw.compress && !raw.data_file.empty())
    usage_error("image {}: --compress and --data-file exclude each other", action);
  if (raw.compress && !raw.backing.empty())
    usage_error("image {}: --compress and --backing exclude each other", action);
  const std::string version = raw.version.value_or(detail::default_version),
                    compression = raw.compression.value_or(detail::default_compression);
  one_of("--qcow2-version", version, {"2", "3"});
  c.version = version == "2" ? 2 : 3;
  one_of("--compression", compression, {"zlib", "zstd"});
  c.zstd = compression == "zstd";
  const auto size = [](const char* option, const std::optional<std::string>& given, const char* fallback) {
    return parse_bytes(option, given ? std::string_view(*given) : fallback);
  };
  c.cluster_bits = power(
      "--cluster-size", size("--cluster-size", raw.cluster_size, detail::default_cluster_size), 512, 2 << 20);
  c.refcount_order = power("--refcount-bits",
                           size("--refcount-bits", raw.refcount_bits, detail::default_refcount_bits), 1, 64);
  c.lazy_refcounts = raw.lazy_refcounts;
  c.subclusters = raw.subclusters;
  c.raw_data = raw.raw_data;
  c.compress = raw.compress;
}

}  // namespace

ImageCommand understand_image(const std::string& action, const detail::RawImageOptions& raw) {
  ImageCommand c;
  c.action = action_of(action);
  c.file = raw.file;
  c.target = raw.target;
  if (c.file.empty() || (c.action == ImageCommand::Action::convert && c.target.empty()))
    usage_error("image {}: a file's name is empty; give the path of an image", action);
  for (const auto& [option, text] : {std::pair{"--format", raw.format},
                                     {"--source-format", raw.source_format},
                                     {"--backing-format", raw.backing_format}})
    one_of(option, text, {"", "raw", "qcow2"});
  c.format = raw.format;
  c.source_format = raw.source_format;
  c.backing_format = raw.backing_format;
  c.json = raw.json;
  c.progress = raw.progress;
  if (!raw.backing.empty()) c.backing = raw.backing;
  c.data_file = raw.data_file;
  one_of("--preallocation", raw.preallocation, {"off", "full"});
  c.preallocation = raw.preallocation;
  understand_layout(action, raw, c);
  one_of("--repair", raw.repair, {"", "leaks", "all"});
  c.repair = raw.repair;
  c.shrink = raw.shrink;
  std::string size = raw.size;
  if (c.action == ImageCommand::Action::resize && (size.starts_with('+') || size.starts_with('-'))) {
    c.sign = size[0];
    size.erase(0, 1);
  }
  if (!size.empty()) c.size = parse_bytes("size", size);
  if (c.action == ImageCommand::Action::create && size.empty() && !c.backing)
    usage_error("image create: say how large the disk is, like 'lodge image create {} 20G'", c.file);
  if (c.action == ImageCommand::Action::build) understand_build(raw, c);
  c.list = raw.list;
  c.create_name = snapshot_name("--create", raw.create_name);
  c.apply_name = snapshot_name("--apply", raw.apply_name);
  c.delete_name = snapshot_name("--delete", raw.delete_name);
  if (c.list + !c.create_name.empty() + !c.apply_name.empty() + !c.delete_name.empty() > 1)
    usage_error("image snapshot: --list, --create, --apply and --delete exclude each other");
  c.no_backing = raw.no_backing;
  c.unsafe = raw.unsafe;
  c.chain = raw.chain;
  if (c.action == ImageCommand::Action::rebase && c.no_backing == c.backing.has_value())
    usage_error("image rebase: give either --backing FILE or --no-backing");
  return c;
}

}  // namespace lodge::cli
