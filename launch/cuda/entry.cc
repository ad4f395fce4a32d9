// The one C entry point of the CUDA module (core/cuda_module.h).
#include <cublasLt.h>
#include <nccl.h>

#include <cstring>
#include <memory>
#include <sstream>
#include <string>

#include "core/cuda/cuda_device.h"
#include "core/cuda_module.h"
#include "kernels/cuda_kernels.h"
#include "parallel/nccl/nccl_table.h"

namespace {

// Whether machine code of one of the module's architectures ("80-real;90a-real") runs on a device:
// it does on the same generation from its own version on, that of "90a" on 9.0 alone.
bool RunsOn(const std::string& architectures, int capability) {
  std::istringstream list(architectures);
  for (std::string one; std::getline(list, one, ';');) {
    const int version = std::stoi(one);
    const bool exact = one.find('a') != std::string::npos && one.find('a') < one.find('-');
    if (exact ? version == capability : version / 10 == capability / 10 && version <= capability)
      return true;
  }
  return false;
}

sala::Device* OpenDevice(const sala::DeviceOptions& options) {
  auto device = std::make_unique<sala::CudaDevice>(options, &sala::kernels::cuda::Table());
  const sala::DeviceInfo& info = device->info();
  if (!info.emulated && !options.dry && !RunsOn(SALA_CUDA_ARCHITECTURES, info.compute_capability)) {
    const std::string version = std::to_string(info.compute_capability);
    throw sala::DeviceError(
        "CUDA-MODULE",
        "the CUDA module holds kernels for " SALA_CUDA_ARCHITECTURES ", the device " + info.name +
            " is of sm_" + version + "; build it with -DSALA_CUDA_ARCHITECTURES=" + version +
            "-real (90a-real for 90)");
  }
  return device.release();
}

const void* Find(const char* name) {
  return std::strcmp(name, "nccl") == 0 ? &sala::parallel::NcclTable() : nullptr;
}

std::string Libraries() {
  const size_t lt = cublasLtGetVersion();
  int nccl = 0;
  ncclGetVersion(&nccl);
  return "cuBLASLt " + std::to_string(lt / 10000) + "." + std::to_string(lt / 100 % 100) + "." +
         std::to_string(lt % 100) + ", NCCL " + std::to_string(nccl / 10000) + "." +
         std::to_string(nccl / 100 % 100) + "." + std::to_string(nccl % 100)
#ifdef SALA_EMULATED
         + " (stand-ins for both)"
#endif
      ;
}

constexpr sala::CudaModuleInterface kInterface = {.interface = SALA_CUDA_INTERFACE,
                                                  .build = SALA_CUDA_BUILD,
                                                  .open_device = &OpenDevice,
                                                  .device_count = &sala::CudaDeviceCount,
                                                  .libraries = &Libraries,
                                                  .find = &Find};

}  // namespace

extern "C" __attribute__((visibility("default"))) const sala::CudaModuleInterface*
sala_cuda_module() {
  return &kInterface;
}
