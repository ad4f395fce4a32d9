#include "core/cuda/cuda_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "core/check.h"

namespace sala {
namespace {

// Uploads are descriptors of tiles and documents: a few KiB each, several per layer.
constexpr size_t kStageBytes = size_t{1} << 20;
constexpr size_t kStages = 8;

std::string Bytes(size_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

void CheckCuda(cudaError_t result, const char* operation, const std::string& subject,
               const DeviceOptions& options) {
  if (result == cudaSuccess) return;
  const bool memory = result == cudaErrorMemoryAllocation;
  std::string text = std::string(operation) + (subject.empty() ? "" : " " + subject) + ": " +
                     cudaGetErrorString(result) + " (" + cudaGetErrorName(result) + "), rank " +
                     std::to_string(options.rank) + " on " + options.host;
  if (memory)
    text +=
        "; training: a smaller micro-batch, recompute: true or more ranks; an evaluation: "
        "shorter prompts, --cp or --tp";
  throw DeviceError(memory ? "CUDA-MEMORY" : "CUDA-FAILED", text);
}

int CudaDeviceCount(std::string* why_none) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result != cudaSuccess) {
    *why_none = cudaGetErrorString(result);
    return 0;
  }
  if (count == 0) *why_none = "the driver reports none";
  return count;
}

CudaDevice::CudaDevice(const DeviceOptions& options, const void* kernel_table)
    : options_(options), kernel_table_(kernel_table) {
  if (options_.dry) {
    info_.name = "H100, dry";
    info_.compute_capability = 90;
    info_.multiprocessors = 132;
    info_.shared_bytes_per_block = 227 * 1024;
    if (options_.like != nullptr) info_ = options_.like->info();
    return;
  }
  int count = 0;
  Check(cudaGetDeviceCount(&count), "cudaGetDeviceCount", 0);
  SALA_CHECK(count > 0) << "the caller counts devices first";
  info_.index = options_.index >= 0 ? options_.index : options_.local_rank % count;
  Check(cudaSetDevice(info_.index), "cudaSetDevice", 0);
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, info_.index), "cudaGetDeviceProperties", 0);
  info_.name = properties.name;
  char bus_id[32] = {};
  Check(cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), info_.index), "cudaDeviceGetPCIBusId", 0);
  info_.bus_id = bus_id;
  info_.compute_capability = properties.major * 10 + properties.minor;
  info_.multiprocessors = properties.multiProcessorCount;
  info_.shared_bytes_per_block = properties.sharedMemPerBlockOptin;
  info_.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  info_.memory_bytes = properties.totalGlobalMem;
  Check(cudaDriverGetVersion(&info_.driver_version), "cudaDriverGetVersion", 0);
  Check(cudaRuntimeGetVersion(&info_.runtime_version), "cudaRuntimeGetVersion", 0);
#ifdef SALA_EMULATED
  info_.emulated = true;
#endif
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate", 0);
  stages_.resize(kStages);
  for (Stage& stage : stages_) {
    Check(cudaMallocHost(reinterpret_cast<void**>(&stage.data), kStageBytes), "cudaMallocHost",
          kStageBytes);
    Check(cudaEventCreateWithFlags(&stage.done, cudaEventDisableTiming), "cudaEventCreate", 0);
  }
}

// Errors are of no use here: the process is ending or has failed already.
CudaDevice::~CudaDevice() {
  if (options_.dry) return;
  cudaStreamSynchronize(stream_);
  while (!kept_.empty()) kept_.pop_back();
  for (const Stage& stage : stages_) {
    cudaEventDestroy(stage.done);
    cudaFreeHost(stage.data);
  }
  for (cudaEvent_t mark : marks_) {
    if (mark != nullptr) cudaEventDestroy(mark);
  }
  cudaStreamDestroy(stream_);
}

void CudaDevice::Check(cudaError_t result, const char* operation, size_t bytes) const {
  if (result != cudaSuccess)
    CheckCuda(result, operation, bytes == 0 ? "" : "of " + Bytes(bytes), options_);
}

void* CudaDevice::Allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* pointer = nullptr;
  if (options_.dry) {
    // Addresses without memory behind them: touching one is a fault. The size is kept in front of
    // them, on a page of its own that does exist.
    char* base = static_cast<char*>(
        mmap(nullptr, bytes + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    SALA_CHECK(base != MAP_FAILED) << "no address space for " << bytes << " bytes";
    SALA_CHECK(mprotect(base, 4096, PROT_READ | PROT_WRITE) == 0);
    std::memcpy(base, &bytes, sizeof(bytes));
    return base + 4096;
  }
  Check(cudaMalloc(&pointer, bytes), "cudaMalloc", bytes);
  return pointer;
}

void CudaDevice::Free(void* pointer) {
  if (pointer == nullptr) return;
  if (options_.dry) {
    char* base = static_cast<char*>(pointer) - 4096;
    size_t bytes = 0;
    std::memcpy(&bytes, base, sizeof(bytes));
    munmap(base, bytes + 4096);
    return;
  }
  // Nobody can do anything about an error here; it must not be taken for one of the next launch.
  cudaFree(pointer);
  cudaGetLastError();
}

size_t CudaDevice::free_bytes() const {
  if (options_.dry) return 0;
  size_t free = 0;
  size_t total = 0;
  Check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo", 0);
  return free;
}

CudaDevice::Stage& CudaDevice::NextStage() {
  Stage& stage = stages_[next_stage_];
  next_stage_ = (next_stage_ + 1) % stages_.size();
  if (stage.in_flight) Check(cudaEventSynchronize(stage.done), "cudaEventSynchronize", 0);
  stage.in_flight = false;
  return stage;
}

void CudaDevice::Upload(void* device, const void* host, size_t bytes) {
  if (options_.dry) return;
  const char* from = static_cast<const char*>(host);
  char* to = static_cast<char*>(device);
  while (bytes > 0) {
    const size_t piece = std::min(bytes, kStageBytes);
    Stage& stage = NextStage();
    std::memcpy(stage.data, from, piece);
    Check(cudaMemcpyAsync(to, stage.data, piece, cudaMemcpyHostToDevice, stream_),
          "copy to the device", piece);
    Check(cudaEventRecord(stage.done, stream_), "cudaEventRecord", 0);
    stage.in_flight = true;
    from += piece;
    to += piece;
    bytes -= piece;
  }
}

void CudaDevice::Download(void* host, const void* device, size_t bytes) {
  if (options_.dry) {
    std::memset(host, 0, bytes);
    return;
  }
  const char* from = static_cast<const char*>(device);
  char* to = static_cast<char*>(host);
  while (bytes > 0) {
    const size_t piece = std::min(bytes, kStageBytes);
    Stage& stage = NextStage();
    Check(cudaMemcpyAsync(stage.data, from, piece, cudaMemcpyDeviceToHost, stream_),
          "copy from the device", piece);
    Synchronize();
    std::memcpy(to, stage.data, piece);
    from += piece;
    to += piece;
    bytes -= piece;
  }
}

void CudaDevice::Copy(void* to, const void* from, size_t bytes) {
  if (options_.dry || bytes == 0) return;
  Check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copy on the device",
        bytes);
}

void CudaDevice::Zero(void* device, size_t bytes) {
  if (options_.dry || bytes == 0) return;
  Check(cudaMemsetAsync(device, 0, bytes, stream_), "cudaMemset", bytes);
}

void CudaDevice::Synchronize() {
  if (options_.dry) return;
  Check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize", 0);
}

void CudaDevice::MarkTime(int mark) {
  if (options_.dry) return;
  const auto i = static_cast<size_t>(mark);
  if (marks_.size() <= i) marks_.resize(i + 1, nullptr);
  if (marks_[i] == nullptr) Check(cudaEventCreate(&marks_[i]), "cudaEventCreate", 0);
  Check(cudaEventRecord(marks_[i], stream_), "cudaEventRecord", 0);
}

double CudaDevice::SecondsBetween(int from, int to) {
  if (options_.dry) return 0;
  const auto limit = static_cast<int>(marks_.size());
  SALA_CHECK(from >= 0 && from < limit && to >= 0 && to < limit) << "marks are set before";
  const cudaEvent_t first = marks_[static_cast<size_t>(from)];
  const cudaEvent_t last = marks_[static_cast<size_t>(to)];
  Check(cudaEventSynchronize(last), "cudaEventSynchronize", 0);
  float milliseconds = 0;
  Check(cudaEventElapsedTime(&milliseconds, first, last), "cudaEventElapsedTime", 0);
  return static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace sala
