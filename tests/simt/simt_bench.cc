// Speed of the emulator on one core: switches between threads, warp instructions, tensor-core
// products, whole kernels.
#include <benchmark/benchmark.h>
#include <simt.h>

#include <vector>

#include "tests/simt/sample_kernels.h"

namespace {

namespace ptx = sala::kernels::ptx;

constexpr int kRounds = 200;

__global__ void BarrierKernel() {
  for (int i = 0; i < kRounds; ++i) __syncthreads();
}

__global__ void ShuffleKernel(float* out) {
  float v = static_cast<float>(threadIdx.x);
  for (int i = 0; i < kRounds; ++i) v = __shfl_xor_sync(~0U, v, i % 32);
  out[threadIdx.x] = v;
}

__global__ void MmaKernel(float* out) {
  float c[4] = {};
  const uint32_t a[4] = {0x3f803f80U, 0x3f803f80U, 0x3f803f80U, 0x3f803f80U};
  for (int i = 0; i < kRounds; ++i) ptx::MmaBf16(c, a, a[0], a[1]);
  out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}

__global__ void EmptyKernel() {}

using benchmark::Counter;

void CountSwitches(benchmark::State& state) {
  state.counters["switches/s"] =
      Counter(static_cast<double>(simt::TakeStats().switches), Counter::kIsRate);
}

void Barriers(benchmark::State& state) {
  const auto threads = static_cast<unsigned>(state.range(0));
  simt::TakeStats();
  for (auto _ : state) {
    simt::Launch("barrier", dim3(1), dim3(threads), 0, nullptr, BarrierKernel);
    cudaDeviceSynchronize();
  }
  CountSwitches(state);
}
BENCHMARK(Barriers)->Arg(32)->Arg(128)->Arg(512);

void Shuffles(benchmark::State& state) {
  std::vector<float> out(128);
  simt::TakeStats();
  for (auto _ : state) {
    simt::Launch("shuffle", dim3(1), dim3(128), 0, nullptr, ShuffleKernel, out.data());
    cudaDeviceSynchronize();
  }
  CountSwitches(state);
}
BENCHMARK(Shuffles);

void MmaOnly(benchmark::State& state) {
  std::vector<float> out(32);
  for (auto _ : state) {
    simt::Launch("mma", dim3(1), dim3(32), 0, nullptr, MmaKernel, out.data());
    cudaDeviceSynchronize();
  }
  state.counters["FMA/s"] = Counter(16.0 * 8 * 16 * kRounds, Counter::kIsIterationInvariantRate);
}
BENCHMARK(MmaOnly);

void Threads(benchmark::State& state) {
  for (auto _ : state) {
    simt::Launch("empty", dim3(1000), dim3(256), 0, nullptr, EmptyKernel);
    cudaDeviceSynchronize();
  }
  state.counters["threads/s"] = Counter(256000.0, Counter::kIsIterationInvariantRate);
}
BENCHMARK(Threads);

void Gemm(benchmark::State& state) {
  const int m = 256;
  const int n = 256;
  const int k = 256;
  const std::vector<__nv_bfloat16> a(m * k);
  const std::vector<__nv_bfloat16> b(n * k);
  std::vector<float> c(m * n);
  for (auto _ : state) {
    simt::Launch("gemm", dim3(n / 64, m / 64), dim3(128), simt_samples::kGemmSharedBytes, nullptr,
                 simt_samples::GemmKernel, a.data(), b.data(), c.data(), m, n, k);
    cudaDeviceSynchronize();
  }
  state.counters["FMA/s"] = Counter(1.0 * m * n * k, Counter::kIsIterationInvariantRate);
}
BENCHMARK(Gemm);

void Norm(benchmark::State& state) {
  const std::vector<float> x(256 * 1000, 1.0F);
  std::vector<float> y(x.size());
  for (auto _ : state) {
    simt::Launch("norm", dim3(256), dim3(256), 128, nullptr, simt_samples::NormKernel<float>,
                 x.data(), y.data(), 1000, 1e-5F);
    cudaDeviceSynchronize();
  }
  state.counters["elements/s"] = Counter(256000.0, Counter::kIsIterationInvariantRate);
}
BENCHMARK(Norm);

}  // namespace

BENCHMARK_MAIN();
