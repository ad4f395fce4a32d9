// The stand-in for the CUDA runtime: deferred streams, events, memory, errors on request.
#include <cstdlib>
#include <thread>

#include "tests/simt/child.h"
#include "tests/simt/device.h"
#include "tests/simt/launch.h"

namespace {

using simt_test::DeviceArray;
using simt_test::Peek;

__global__ void SetKernel(int* out, int value) { *out = value; }
__global__ void AddKernel(int* out, int value) { *out += value; }

class Stream : public testing::Test {
 protected:
  void SetUp() override {
    for (cudaStream_t& stream : streams_) {
      ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    }
    ASSERT_EQ(cudaMallocHost(reinterpret_cast<void**>(&host_), 4 * sizeof(int)), cudaSuccess);
    for (int i = 0; i < 4; ++i) host_[i] = 0;
  }
  void TearDown() override {
    for (cudaStream_t stream : streams_) EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    EXPECT_EQ(cudaFreeHost(host_), cudaSuccess);
  }
  void Set(cudaStream_t stream, int value) {
    ASSERT_EQ(simt::Launch("set", dim3(1), dim3(1), 0, stream, SetKernel, cell_.data(), value),
              cudaSuccess);
  }
  void Add(cudaStream_t stream, int value) {
    ASSERT_EQ(simt::Launch("add", dim3(1), dim3(1), 0, stream, AddKernel, cell_.data(), value),
              cudaSuccess);
  }
  void Fetch(cudaStream_t stream, int to = 0) {
    ASSERT_EQ(
        cudaMemcpyAsync(host_ + to, cell_.data(), sizeof(int), cudaMemcpyDeviceToHost, stream),
        cudaSuccess);
  }

  cudaStream_t streams_[2] = {};
  DeviceArray<int> cell_{1};
  int* host_ = nullptr;
};

TEST_F(Stream, WorkRunsWhenTheHostWaits) {
  Set(streams_[0], 5);
  Fetch(streams_[0]);
  EXPECT_EQ(Peek(&host_[0]), 0);
  EXPECT_EQ(cudaStreamSynchronize(streams_[1]), cudaSuccess);
  EXPECT_EQ(Peek(&host_[0]), 0);
  EXPECT_EQ(cudaStreamSynchronize(streams_[0]), cudaSuccess);
  EXPECT_EQ(host_[0], 5);
}

TEST_F(Stream, AnEventRunsWhatIsBeforeIt) {
  cudaEvent_t event = nullptr;
  ASSERT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);  // never recorded
  Set(streams_[0], 5);
  Fetch(streams_[0], 0);
  ASSERT_EQ(cudaEventRecord(event, streams_[0]), cudaSuccess);
  Fetch(streams_[0], 1);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);  // once after each record
  EXPECT_EQ(Peek(&host_[0]), 0);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(event), cudaSuccess);
  EXPECT_EQ(host_[0], 5);
  EXPECT_EQ(Peek(&host_[1]), 0);
  EXPECT_EQ(cudaStreamQuery(streams_[0]), cudaSuccess);
  EXPECT_EQ(host_[1], 5);
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
}

TEST_F(Stream, AStreamWaitsForTheEventAsItWasRecorded) {
  cudaEvent_t event = nullptr;
  ASSERT_EQ(cudaEventCreate(&event), cudaSuccess);
  Set(streams_[0], 5);
  ASSERT_EQ(cudaEventRecord(event, streams_[0]), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(streams_[1], event, 0), cudaSuccess);
  Add(streams_[1], 10);
  ASSERT_EQ(cudaEventRecord(event, streams_[1]), cudaSuccess);  // does not change the wait above
  ASSERT_EQ(cudaStreamWaitEvent(streams_[0], event, 0), cudaSuccess);
  Add(streams_[0], 100);
  Fetch(streams_[0]);
  ASSERT_EQ(cudaEventDestroy(event), cudaSuccess);  // allowed while the work waits
  EXPECT_EQ(cudaStreamSynchronize(streams_[0]), cudaSuccess);
  EXPECT_EQ(host_[0], 115);
}

TEST_F(Stream, TheDefaultStreamIsOrderedWithBlockingStreams) {
  cudaStream_t blocking = nullptr;
  ASSERT_EQ(cudaStreamCreate(&blocking), cudaSuccess);
  Set(blocking, 1);
  Add(nullptr, 10);
  Add(blocking, 100);
  Fetch(blocking);
  EXPECT_EQ(cudaStreamSynchronize(blocking), cudaSuccess);
  EXPECT_EQ(host_[0], 111);
  Add(blocking, 1000);
  Fetch(nullptr, 1);
  EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  EXPECT_EQ(host_[1], 1111);
  EXPECT_EQ(cudaStreamDestroy(blocking), cudaSuccess);
}

TEST_F(Stream, DeviceSynchronizeAndFreeRunEverything) {
  Set(streams_[0], 5);
  Fetch(streams_[0]);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(host_[0], 5);
  void* other = nullptr;
  ASSERT_EQ(cudaMalloc(&other, 16), cudaSuccess);
  Add(streams_[1], 1);
  Fetch(streams_[1]);
  EXPECT_EQ(cudaFree(other), cudaSuccess);
  EXPECT_EQ(host_[0], 6);
}

TEST_F(Stream, HostFunctionsRunInOrder) {
  Set(streams_[0], 7);
  Fetch(streams_[0]);
  ASSERT_EQ(cudaLaunchHostFunc(
                streams_[0], [](void* p) { static_cast<int*>(p)[1] = 2 * static_cast<int*>(p)[0]; },
                host_),
            cudaSuccess);
  EXPECT_EQ(Peek(&host_[1]), 0);
  EXPECT_EQ(cudaStreamSynchronize(streams_[0]), cudaSuccess);
  EXPECT_EQ(host_[1], 14);
}

TEST_F(Stream, EagerStreamsRunAtOnce) {
  simt::options().eager = true;
  Set(streams_[0], 5);
  Fetch(streams_[0]);
  simt::options().eager = false;
  EXPECT_EQ(cudaStreamSynchronize(streams_[0]), cudaSuccess);
  EXPECT_EQ(host_[0], 5);
}

TEST_F(Stream, ElapsedTime) {
  cudaEvent_t events[2];
  for (cudaEvent_t& event : events) ASSERT_EQ(cudaEventCreate(&event), cudaSuccess);
  float time = -1.0F;
  EXPECT_EQ(cudaEventElapsedTime(&time, events[0], events[1]), cudaErrorInvalidResourceHandle);
  ASSERT_EQ(cudaEventRecord(events[0], streams_[0]), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(events[1], streams_[0]), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&time, events[0], events[1]), cudaErrorNotReady);
  EXPECT_EQ(cudaEventSynchronize(events[1]), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&time, events[0], events[1]), cudaSuccess);
  EXPECT_GE(time, 0.0F);
  for (cudaEvent_t event : events) EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
  cudaGetLastError();
}

TEST_F(Stream, TwoHostThreads) {
  std::vector<std::thread> threads;
  std::vector<int> results(2);
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([this, i, &results] {
      const DeviceArray<int> cell(1);
      simt::Launch("set", dim3(1), dim3(1), 0, streams_[i], SetKernel, cell.data(), i);
      for (int round = 0; round < 50; ++round) {
        simt::Launch("add", dim3(1), dim3(1), 0, streams_[i], AddKernel, cell.data(), 10);
        if (round % 10 == 0) cudaStreamSynchronize(streams_[i]);
      }
      cudaMemcpyAsync(&results[i], cell.data(), sizeof(int), cudaMemcpyDeviceToHost, streams_[i]);
      cudaStreamSynchronize(streams_[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(results, (std::vector<int>{500, 501}));
}

// ---------------------------------------------------------------------------- memory

TEST(Memory, IsUnsetNaNAndCounted) {
  size_t free_before = 0;
  size_t total = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_before, &total), cudaSuccess);
  EXPECT_EQ(total, size_t{80} << 30);
  float* data = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), 1000), cudaSuccess);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 256, 0U);
  EXPECT_NE(data[10], data[10]);
  size_t free_after = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_after, &total), cudaSuccess);
  EXPECT_EQ(free_before - free_after, 1000U);
  cudaPointerAttributes attributes;
  ASSERT_EQ(cudaPointerGetAttributes(&attributes, data + 100), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
  EXPECT_EQ(cudaFree(data), cudaSuccess);
  EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
  ASSERT_EQ(cudaPointerGetAttributes(&attributes, &total), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered);
}

TEST(Memory, ErrorsOfTheCaller) {
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, size_t{1} << 40), cudaErrorMemoryAllocation);
  EXPECT_EQ(data, nullptr);
  EXPECT_EQ(cudaPeekAtLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  int on_stack = 0;
  EXPECT_EQ(cudaFree(&on_stack), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpyAsync(nullptr, &on_stack, 4, cudaMemcpyDefault, nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(cudaSetDevice(1), cudaErrorInvalidDevice);
  EXPECT_STREQ(cudaGetErrorName(cudaGetLastError()), "cudaErrorInvalidDevice");
}

TEST(Memory, TwoDimensionalCopiesAndMemset) {
  const DeviceArray<int> device(std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  std::vector<int> host(6, -1);
  ASSERT_EQ(cudaMemcpy2DAsync(host.data(), 8, device.data() + 1, 16, 8, 3, cudaMemcpyDeviceToHost,
                              nullptr),
            cudaSuccess);
  EXPECT_EQ(Peek(&host[0]), -1);
  ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  EXPECT_EQ(host, (std::vector<int>{1, 2, 5, 6, 9, 10}));
  EXPECT_EQ(
      cudaMemcpy2DAsync(host.data(), 4, device.data(), 16, 8, 3, cudaMemcpyDeviceToHost, nullptr),
      cudaErrorInvalidPitchValue);
  ASSERT_EQ(cudaMemsetAsync(device.data(), 0, 8, nullptr), cudaSuccess);
  EXPECT_EQ(device.Host()[1], 0);
  EXPECT_EQ(device.Host()[2], 2);
  cudaGetLastError();
}

TEST(Device, Properties) {
  int count = 0;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  EXPECT_EQ(count, 1);
  cudaDeviceProp properties;
  ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  EXPECT_EQ(properties.warpSize, 32);
  int opt_in = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&opt_in, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
            cudaSuccess);
  EXPECT_EQ(opt_in, 227 * 1024);
  int blocks = 0;
  ASSERT_EQ(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, SetKernel, 256, 100 * 1024),
            cudaSuccess);
  EXPECT_EQ(blocks, 2);
}

// ---------------------------------------------------------------------------- failures on request

class Failures : public testing::Test {
 protected:
  void TearDown() override {
    simt::device::SetFailures("");
    cudaGetLastError();
  }
};

TEST_F(Failures, TheThirdAllocation) {
  simt::device::SetFailures("malloc:3");
  void* data[4] = {};
  EXPECT_EQ(cudaMalloc(&data[0], 8), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&data[1], 8), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&data[2], 8), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaMalloc(&data[3], 8), cudaSuccess);
  for (void* block : data) EXPECT_EQ(cudaFree(block), cudaSuccess);
}

TEST_F(Failures, TheLaunchOfAKernelByName) {
  simt::device::SetFailures("launch:add");
  const DeviceArray<int> cell(std::vector<int>{1});
  EXPECT_EQ(simt::Launch("set", dim3(1), dim3(1), 0, nullptr, SetKernel, cell.data(), 2),
            cudaSuccess);
  EXPECT_NE(simt::Launch("add", dim3(1), dim3(1), 0, nullptr, AddKernel, cell.data(), 2),
            cudaSuccess);
  EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchOutOfResources);
  EXPECT_EQ(cell.Host()[0], 2);
}

TEST_F(Failures, AFailedSynchronizeStays) {
  simt::device::SetFailures("sync:2");
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, 8), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
}

TEST(Environment, SetsFailuresAndMemory) {
  EXPECT_EQ(simt_test::Child("SALA_SIMT_FAIL=launch:planted " SIMT_PLANTED_BUGS " none").exit_code,
            4);
  EXPECT_NE(simt_test::Child("SALA_SIMT_MEMORY=100 " SIMT_PLANTED_BUGS " none").exit_code, 0);
  const auto small =
      simt_test::Child("SALA_SIMT_SHARED=100 " SIMT_PLANTED_BUGS " too_much_shared_at_launch");
  EXPECT_NE(small.output.find("the limit is 100"), std::string::npos) << small.output;
  // Eager work is done, but the host still may not look: ThreadSanitizer knows.
#if defined(__SANITIZE_THREAD__)
  const int expected = 66;
#else
  const int expected = 0;
#endif
  EXPECT_EQ(simt_test::Child("SALA_SIMT_EAGER=1 " SIMT_PLANTED_BUGS " missing_stream_synchronize")
                .exit_code,
            expected);
}

}  // namespace
