#include "guestfs/boot_files.hpp"

#include <fmt/format.h>

#include <array>
#include <cstring>
#include <optional>

#include "base/error.hpp"
#include "guestfs/ext4.hpp"
#include "guestfs/partitions.hpp"

namespace lodge::guestfs {
namespace {

struct FileSystem {
  Ext4 fs;
  std::string root;  // what root= calls it
};

// Those of the partitions, or the one that the whole disk is.
std::vector<FileSystem> file_systems(block::Image& image, const std::string& name) {
  const View disk(image);
  std::vector<FileSystem> found;
  for (const auto& partition : read_partitions(disk)) {
    auto fs = Ext4::open(disk.part(partition.begin, partition.size),
                         fmt::format("{}, partition {}", name, partition.number));
    if (fs) found.push_back({std::move(*fs), "PARTUUID=" + partition.uuid});
  }
  if (!found.empty()) return found;
  if (auto fs = Ext4::open(disk, name)) found.push_back({std::move(*fs), "/dev/vda"});
  return found;
}

bool exists(const Ext4& fs, std::string_view path) {
  return fs.find(path).has_value();
}

// The system's own file system, as opposed to one for /boot or data.
bool is_root(const Ext4& fs) {
  return exists(fs, "/etc/os-release") || exists(fs, "/usr/lib/os-release") || exists(fs, "/sbin/init");
}

std::string directory_of(const std::string& path) {
  return path.substr(0, path.rfind('/'));
}

// The kernel of the newest version in a directory: "vmlinuz-6.1.0-18" is older than "vmlinuz-6.1.0-9" only by
// the letters. Rescue kernels are versions "0-rescue-..." and so the oldest.
std::optional<Ext4::Found> newest_kernel(const Ext4& fs, const std::string& directory) {
  const auto found = fs.find(directory + "/");
  if (!found || !found->node.is_directory()) return std::nullopt;
  std::string newest;
  for (const auto& name : fs.list(found->node)) {
    if (!name.starts_with("vmlinuz-") || name.ends_with(".old")) continue;
    if (newest.empty() || ::strverscmp(name.c_str(), newest.c_str()) > 0) newest = name;
  }
  if (newest.empty()) return std::nullopt;
  auto kernel = fs.find(directory + "/" + newest);
  return kernel && kernel->node.is_file() ? kernel : std::nullopt;
}

std::optional<Ext4::Found> find_kernel(const Ext4& fs) {
  for (const char* link : {"/vmlinuz", "/boot/vmlinuz"}) {
    auto kernel = fs.find(link);
    if (kernel && kernel->node.is_file()) return kernel;
  }
  for (const char* directory : {"/boot", ""})
    if (auto kernel = newest_kernel(fs, directory)) return kernel;
  return std::nullopt;
}

// By the names that distributions give it: Debian, Fedora and Alpine, SUSE and Arch; then Debian's link.
std::optional<Ext4::Found> find_initrd(const Ext4& fs, const std::string& kernel) {
  const std::string directory = directory_of(kernel);
  const size_t dash = kernel.find('-', directory.size());
  std::vector<std::string> names;
  if (dash != std::string::npos) {
    const std::string version = kernel.substr(dash + 1);
    for (const char* pattern : {"{}/initrd.img-{}", "{}/initramfs-{}.img", "{}/initramfs-{}", "{}/initrd-{}"})
      names.push_back(fmt::format(fmt::runtime(pattern), directory, version));
  }
  names.insert(names.end(), {directory + "/initrd.img", directory + "/initrd", "/initrd.img"});
  for (const auto& name : names) {
    auto initrd = fs.find(name);
    if (initrd && initrd->node.is_file()) return initrd;
  }
  return std::nullopt;
}

}  // namespace

BootFiles find_boot_files(block::Image& image, const std::string& name, uint64_t limit) {
  const auto systems = file_systems(image, name);
  if (systems.empty()) {
    usage_error(
        "{}: there is no kernel on this disk: no ext4 file system is; give --kernel and --initrd, and the "
        "disk "
        "as --disk",
        name);
  }
  BootFiles files;
  for (const auto& [fs, root] : systems) {
    if (files.root.empty() && is_root(fs)) {
      files.root = root;
      files.cloud_init = exists(fs, "/usr/bin/cloud-init");
    }
    if (!files.kernel.empty()) continue;
    const auto kernel = find_kernel(fs);
    if (!kernel) continue;
    files.kernel_path = kernel->path;
    files.kernel = fs.read(kernel->node, limit);
    if (const auto initrd = find_initrd(fs, kernel->path)) {
      files.initrd_path = initrd->path;
      files.initrd = fs.read(initrd->node, limit);
    }
    if (systems.size() == 1) files.root = root;
  }
  if (files.kernel.empty()) {
    usage_error(
        "{}: there is no kernel on this disk: neither /vmlinuz nor /boot/vmlinuz-* is; give --kernel and "
        "--initrd, and the disk as --disk",
        name);
  }
  if (files.root.empty()) files.root = systems.front().root;
  return files;
}

}  // namespace lodge::guestfs
