// The one C entry point of the CUDA module (core/cuda_module.h).
#include <cublasLt.h>
#include <nccl.h>

#include <cstring>
#include <string>

#include "core/cuda/cuda_device.h"
#include "core/cuda_module.h"
#include "kernels/cuda_kernels.h"
#include "parallel/nccl/nccl_table.h"

namespace {

sala::Device* OpenDevice(const sala::DeviceOptions& options) {
  return new sala::CudaDevice(options, &sala::kernels::cuda::Table());
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
         std::to_string(nccl / 100 % 100) + "." + std::to_string(nccl % 100);
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
