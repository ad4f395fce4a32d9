// Short forms for the emulator's own tests: run a kernel and wait, device arrays with host copies.
#pragma once

#include <gtest/gtest.h>
#include <simt.h>

#include <cstdint>
#include <vector>

namespace simt_test {

// One launch on the default stream, waited for.
template <typename... Parameters, typename... Arguments>
void RunKernel(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...),
               Arguments&&... arguments) {
  ASSERT_EQ(simt::Launch("test", grid, block, shared_bytes, nullptr, kernel,
                         std::forward<Arguments>(arguments)...),
            cudaSuccess);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

// What the host sees when it looks too early, which a test of deferred streams does on purpose.
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T Peek(const T* value) {
  return *static_cast<const volatile T*>(value);
}

// An array on the device.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    EXPECT_EQ(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  std::vector<T> Host() const {
    std::vector<T> values(count_);
    EXPECT_EQ(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return values;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

}  // namespace simt_test
