// What each command does; the results are process exit statuses.
#pragma once

#include "cli/options.hpp"

namespace lodge::cli {

int run(const RunCommand& command);
int doctor(const DoctorCommand& command);
int image(const ImageCommand& command);
int build_image(const ImageCommand& command);
int ctl(const CtlCommand& command);
int kvm(const KvmCommand& command);
int list(const ListCommand& command);

}  // namespace lodge::cli
