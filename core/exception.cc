#include "core/exception.h"

#include "core/device.h"
#include "core/file.h"

namespace sala {

Status ErrorOf(const std::exception& error) {
  if (const auto* device = dynamic_cast<const DeviceError*>(&error); device != nullptr)
    return MakeError(ExitCode::kDevice, device->code(), device->what());
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    return MakeError(ExitCode::kDevice, "HOST-MEMORY",
                     "the system gave this process no more memory (" + Printable(error.what()) +
                         "); ask for less (a smaller micro-batch, recompute: true, more ranks; "
                         "sala plan has the sums), or raise the limit of the shell or the job");
  }
  return MakeError(
      ExitCode::kInternal, "INTERNAL",
      Printable(error.what()) + "; this is a defect of the program, report it with the command");
}

}  // namespace sala
