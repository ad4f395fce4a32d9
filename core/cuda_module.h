// The CUDA module: a shared library with everything that needs the CUDA toolkit, loaded on demand.
// The program itself links nothing of CUDA, starts at once, and runs on machines without driver or
// toolkit; what keeps the module from loading is told in one line.
//
// Looked for in this order: the file named by the environment variable SALA_CUDA_MODULE,
// libsala_cuda.so beside the program, in ../lib from there, where the system's loader looks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/context.h"
#include "core/device.h"
#include "core/status.h"

namespace sala {

// What the module's only C entry point returns.
struct CudaModuleInterface {
  // SALA_CUDA_INTERFACE, a checksum of the headers both sides are compiled with (SalaCuda.cmake): a
  // program and a module of different builds must not meet. The first field in every version.
  const char* interface = nullptr;
  const char* build = nullptr;  // commit and architectures
  // Throws DeviceError.
  Device* (*open_device)(const DeviceOptions& options) = nullptr;
  int (*device_count)(std::string* why_none) = nullptr;
  std::string (*libraries)() = nullptr;  // what it runs on: "cuBLASLt 13.0.2, NCCL 2.28.9"
  // Interfaces of rooms above core, by name; null where the module has none.
  const void* (*find)(const char* name) = nullptr;
};
constexpr const char* kCudaModuleEntry = "sala_cuda_module";
using CudaModuleEntry = const CudaModuleInterface* (*)();

// The module, loaded once per process. CUDA-MODULE (exit 71) says what was tried and why it failed.
StatusOr<const CudaModuleInterface*> LoadCudaModule();
// The file it was loaded from; "" before.
std::string CudaModulePath();

// CUDA-MODULE, CUDA-NONE, or what the driver said.
StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options);

}  // namespace sala
