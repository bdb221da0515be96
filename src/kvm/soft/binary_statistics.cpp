#include "kvm/soft/binary_statistics.hpp"

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr size_t name_size = 48;

// kvm_stats_desc, whose flexible array has a size in C++, with the name behind it.
struct Descriptor {
  uint32_t flags;
  int16_t exponent;
  uint16_t size;  // in 64-bit items
  uint32_t offset;
  uint32_t bucket_size;
  char name[name_size];
};
static_assert(sizeof(Descriptor) == 16 + name_size && sizeof(kvm_stats_header) == 24);

constexpr size_t id_offset = sizeof(kvm_stats_header), descriptors_offset = id_offset + name_size;

size_t values_offset(size_t count) noexcept {
  return descriptors_offset + count * sizeof(Descriptor);
}

Fd make_file(size_t size) {
  Fd file(::memfd_create("kvm-statistics", MFD_CLOEXEC));
  if (!file || ::ftruncate(file.get(), static_cast<off_t>(size)) != 0)
    throw_errno("cannot make a file of statistics");
  return file;
}

void copy_name(char (&to)[name_size], const std::string& from) noexcept {
  std::memcpy(to, from.data(), std::min(from.size(), name_size - 1));
}

}  // namespace

BinaryStatistics::BinaryStatistics(const std::string& id, std::span<const char* const> names)
    : file_(make_file(values_offset(names.size()) + names.size() * 8)),
      mapping_(values_offset(names.size()) + names.size() * 8, PROT_READ | PROT_WRITE, MAP_SHARED,
               file_.get(), 0, "cannot map a file of statistics"),
      values_(reinterpret_cast<std::atomic<uint64_t>*>(mapping_.data() + values_offset(names.size())),
              names.size()) {
  kvm_stats_header header{};
  header.name_size = name_size;
  header.num_desc = static_cast<uint32_t>(names.size());
  header.id_offset = id_offset;
  header.desc_offset = descriptors_offset;
  header.data_offset = static_cast<uint32_t>(values_offset(names.size()));
  std::memcpy(mapping_.data(), &header, sizeof header);
  char text[name_size] = {};
  copy_name(text, id);
  std::memcpy(mapping_.data() + id_offset, text, sizeof text);
  for (size_t i = 0; i < names.size(); ++i) {
    Descriptor descriptor{};
    descriptor.flags = KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10;
    descriptor.size = 1;
    descriptor.offset = static_cast<uint32_t>(i * 8);
    copy_name(descriptor.name, names[i]);
    std::memcpy(mapping_.data() + descriptors_offset + i * sizeof descriptor, &descriptor, sizeof descriptor);
  }
}

Fd BinaryStatistics::open() const {
  Fd reader(::open(fmt::format("/proc/self/fd/{}", file_.get()).c_str(), O_RDONLY | O_CLOEXEC));
  if (!reader) throw_errno("cannot open a file of statistics");
  return reader;
}

}  // namespace lodge::kvm::soft
