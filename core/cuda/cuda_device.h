// The CUDA form of Device. Part of the CUDA module: nothing outside of it includes this header.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <typeindex>
#include <utility>
#include <vector>

#include "core/device.h"

namespace sala {

// Throws DeviceError when a call of the runtime failed: operation, what it worked on, the
// runtime's own words, rank and host. After a failed launch every later call fails too, so the
// first message is the one that counts.
void CheckCuda(cudaError_t result, const char* operation, const std::string& subject,
               const DeviceOptions& options);

int CudaDeviceCount(std::string* why_none);

class CudaDevice final : public Device {
 public:
  CudaDevice(const DeviceOptions& options, const void* kernel_table);
  ~CudaDevice() override;

  const DeviceInfo& info() const override { return info_; }
  const DeviceOptions& options() const override { return options_; }

  void* Allocate(size_t bytes) override;
  void Free(void* pointer) override;
  size_t free_bytes() const override;

  void Upload(void* device, const void* host, size_t bytes) override;
  void Download(void* host, const void* device, size_t bytes) override;
  void Copy(void* to, const void* from, size_t bytes) override;
  void Zero(void* device, size_t bytes) override;
  void Synchronize() override;
  void MarkTime(int mark) override;
  double SecondsBetween(int from, int to) override;

  void* stream() const override { return stream_; }
  const void* kernel_table() const override { return kernel_table_; }

  cudaStream_t cuda_stream() const { return stream_; }
  bool dry() const { return options_.dry; }

  // What a higher room keeps as long as the device lives (a library's handle, its plans): one
  // object of each type T, made by make(), a std::unique_ptr<T>, at first use. Destroyed before the
  // stream, with the stream idle, latest first.
  template <typename T, typename Make>
  T& Keep(const Make& make) {
    for (const auto& [type, object] : kept_) {
      if (type == typeid(T)) return *static_cast<T*>(object.get());
    }
    std::unique_ptr<T> made = make();
    T& object = *made;
    kept_.emplace_back(typeid(T), std::shared_ptr<void>(std::move(made)));
    return object;
  }

 private:
  // A piece of pinned memory and the event after which it is free again.
  struct Stage {
    char* data = nullptr;
    cudaEvent_t done = nullptr;
    bool in_flight = false;
  };
  Stage& NextStage();
  void Check(cudaError_t result, const char* operation, size_t bytes) const;

  DeviceOptions options_;
  DeviceInfo info_;
  const void* kernel_table_;
  cudaStream_t stream_ = nullptr;
  std::vector<Stage> stages_;
  size_t next_stage_ = 0;
  std::vector<cudaEvent_t> marks_;  // null where a number was not used yet
  std::vector<std::pair<std::type_index, std::shared_ptr<void>>> kept_;
};

}  // namespace sala
