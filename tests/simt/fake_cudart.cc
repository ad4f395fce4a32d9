// Stand-in for the CUDA runtime, defined against its genuine header: one emulated device (or
// SALA_SIMT_DEVICES of them, which share everything) whose memory is host memory.
//
// Memory comes in heap blocks of exactly the size asked for, filled with NaN; without
// AddressSanitizer there is a canary behind each, looked at when it is freed. All copies and
// memsets are queued on their stream, from and to pageable host memory too, as if it were pinned.
// What is not here does not link.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "tests/simt/device.h"
#include "tests/simt/sanitizer.h"
#include "tests/simt/simt_core.h"

namespace device = simt::device;

struct CUevent_st {
  std::shared_ptr<device::Event> event = device::CreateEvent();
  int64_t records = 0;   // times it was recorded
  int64_t asked_at = 0;  // value of `records` when it was last asked about
};

namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kCanaryBytes = 64;
constexpr int kCanary = 0xa5;
constexpr int kDriverVersion = 13000;

struct Allocation {
  size_t bytes;
  bool on_device;
};

struct Memory {
  std::mutex mutex;
  std::map<const void*, Allocation> blocks;
  size_t device_bytes = 0;
  size_t total = size_t{80} << 30;
};

size_t FromEnvironment(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != 0 ? std::strtoull(text, nullptr, 10) : otherwise;
}

Memory& TheMemory() {
  static Memory* memory = [] {
    auto* fresh = new Memory;
    fresh->total = FromEnvironment("SALA_SIMT_MEMORY", fresh->total);
    return fresh;
  }();
  return *memory;
}

int SharedMemoryOptIn() { return static_cast<int>(simt::options().shared_bytes); }

size_t CanaryBytes() { return simt::sanitizer::HasAddress() ? 0 : kCanaryBytes; }

cudaError_t Allocate(void** pointer, size_t bytes, bool on_device) {
  if (pointer == nullptr) return device::Fail(cudaErrorInvalidValue);
  *pointer = nullptr;
  if (const cudaError_t sticky = device::StickyError(); sticky != cudaSuccess) return sticky;
  if (device::FailsNow(on_device ? "malloc" : "host_malloc")) {
    return device::Fail(cudaErrorMemoryAllocation);
  }
  if (bytes == 0) return cudaSuccess;
  Memory& memory = TheMemory();
  const std::lock_guard<std::mutex> lock(memory.mutex);
  if (on_device && bytes > memory.total - std::min(memory.total, memory.device_bytes)) {
    return device::Fail(cudaErrorMemoryAllocation);
  }
  void* block = nullptr;
  if (posix_memalign(&block, kAlignment, bytes + CanaryBytes()) != 0) {
    return device::Fail(cudaErrorMemoryAllocation);
  }
  std::memset(block, 0xff, bytes);
  std::memset(static_cast<char*>(block) + bytes, kCanary, CanaryBytes());
  memory.blocks[block] = Allocation{bytes, on_device};
  if (on_device) memory.device_bytes += bytes;
  *pointer = block;
  return cudaSuccess;
}

void CheckCanary(const void* block, size_t bytes) {
  const auto* canary = static_cast<const unsigned char*>(block) + bytes;
  for (size_t i = 0; i < CanaryBytes(); ++i) {
    if (canary[i] == kCanary) continue;
    simt::Report("a write behind device memory of " + std::to_string(bytes) + " bytes: at byte " +
                 std::to_string(bytes + i) + " (found when it was freed)");
  }
}

cudaError_t Release(void* pointer, bool on_device) {
  if (pointer == nullptr) return cudaSuccess;
  device::SynchronizeAll();  // freeing waits for the device
  Memory& memory = TheMemory();
  const std::lock_guard<std::mutex> lock(memory.mutex);
  const auto found = memory.blocks.find(pointer);
  if (found == memory.blocks.end() || found->second.on_device != on_device) {
    return device::Fail(cudaErrorInvalidValue);
  }
  CheckCanary(pointer, found->second.bytes);
  if (on_device) memory.device_bytes -= found->second.bytes;
  memory.blocks.erase(found);
  std::free(pointer);
  return cudaSuccess;
}

// What each call that waits returns.
cudaError_t AfterWaiting() {
  if (device::FailsNow("sync")) return device::Fail(cudaErrorIllegalAddress, true);
  return device::StickyError();
}

cudaError_t QueueWork(cudaStream_t stream, const char* kind, device::Work work) {
  if (const cudaError_t sticky = device::StickyError(); sticky != cudaSuccess) return sticky;
  if (!device::StreamExists(stream)) return device::Fail(cudaErrorInvalidResourceHandle);
  if (device::FailsNow(kind)) return device::Fail(cudaErrorInvalidValue);
  device::Enqueue(stream, std::move(work));
  return cudaSuccess;
}

cudaError_t OnlyDevice(int index) {
  int count = 0;
  cudaGetDeviceCount(&count);
  return index >= 0 && index < count ? cudaSuccess : device::Fail(cudaErrorInvalidDevice);
}

thread_local int current_device = 0;

}  // namespace

extern "C" {

// ---------------------------------------------------------------------------- device

cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(FromEnvironment("SALA_SIMT_DEVICES", 1));
  return *count > 0 ? cudaSuccess : device::Fail(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int index) {
  if (const cudaError_t error = OnlyDevice(index); error != cudaSuccess) return error;
  current_device = index;
  return device::StickyError();
}
cudaError_t cudaGetDevice(int* index) {
  *index = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceReset() {
  device::SynchronizeAll();
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  if (const cudaError_t error = OnlyDevice(index); error != cudaSuccess) return error;
  *properties = cudaDeviceProp{};
  std::strcpy(properties->name, "SIMT emulator");
  properties->totalGlobalMem = TheMemory().total;
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = SharedMemoryOptIn();
  properties->sharedMemPerMultiprocessor = 228 * 1024;
  properties->reservedSharedMemPerBlock = 1024;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = static_cast<int>(FromEnvironment("SALA_SIMT_SMS", 4));
  properties->l2CacheSize = 50 << 20;
  properties->memoryBusWidth = 5120;
  properties->concurrentKernels = properties->asyncEngineCount = 1;
  properties->unifiedAddressing = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, index); error != cudaSuccess) {
    return error;
  }
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = SharedMemoryOptIn();
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = properties.regsPerBlock;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      break;
    case cudaDevAttrClockRate:
      *value = 1000000;
      break;
    case cudaDevAttrMemoryClockRate:
      *value = 1000000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = properties.memoryBusWidth;
      break;
    case cudaDevAttrMemoryPoolsSupported:
      *value = 0;
      break;
    default:
      *value = 0;
      return device::Fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int index) {
  std::snprintf(text, static_cast<size_t>(length), "0000:%02x:00.0", index);
  return OnlyDevice(index);
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = kDriverVersion;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  device::SynchronizeAll();
  return AfterWaiting();
}

// ---------------------------------------------------------------------------- memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return Allocate(pointer, bytes, true); }
cudaError_t cudaFree(void* pointer) { return Release(pointer, true); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return Allocate(pointer, bytes, false); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return Allocate(pointer, bytes, false);
}
cudaError_t cudaFreeHost(void* pointer) { return Release(pointer, false); }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return Allocate(pointer, bytes, true);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return Release(pointer, true); }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  Memory& memory = TheMemory();
  const std::lock_guard<std::mutex> lock(memory.mutex);
  *total = memory.total;
  *free_bytes = memory.total - std::min(memory.total, memory.device_bytes);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Memory& memory = TheMemory();
  const std::lock_guard<std::mutex> lock(memory.mutex);
  *attributes = cudaPointerAttributes{};
  attributes->type = cudaMemoryTypeUnregistered;
  auto found = memory.blocks.upper_bound(pointer);
  if (found == memory.blocks.begin()) return cudaSuccess;
  --found;
  const auto* end = static_cast<const char*>(found->first) + found->second.bytes;
  if (static_cast<const char*>(pointer) >= end) return cudaSuccess;
  attributes->type = found->second.on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->devicePointer = const_cast<void*>(pointer);
  attributes->hostPointer = found->second.on_device ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (bytes == 0) return device::StickyError();
  if (to == nullptr || from == nullptr) return device::Fail(cudaErrorInvalidValue);
  return QueueWork(stream, "memcpy", [=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return error != cudaSuccess ? error : cudaStreamSynchronize(nullptr);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  if (width == 0 || height == 0) return device::StickyError();
  if (to == nullptr || from == nullptr) return device::Fail(cudaErrorInvalidValue);
  if (width > to_pitch || width > from_pitch) return device::Fail(cudaErrorInvalidPitchValue);
  return QueueWork(stream, "memcpy", [=] {
    for (size_t row = 0; row < height; ++row) {
      std::memmove(static_cast<char*>(to) + row * to_pitch,
                   static_cast<const char*>(from) + row * from_pitch, width);
    }
  });
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind kind) {
  const cudaError_t error =
      cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind, nullptr);
  return error != cudaSuccess ? error : cudaStreamSynchronize(nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return device::StickyError();
  if (to == nullptr) return device::Fail(cudaErrorInvalidValue);
  return QueueWork(stream, "memcpy", [=] { std::memset(to, value, bytes); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpyAsync(static_cast<char*>(const_cast<void*>(symbol)) + offset, from, bytes, kind,
                         stream);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind kind) {
  return cudaMemcpy(static_cast<char*>(const_cast<void*>(symbol)) + offset, from, bytes, kind);
}

// ---------------------------------------------------------------------------- streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  if (const cudaError_t sticky = device::StickyError(); sticky != cudaSuccess) return sticky;
  *stream = device::CreateStream((flags & cudaStreamNonBlocking) == 0);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (stream == nullptr || !device::StreamExists(stream)) {
    return device::Fail(cudaErrorInvalidResourceHandle);
  }
  device::DestroyStream(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!device::StreamExists(stream)) return device::Fail(cudaErrorInvalidResourceHandle);
  device::Synchronize(stream);
  return AfterWaiting();
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (!device::StreamExists(stream)) return device::Fail(cudaErrorInvalidResourceHandle);
  device::Synchronize(stream);
  return device::StickyError();
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return QueueWork(stream, "host_func", [=] { function(data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (event == nullptr || !device::StreamExists(stream)) {
    return device::Fail(cudaErrorInvalidResourceHandle);
  }
  device::Record(event->event, stream);
  ++event->records;
  return device::StickyError();
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event == nullptr) return device::Fail(cudaErrorInvalidResourceHandle);
  device::Synchronize(event->event);
  return AfterWaiting();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (event == nullptr) return device::Fail(cudaErrorInvalidResourceHandle);
  // The first question after each record finds the work still running, so that code that waits by
  // asking has to ask again.
  if (event->asked_at != event->records) {
    event->asked_at = event->records;
    return cudaErrorNotReady;
  }
  device::Synchronize(event->event);
  return device::StickyError();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (start == nullptr || end == nullptr) return device::Fail(cudaErrorInvalidResourceHandle);
  if (!device::WasRecorded(*start->event) || !device::WasRecorded(*end->event)) {
    return device::Fail(cudaErrorInvalidResourceHandle);
  }
  if (device::PassedAt(*start->event) == 0 || device::PassedAt(*end->event) == 0) {
    return device::Fail(cudaErrorNotReady);
  }
  *milliseconds =
      static_cast<float>(device::PassedAt(*end->event) - device::PassedAt(*start->event)) * 1e-6F;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (event == nullptr || !device::StreamExists(stream)) {
    return device::Fail(cudaErrorInvalidResourceHandle);
  }
  device::StreamWait(stream, event->event);
  return device::StickyError();
}

// ---------------------------------------------------------------------------- kernels, errors

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > SharedMemoryOptIn()) {
    return device::Fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = cudaFuncAttributes{};
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = SharedMemoryOptIn();
  attributes->numRegs = 64;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  if (threads < 1 || threads > 1024) return device::Fail(cudaErrorInvalidValue);
  const auto by_shared = static_cast<int>(size_t{228} * 1024 / (shared + 1024));
  *blocks = std::min({32, 2048 / threads, by_shared});
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}

cudaError_t cudaGetLastError() { return device::LastError(true); }
cudaError_t cudaPeekAtLastError() { return device::LastError(false); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidPitchValue:
      return "cudaErrorInvalidPitchValue";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    default:
      return "cudaErrorUnknown";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidPitchValue:
      return "invalid pitch argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    default:
      return "unknown error";
  }
}

}  // extern "C"
