// An accelerator as one rank sees it: its memory, one compute stream, copies. The implementation
// lives in the CUDA module, which is loaded at run time (core/cuda_module.h); this interface has
// nothing of CUDA in it.
//
//   SALA_ASSIGN_OR_RETURN(std::unique_ptr<Device> gpu, OpenCudaDevice({.index = 0}));
//   Arena arena(size_t{64} << 20, gpu.get());
//   Tensor x = arena.New(DType::kBF16, {t, h});       // device memory
//   gpu->Upload(x.raw(), host, bytes);                // host may be reused on return
//   ... kernels on the compute stream ...
//   gpu->Download(host, x.raw(), bytes);              // waits
//
// Everything is ordered on the compute stream. A failing call throws DeviceError with operation,
// rank and host: CUDA reports faults of earlier launches at any later call, so there is no caller
// who could handle one and go on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

namespace sala {

struct DeviceInfo {
  std::string name;    // "NVIDIA H200"
  std::string bus_id;  // tells devices of a host apart, whatever numbers a rank sees
  int index = 0;
  int compute_capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
  size_t shared_bytes_per_block = 0;  // the most a block may ask for
  size_t l2_bytes = 0;
  size_t memory_bytes = 0;
  int driver_version = 0;  // 13000 for 13.0
  int runtime_version = 0;
  bool emulated = false;  // kernels run on the CPU
};

class Device;

// Which device and how it is used.
struct DeviceOptions {
  int index = -1;  // -1: local rank modulo the number of devices
  int local_rank = 0;
  int rank = 0;  // for error messages
  std::string host;
  bool deterministic = true;  // algorithms are chosen by rule, not by timing
  // A dry device hands out addresses without memory and launches nothing: running the model on it
  // measures what the real run will need, scratch included.
  bool dry = false;
  const Device* like = nullptr;  // whose properties a dry device has; null: an H100's
};

// CUDA-FAILED or CUDA-MEMORY of the error catalogue, exit code 71 (docs/errors.md).
class DeviceError : public std::exception {
 public:
  DeviceError(std::string code, std::string text)
      : code_(std::move(code)), text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }
  const std::string& code() const { return code_; }

 private:
  std::string code_, text_;
};

class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  virtual const DeviceInfo& info() const = 0;
  virtual const DeviceOptions& options() const = 0;

  // Memory, aligned to 256 bytes. Allocating and freeing may wait for the device: do it outside of
  // the step.
  virtual void* Allocate(size_t bytes) = 0;
  virtual void Free(void* pointer) = 0;
  virtual size_t free_bytes() const = 0;  // of the device, now

  // On the compute stream. Upload goes through a ring of pinned memory: it returns when `host` may
  // be reused, and waits only when the ring is full of copies that have not run.
  virtual void Upload(void* device, const void* host, size_t bytes) = 0;
  virtual void Download(void* host, const void* device, size_t bytes) = 0;
  virtual void Copy(void* to, const void* from, size_t bytes) = 0;
  virtual void Zero(void* device, size_t bytes) = 0;
  virtual void Synchronize() = 0;

  // Points in time, for benchmarks: mark number `mark` (small, from 0; reused freely) lies behind
  // the work queued so far. SecondsBetween waits for mark `to`. On a dry device 0.
  virtual void MarkTime(int mark) = 0;
  virtual double SecondsBetween(int from, int to) = 0;

  // The compute stream (a cudaStream_t), for code inside the module.
  virtual void* stream() const = 0;
  // The module's table of operations (kernels/cuda_kernels.h).
  virtual const void* kernel_table() const = 0;
};

}  // namespace sala
