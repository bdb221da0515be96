#include "vm/accelerator.hpp"

#include <fmt/format.h>

#include <system_error>

#include "base/error.hpp"
#include "kvm/host/host.hpp"
#include "kvm/host/probe.hpp"
#include "kvm/soft/soft.hpp"
#include "vm/speed.hpp"

namespace lodge::vm {
namespace {

constexpr auto measuring_time = std::chrono::milliseconds(150);

AcceleratorReport examine_kvm() {
  const kvm::host::Probe probe = kvm::host::probe();
  AcceleratorReport report;
  report.name = "kvm";
  report.available = probe.available;
  report.boots_kernels = probe.can_boot_stock_kernel;
  report.mips = probe.kernel_mips;
  report.problems = probe.reasons;
  if (!probe.available) report.problems = {probe.error};
  return report;
}

AcceleratorReport examine_soft() {
  AcceleratorReport report;
  report.name = "soft";
  try {
    const auto system = kvm::soft::open();
    report.available = true;
    report.mips = measure_mips(*system, measuring_time);
    report.boots_kernels = report.mips > 0;
    if (!report.boots_kernels) report.problems.push_back("a tiny guest did not run to its end");
  } catch (const std::exception& error) {
    report.problems.emplace_back(error.what());
  }
  return report;
}

std::string why_not_kvm(const AcceleratorReport& kvm) {
  std::string text =
      kvm.available ? "this /dev/kvm cannot boot a stock kernel" : "there is no usable /dev/kvm";
  if (!kvm.problems.empty()) text += ": " + kvm.problems.front();
  return text;
}

}  // namespace

HostReport examine_host() {
  HostReport report{examine_kvm(), examine_soft(), Accelerator::soft, {}};
  if (report.kvm.boots_kernels) {
    report.choice = Accelerator::kvm;
    report.why = "the host's /dev/kvm runs all that a kernel needs, natively";
  } else {
    report.why = why_not_kvm(report.kvm);
  }
  return report;
}

Selected open_accelerator(Accelerator wanted, const kvm::soft::Options& soft) {
  if (wanted == Accelerator::soft) return {kvm::soft::open(soft), {}};
  if (wanted == Accelerator::kvm) return {kvm::host::open(), {}};
  const AcceleratorReport kvm = examine_kvm();
  if (kvm.boots_kernels) return {kvm::host::open(), {}};
  return {kvm::soft::open(soft), fmt::format("using the soft accelerator: {}", why_not_kvm(kvm))};
}

}  // namespace lodge::vm
