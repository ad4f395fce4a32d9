// The one C entry point of the CUDA module (core/cuda_module.h).
#include <cstring>

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

constexpr sala::CudaModuleInterface kInterface = {.abi = sala::CudaModuleAbi(),
                                                  .build = SALA_CUDA_BUILD,
                                                  .open_device = &OpenDevice,
                                                  .device_count = &sala::CudaDeviceCount,
                                                  .find = &Find};

}  // namespace

extern "C" __attribute__((visibility("default"))) const sala::CudaModuleInterface*
sala_cuda_module() {
  return &kInterface;
}
