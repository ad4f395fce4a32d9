// A program of planted bugs: simt_planted_bugs NAME runs one. Exit code 0: the result is right, 4:
// it is wrong; anything else is the emulator's or a sanitizer's own. bugs_test.cc says who finds
// what.
#include <cuda_bf16.h>
#include <simt.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "kernels/common/ptx.h"

namespace {

namespace ptx = sala::kernels::ptx;
using sala::kernels::SharedMemory;

constexpr int kThreads = 64;
constexpr int kWrong = 4;

int Thread() { return static_cast<int>(threadIdx.x); }

// Buffers on the device: x[i] = i, y unset. `expected` is compared with the first elements of y.
class Trial {
 public:
  Trial() {
    cudaMalloc(reinterpret_cast<void**>(&x_), kElements * sizeof(float));
    cudaMalloc(reinterpret_cast<void**>(&y_), kElements * sizeof(float));
    std::vector<float> values(kElements);
    for (int i = 0; i < kElements; ++i) values[i] = static_cast<float>(i);
    cudaMemcpy(x_, values.data(), kElements * sizeof(float), cudaMemcpyHostToDevice);
  }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  using Kernel = void (*)(const float*, float*);
  void Launch(Kernel kernel, int blocks = 1, int shared_bytes = 4096, int threads = kThreads) {
    simt::Launch("planted", dim3(blocks), dim3(threads), shared_bytes, nullptr, kernel, x_, y_);
  }
  template <typename Expected>
  int Compare(int count, const Expected& expected) {
    std::vector<float> result(kElements);
    cudaMemcpy(result.data(), y_, kElements * sizeof(float), cudaMemcpyDeviceToHost);
    cudaFree(x_);
    cudaFree(y_);
    for (int i = 0; i < count; ++i) {
      if (result[i] != static_cast<float>(expected(i))) return kWrong;
    }
    return 0;
  }
  float* x() const { return x_; }
  float* y() const { return y_; }

  static constexpr int kElements = 256;

 private:
  float* x_ = nullptr;
  float* y_ = nullptr;
};

int Same(int i) { return i; }

int RunAndCompare(Trial::Kernel kernel, int (*expected)(int) = Same) {
  Trial trial;
  trial.Launch(kernel);
  return trial.Compare(kThreads, expected);
}

// ---------------------------------------------------------------------------- barriers

__global__ void MissingBarrier(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  s[Thread()] = x[Thread()];
  y[Thread()] = s[kThreads - 1 - Thread()];
}

// In natural order thread 40 runs before thread 60.
__global__ void MissingBarrierByLuck(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  s[Thread()] = x[Thread()];
  __syncthreads();
  if (Thread() == 40) s[3] = 77.0F;
  y[Thread()] = Thread() == 60 ? s[3] : x[Thread()];
}

__global__ void MissingSecondBarrier(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  float sum = 0.0F;
  for (int round = 0; round < 2; ++round) {
    s[Thread()] = x[Thread()] + static_cast<float>(round);
    __syncthreads();
    sum += s[kThreads - 1 - Thread()];
  }
  y[Thread()] = sum;
}

__global__ void DivergentBarrier(const float* x, float* y) {
  if (Thread() < 32) {
    __syncthreads();
  } else {
    y[0] = 0.0F;
    __syncthreads();
  }
  y[Thread()] = x[Thread()];
}

__global__ void BarrierInHalfAWarp(const float* x, float* y) {
  if (Thread() % 32 < 16) __syncthreads();
  y[Thread()] = __shfl_xor_sync(~0U, x[Thread()], 0);
}

// ---------------------------------------------------------------------------- warps

__global__ void DivergentShuffle(const float* x, float* y) {
  float v = x[Thread()];
  if (Thread() % 32 < 16) v = __shfl_sync(~0U, v, Thread());
  y[Thread()] = v;
}

__global__ void ShufflesInTwoBranches(const float* x, float* y) {
  float v = x[Thread()];
  if (Thread() % 2 == 0) {
    v = __shfl_sync(~0U, v, Thread());
  } else {
    v = __shfl_sync(~0U, v, Thread());
  }
  y[Thread()] = v;
}

__global__ void ShuffleFromExitedLane(const float* x, float* y) {
  if (Thread() % 32 == 31) return;
  y[Thread()] = __shfl_sync(~0U, x[Thread()], 31);
}

// A shuffle does not order memory.
__global__ void ShuffleAsFence(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  s[Thread()] = x[Thread()];
  const float unused = __shfl_sync(~0U, x[Thread()], 0);
  y[Thread()] = s[Thread() ^ 1] + 0.0F * unused;
}

__global__ void MmaInHalfAWarp(const float* x, float* y) {
  float c[4] = {};
  const uint32_t a[4] = {};
  if (Thread() % 32 >= 16) return;
  ptx::MmaBf16(c, a, 0, 0);
  y[Thread()] = x[Thread()] + c[0];
}

// ---------------------------------------------------------------------------- asynchronous copies

__global__ void MissingCopyWait(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  ptx::CpAsync4(s + Thread(), x + Thread());
  ptx::CpAsyncCommit();
  __syncthreads();
  y[Thread()] = s[kThreads - 1 - Thread()];
  __syncthreads();
  ptx::CpAsyncWait<0>();
}

__global__ void WaitForTooFewCopies(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(2 * kThreads);
  for (int stage = 0; stage < 2; ++stage) {
    ptx::CpAsync4(s + stage * kThreads + Thread(), x + Thread());
    ptx::CpAsyncCommit();
  }
  ptx::CpAsyncWait<1>();
  y[Thread()] = s[kThreads + Thread()];
  ptx::CpAsyncWait<0>();
}

__global__ void GroupNeverWaitedFor(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  ptx::CpAsync4(s + Thread(), x + Thread());
  ptx::CpAsyncCommit();
  y[Thread()] = x[Thread()];
}

// The next copy starts while others still read what the last one brought.
__global__ void CopyOverReaders(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  ptx::CpAsync4(s + Thread(), x + Thread());
  ptx::CpAsyncCommit();
  for (int round = 0; round < 2; ++round) {
    ptx::CpAsyncWait<0>();
    __syncthreads();
    ptx::CpAsync4(s + Thread(), x + Thread());
    ptx::CpAsyncCommit();
    y[Thread()] = s[kThreads - 1 - Thread()];
  }
  ptx::CpAsyncWait<0>();
}

__global__ void MisalignedCopy(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(4 * kThreads + 1);
  ptx::CpAsync16(s + 4 * Thread() + 1, x);
  ptx::CpAsyncCommit();
  ptx::CpAsyncWait<0>();
  y[Thread()] = s[1];
}

// ---------------------------------------------------------------------------- matrices

__global__ void MisalignedLdMatrix(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<__nv_bfloat16>(32 * 8 + 4);
  for (int i = Thread(); i < 32 * 8 + 4; i += kThreads) s[i] = __float2bfloat16(x[0]);
  __syncthreads();
  uint32_t r[4];
  ptx::LdMatrix4(r, s + Thread() % 32 * 8 + 4);
  y[Thread()] = static_cast<float>(Thread() + static_cast<int>(r[0]));
}

__global__ void LdMatrixWithoutBarrier(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<__nv_bfloat16>(64 * 8);
  for (int i = 0; i < 8; ++i) s[(kThreads - 1 - Thread()) * 8 + i] = __float2bfloat16(x[0]);
  uint32_t r[4];
  ptx::LdMatrix4(r, s + Thread() * 8);
  y[Thread()] = static_cast<float>(Thread() + static_cast<int>(r[0]));
}

// ---------------------------------------------------------------------------- memory

__global__ void SharedWriteBehind(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  shared.Take<float>(kThreads);
  s[Thread() + 1] = x[Thread()];
  y[Thread()] = x[Thread()];
}

__global__ void SharedWriteBefore(const float* x, float* y) {
  SharedMemory shared;
  shared.Take<float>(kThreads);
  auto* s = shared.Take<float>(kThreads);
  s[Thread() - 1] = x[Thread()];
  y[Thread()] = x[Thread()];
}

__global__ void SharedReadBehind(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  s[Thread()] = x[Thread()];
  __syncthreads();
  y[Thread()] = Thread() == kThreads - 1 ? s[Thread() + 1] : s[Thread()];
}

__global__ void UnsetShared(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(kThreads);
  if (Thread() != 5) s[Thread()] = x[Thread()];
  y[Thread()] = s[Thread()];
}

__global__ void UnsetOutput(const float* x, float* y) {
  if (Thread() != 5) y[Thread()] = x[Thread()];
}

__global__ void GlobalWriteBehind(const float* x, float* y) {
  y[Thread()] = x[Thread()];
  if (Thread() == 0) y[Trial::kElements] = 1.0F;
}

__global__ void GlobalReadBehind(const float* x, float* y) {
  y[Thread()] = x[Thread()] + x[Trial::kElements] * 0.0F;
}

__global__ void MisalignedVector(const float* x, float* y) {
  const auto four = *reinterpret_cast<const float4*>(x + Thread() + 1);
  y[Thread()] = four.x - 1.0F;
}

__global__ void SumWithoutAtomic(const float*, float* y) {
  if (Thread() == 0) y[0] = 0.0F;
  __syncthreads();
  y[0] += 1.0F;
}

__global__ void BlocksMeet(const float* x, float* y) {
  if (blockIdx.x == 0) y[Thread()] = x[Thread()];
  if (blockIdx.x == 1) y[Thread()] = y[Thread()] + 1.0F;
}

__global__ void TakesTooMuch(const float* x, float* y) {
  SharedMemory shared;
  auto* s = shared.Take<float>(1000);
  auto* t = shared.Take<float>(100);
  s[Thread()] = t[Thread()] = 0.0F;
  y[Thread()] = x[Thread()];
}

__global__ void TakesInDifferentOrder(const float* x, float* y) {
  SharedMemory shared;
  shared.Take<float>(Thread() < 32 ? 10 : 20);
  y[Thread()] = x[Thread()];
}

__global__ void CopyKernel(const float* x, float* y) { y[Thread()] = x[Thread()]; }
__global__ void AddKernel(const float* x, float* y) { y[Thread()] = x[Thread()] + 1.0F; }

// ---------------------------------------------------------------------------- the host's part

int MissingStreamSynchronize() {
  const Trial trial;
  float* pinned = nullptr;
  cudaMallocHost(reinterpret_cast<void**>(&pinned), sizeof(float));
  *pinned = 0.0F;
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaMemcpyAsync(pinned, trial.x() + 7, sizeof(float), cudaMemcpyDeviceToHost, stream);
  const bool right = *pinned == 7.0F;
  cudaStreamSynchronize(stream);
  return right ? 0 : kWrong;
}

// The host waits for the second stream, which should have waited for the first.
int MissingEvent(bool wait_for_both) {
  const Trial trial;
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  float result = 0.0F;
  simt::Launch("copy", dim3(1), dim3(64), 0, streams[0], CopyKernel, trial.x(), trial.y());
  simt::Launch("add", dim3(1), dim3(64), 0, streams[1], AddKernel, trial.y(), trial.y());
  cudaMemcpyAsync(&result, trial.y() + 7, sizeof(float), cudaMemcpyDeviceToHost, streams[1]);
  if (wait_for_both) cudaStreamSynchronize(streams[0]);
  cudaStreamSynchronize(streams[1]);
  return result == 8.0F ? 0 : kWrong;
}

int LaunchOnFreedMemory() {
  float* x = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&x), 64 * sizeof(float));
  cudaMemset(x, 0, 64 * sizeof(float));
  cudaFree(x);
  simt::Launch("freed", dim3(1), dim3(64), 0, nullptr, CopyKernel, x, x);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : kWrong;
}

int LaunchWith(int threads, int shared_bytes) {
  Trial trial;
  trial.Launch(CopyKernel, 1, shared_bytes, threads);
  return trial.Compare(kThreads, Same);
}

using Bug = int (*)();

const std::map<std::string, Bug>& Bugs() {
  static const std::map<std::string, Bug> bugs = {
      {"none", [] { return RunAndCompare(CopyKernel); }},
      {"missing_barrier",
       [] { return RunAndCompare(MissingBarrier, [](int i) { return 63 - i; }); }},
      {"missing_barrier_by_luck",
       [] { return RunAndCompare(MissingBarrierByLuck, [](int i) { return i == 60 ? 77 : i; }); }},
      {"missing_second_barrier",
       [] { return RunAndCompare(MissingSecondBarrier, [](int i) { return 127 - 2 * i; }); }},
      {"divergent_barrier", [] { return RunAndCompare(DivergentBarrier); }},
      {"barrier_in_half_a_warp", [] { return RunAndCompare(BarrierInHalfAWarp); }},
      {"divergent_shuffle", [] { return RunAndCompare(DivergentShuffle); }},
      {"shuffles_in_two_branches", [] { return RunAndCompare(ShufflesInTwoBranches); }},
      {"shuffle_from_exited_lane", [] { return RunAndCompare(ShuffleFromExitedLane); }},
      {"shuffle_as_fence",
       [] { return RunAndCompare(ShuffleAsFence, [](int i) { return i ^ 1; }); }},
      {"mma_in_half_a_warp", [] { return RunAndCompare(MmaInHalfAWarp); }},
      {"missing_copy_wait",
       [] { return RunAndCompare(MissingCopyWait, [](int i) { return 63 - i; }); }},
      {"wait_for_too_few_copies", [] { return RunAndCompare(WaitForTooFewCopies); }},
      {"group_never_waited_for", [] { return RunAndCompare(GroupNeverWaitedFor); }},
      {"copy_over_readers",
       [] { return RunAndCompare(CopyOverReaders, [](int i) { return 63 - i; }); }},
      {"misaligned_copy", [] { return RunAndCompare(MisalignedCopy, [](int) { return 0; }); }},
      {"misaligned_ldmatrix", [] { return RunAndCompare(MisalignedLdMatrix); }},
      {"ldmatrix_without_barrier", [] { return RunAndCompare(LdMatrixWithoutBarrier); }},
      {"shared_write_behind", [] { return RunAndCompare(SharedWriteBehind); }},
      {"shared_write_before", [] { return RunAndCompare(SharedWriteBefore); }},
      {"shared_read_behind", [] { return RunAndCompare(SharedReadBehind); }},
      {"unset_shared", [] { return RunAndCompare(UnsetShared); }},
      {"unset_output", [] { return RunAndCompare(UnsetOutput); }},
      {"global_write_behind", [] { return RunAndCompare(GlobalWriteBehind); }},
      {"global_read_behind", [] { return RunAndCompare(GlobalReadBehind); }},
      {"misaligned_vector", [] { return RunAndCompare(MisalignedVector); }},
      {"sum_without_atomic",
       [] {
         Trial trial;
         trial.Launch(SumWithoutAtomic);
         return trial.Compare(1, [](int) { return 64; });
       }},
      {"race_between_blocks",
       [] {
         Trial trial;
         trial.Launch(BlocksMeet, 2);
         return trial.Compare(kThreads, [](int i) { return i + 1; });
       }},
      {"takes_too_much", [] { return RunAndCompare(TakesTooMuch); }},
      {"takes_in_different_order", [] { return RunAndCompare(TakesInDifferentOrder); }},
      {"too_much_shared_at_launch", [] { return LaunchWith(64, 228 * 1024); }},
      {"too_many_threads", [] { return LaunchWith(1056, 0); }},
      {"missing_stream_synchronize", MissingStreamSynchronize},
      {"missing_event", [] { return MissingEvent(false); }},
      {"missing_event_by_luck", [] { return MissingEvent(true); }},
      {"launch_on_freed_memory", LaunchOnFreedMemory},
  };
  return bugs;
}

}  // namespace

int main(int argc, char** argv) {
  const auto found = argc == 2 ? Bugs().find(argv[1]) : Bugs().end();
  if (found == Bugs().end()) {
    std::fprintf(stderr, "usage: %s BUG\n", argv[0]);
    return 2;
  }
  const int result = found->second();
  std::puts(result == 0 ? "right answer" : "wrong answer");
  return result;
}
