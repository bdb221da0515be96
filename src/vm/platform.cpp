#include "vm/platform.hpp"

#include <exception>

namespace lodge::vm {
namespace {

kvm_ioeventfd request_for(const machine::Doorbell& doorbell) {
  kvm_ioeventfd request{};
  request.addr = doorbell.address;
  request.len = doorbell.size;
  request.fd = doorbell.fd;
  if (doorbell.port) request.flags |= KVM_IOEVENTFD_FLAG_PIO;
  if (doorbell.match) {
    request.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH;
    request.datamatch = *doorbell.match;
  }
  return request;
}

}  // namespace

void Platform::signal(uint64_t address, uint32_t data) noexcept {
  kvm_msi message{};
  message.address_lo = static_cast<uint32_t>(address);
  message.address_hi = static_cast<uint32_t>(address >> 32);
  message.data = data;
  vm_.signal_msi(message);
}

bool Platform::add(const machine::Doorbell& doorbell) noexcept {
  try {
    vm_.ioeventfd(request_for(doorbell));
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

void Platform::remove(const machine::Doorbell& doorbell) noexcept {
  kvm_ioeventfd request = request_for(doorbell);
  request.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
  try {
    vm_.ioeventfd(request);
  } catch (const std::exception&) {
    // It is not there: nothing to remove.
  }
}

}  // namespace lodge::vm
