// Every barrier, warp instruction and atomic, with full and partial masks, in several orders.
#include "tests/simt/launch.h"

namespace {

using simt_test::DeviceArray;
using simt_test::RunKernel;

int Lane() { return static_cast<int>(threadIdx.x) % 32; }
int Thread() { return static_cast<int>(threadIdx.x); }

class Warp : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { simt::options().seed = static_cast<uint64_t>(GetParam()); }
  void TearDown() override { simt::options().seed = 0; }
};
INSTANTIATE_TEST_SUITE_P(Orders, Warp, testing::Values(0, 1, 5));

// ---------------------------------------------------------------------------- shuffles

__global__ void ShuffleKernel(int* out, int width) {
  const int v = 100 + Lane();
  int* mine = out + Thread() * 8;
  mine[0] = __shfl_sync(~0U, v, 5, width);
  mine[1] = __shfl_sync(~0U, v, Lane() + 1, width);
  mine[2] = __shfl_xor_sync(~0U, v, 3, width);
  mine[3] = __shfl_xor_sync(~0U, v, 16, width);
  mine[4] = __shfl_down_sync(~0U, v, 3, width);
  mine[5] = __shfl_up_sync(~0U, v, 3, width);
  mine[6] = static_cast<int>(__shfl_sync(~0U, 1.5 * v, 2, width) * 2.0);
  mine[7] = static_cast<int>(__bfloat162float(
      __shfl_xor_sync(~0U, __float2bfloat16(static_cast<float>(Lane())), 1, width)));
}

TEST_P(Warp, Shuffles) {
  for (const int width : {32, 16, 8, 4}) {
    DeviceArray<int> out(64 * 8);
    RunKernel(dim3(1), dim3(64), 0, ShuffleKernel, out.data(), width);
    const auto host = out.Host();
    for (int thread = 0; thread < 64; ++thread) {
      const int lane = thread % 32;
      const int base = lane / width * width;
      const int* mine = &host[thread * 8];
      EXPECT_EQ(mine[0], 100 + base + 5 % width);
      EXPECT_EQ(mine[1], 100 + base + (lane + 1) % width);
      EXPECT_EQ(mine[2], 100 + (lane ^ 3));
      EXPECT_EQ(mine[3], 100 + ((lane ^ 16) < base + width ? lane ^ 16 : lane));
      EXPECT_EQ(mine[4], 100 + (lane + 3 < base + width ? lane + 3 : lane));
      EXPECT_EQ(mine[5], 100 + (lane - 3 >= base ? lane - 3 : lane));
      EXPECT_EQ(mine[6], 3 * (100 + base + 2 % width));
      EXPECT_EQ(mine[7], lane ^ 1);
    }
  }
}

// Each quarter of the warp on its own mask and at its own pace.
__global__ void PartialMaskKernel(int* out) {
  const int quarter = Lane() / 8;
  const unsigned mask = 0xffU << (8 * quarter);
  int v = Thread();
  for (int round = 0; round <= quarter; ++round) {
    for (int offset = 4; offset > 0; offset /= 2) v += __shfl_xor_sync(mask, v, offset);
  }
  __syncwarp();
  out[Thread()] = v;
}

TEST_P(Warp, PartialMasksRunApart) {
  DeviceArray<int> out(64);
  RunKernel(dim3(1), dim3(64), 0, PartialMaskKernel, out.data());
  const auto host = out.Host();
  for (int thread = 0; thread < 64; ++thread) {
    const int quarter = thread / 8;
    int sum = 0;
    for (int i = 0; i < 8; ++i) sum += quarter * 8 + i;
    for (int round = 0; round < thread % 32 / 8; ++round) sum *= 8;
    EXPECT_EQ(host[thread], sum) << thread;
  }
}

// Even lanes wait for each other twice before the whole warp meets.
__global__ void NestedMaskKernel(int* out) {
  int v = Lane();
  if (Lane() % 2 == 0) {
    v = __shfl_sync(0x55555555U, v, 30);
    __syncwarp(0x55555555U);
  }
  out[Thread()] = __shfl_sync(~0U, v, Lane() ^ 1);
}

TEST_P(Warp, MasksWithinMasks) {
  DeviceArray<int> out(32);
  RunKernel(dim3(1), dim3(32), 0, NestedMaskKernel, out.data());
  const auto host = out.Host();
  for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(host[lane], lane % 2 == 0 ? lane + 1 : 30);
}

__global__ void ShortWarpKernel(int* out) {
  int v = 1;
  for (int offset = 4; offset > 0; offset /= 2) v += __shfl_xor_sync(~0U, v, offset);
  out[Thread()] = v + 100 * __popc(__ballot_sync(~0U, 1));
}

TEST_P(Warp, LanesThatTheBlockDoesNotHave) {
  DeviceArray<int> out(40);
  RunKernel(dim3(1), dim3(40), 0, ShortWarpKernel, out.data());
  const auto host = out.Host();
  for (int thread = 0; thread < 40; ++thread) EXPECT_EQ(host[thread], thread < 32 ? 3208 : 808);
}

// ---------------------------------------------------------------------------- votes, reductions

__global__ void VoteKernel(unsigned* out) {
  const unsigned half = Lane() < 16 ? 0xffffU : 0xffff0000U;
  unsigned* mine = out + Thread() * 8;
  mine[0] = __ballot_sync(~0U, Lane() % 3 == 0);
  mine[1] = __ballot_sync(half, Lane() % 2 == 0);
  mine[2] = static_cast<unsigned>(__any_sync(half, Lane() == 3));
  mine[3] = static_cast<unsigned>(__all_sync(half, Lane() != 3));
  mine[4] = __match_any_sync(~0U, Lane() / 5);
  mine[5] = __match_any_sync(half, static_cast<unsigned long long>(Lane() % 2) << 40);
}

TEST_P(Warp, Votes) {
  DeviceArray<unsigned> out(32 * 8);
  RunKernel(dim3(1), dim3(32), 0, VoteKernel, out.data());
  const auto host = out.Host();
  for (int lane = 0; lane < 32; ++lane) {
    const unsigned* mine = &host[lane * 8];
    const unsigned half = lane < 16 ? 0xffffU : 0xffff0000U;
    unsigned thirds = 0;
    unsigned same = 0;
    for (int other = 0; other < 32; ++other) {
      thirds |= (other % 3 == 0 ? 1U : 0U) << other;
      same |= (other / 5 == lane / 5 ? 1U : 0U) << other;
    }
    EXPECT_EQ(mine[0], thirds);
    EXPECT_EQ(mine[1], 0x55555555U & half);
    EXPECT_EQ(mine[2], lane < 16 ? 1U : 0U);
    EXPECT_EQ(mine[3], lane < 16 ? 0U : 1U);
    EXPECT_EQ(mine[4], same);
    EXPECT_EQ(mine[5], (lane % 2 == 0 ? 0x55555555U : 0xaaaaaaaaU) & half);
  }
}

__global__ void ReduceKernel(int* out) {
  const int v = Lane() - 10;
  const auto u = static_cast<unsigned>(v);
  int* mine = out + Lane() * 9;
  mine[0] = __reduce_add_sync(~0U, v);
  mine[1] = __reduce_min_sync(~0U, v);
  mine[2] = __reduce_max_sync(~0U, v);
  mine[3] = static_cast<int>(__reduce_add_sync(~0U, u));
  mine[4] = static_cast<int>(__reduce_min_sync(~0U, u));
  mine[5] = static_cast<int>(__reduce_max_sync(~0U, u));
  mine[6] = static_cast<int>(__reduce_and_sync(~0U, u | 4U));
  mine[7] = static_cast<int>(__reduce_or_sync(0xffffU << (Lane() / 16 * 16), 1U << Lane()));
  mine[8] = static_cast<int>(__reduce_xor_sync(~0U, u));
}

TEST_P(Warp, Reductions) {
  DeviceArray<int> out(32 * 9);
  RunKernel(dim3(1), dim3(32), 0, ReduceKernel, out.data());
  const auto host = out.Host();
  unsigned all = ~0U;
  unsigned odd = 0;
  for (int lane = 0; lane < 32; ++lane) {
    all &= static_cast<unsigned>(lane - 10) | 4U;
    odd ^= static_cast<unsigned>(lane - 10);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int* mine = &host[lane * 9];
    EXPECT_EQ(mine[0], 176);
    EXPECT_EQ(mine[1], -10);
    EXPECT_EQ(mine[2], 21);
    EXPECT_EQ(mine[3], 176);
    EXPECT_EQ(mine[4], 0);
    EXPECT_EQ(mine[5], -1);
    EXPECT_EQ(mine[6], static_cast<int>(all));
    EXPECT_EQ(mine[7], static_cast<int>(lane < 16 ? 0xffffU : 0xffff0000U));
    EXPECT_EQ(mine[8], static_cast<int>(odd));
  }
}

// ---------------------------------------------------------------------------- barriers

__global__ void BarrierKernel(int* out) {
  sala::kernels::SharedMemory shared;
  auto* values = shared.Take<int>(blockDim.x);
  const int n = static_cast<int>(blockDim.x);
  int v = Thread();
  for (int round = 0; round < 3; ++round) {
    values[Thread()] = v;
    __syncthreads();
    v = values[(Thread() + 1) % n];
    __syncthreads();
  }
  int* mine = out + Thread() * 4;
  mine[0] = v;
  mine[1] = __syncthreads_count(Thread() % 3 == 0);
  mine[2] = __syncthreads_and(Thread() < 60);
  mine[3] = __syncthreads_or(Thread() == 60);
}

TEST_P(Warp, Barriers) {
  for (const int threads : {33, 64, 100}) {
    DeviceArray<int> out(threads * 4);
    RunKernel(dim3(1), dim3(threads), 512, BarrierKernel, out.data());
    const auto host = out.Host();
    for (int thread = 0; thread < threads; ++thread) {
      EXPECT_EQ(host[thread * 4], (thread + 3) % threads);
      EXPECT_EQ(host[thread * 4 + 1], (threads + 2) / 3);
      EXPECT_EQ(host[thread * 4 + 2], threads <= 60 ? 1 : 0);
      EXPECT_EQ(host[thread * 4 + 3], threads > 60 ? 1 : 0);
    }
  }
}

// Threads that have ended are not waited for, whenever they end.
__global__ void ExitedKernel(int* out) {
  sala::kernels::SharedMemory shared;
  auto* values = shared.Take<int>(blockDim.x);
  values[Thread()] = Thread();
  __syncthreads();
  if (Thread() >= 70) return;
  __syncthreads();
  if (Thread() >= 35) return;
  out[Thread()] = __syncthreads_count(1) + values[Thread()];
}

TEST_P(Warp, BarriersWithExitedThreads) {
  DeviceArray<int> out(35);
  RunKernel(dim3(1), dim3(128), 512, ExitedKernel, out.data());
  const auto host = out.Host();
  for (int thread = 0; thread < 35; ++thread) EXPECT_EQ(host[thread], 35 + thread);
}

__global__ void SyncWarpKernel(int* out) {
  sala::kernels::SharedMemory shared;
  auto* values = shared.Take<int>(blockDim.x);
  values[Thread()] = Thread();
  __syncwarp();
  out[Thread()] = values[Thread() ^ 7];
}

TEST_P(Warp, SyncWarpOrdersMemory) {
  DeviceArray<int> out(96);
  RunKernel(dim3(1), dim3(96), 96 * 4, SyncWarpKernel, out.data());
  const auto host = out.Host();
  for (int thread = 0; thread < 96; ++thread) EXPECT_EQ(host[thread], thread ^ 7);
}

// ---------------------------------------------------------------------------- atomics

template <typename T>
__global__ void AtomicKernel(T* cells) {
  const auto v = static_cast<T>(Thread() + 1);
  atomicAdd(&cells[0], v);
  atomicMax(&cells[1], v);
  atomicMin(&cells[2], v);
  atomicOr(&cells[3], static_cast<T>(T{1} << (Thread() % 20)));
  atomicAnd(&cells[4], static_cast<T>(~(T{1} << (Thread() % 20))));
  atomicExch(&cells[5], v);
  T old = cells[6 + 1];  // never written in here
  do {
    old = atomicCAS(&cells[6], T{0}, v);
  } while (old != T{0} && atomicCAS(&cells[6], v, T{0}) == v);
}

template <typename T>
void TestAtomics() {
  const DeviceArray<T> cells(std::vector<T>{0, 0, 1000, 0, static_cast<T>(~T{0}), 0, 0, 0});
  RunKernel(dim3(3), dim3(64), 0, AtomicKernel<T>, cells.data());
  const auto host = cells.Host();
  EXPECT_EQ(host[0], T{3 * 64 * 65 / 2});
  EXPECT_EQ(host[1], T{64});
  EXPECT_EQ(host[2], T{1});
  EXPECT_EQ(host[3], T{(1 << 20) - 1});
  EXPECT_EQ(host[4], static_cast<T>(~T{(1 << 20) - 1}));
  EXPECT_NE(host[5], T{0});
  EXPECT_NE(host[6], T{0});
}

TEST_P(Warp, Atomics) {
  TestAtomics<int>();
  TestAtomics<unsigned>();
  TestAtomics<unsigned long long>();
}

template <typename T>
concept HasAtomicAdd = requires(T* address, T value) {
  atomicAdd(address, value);
};
static_assert(HasAtomicAdd<int> && HasAtomicAdd<unsigned> && HasAtomicAdd<unsigned long long>);
static_assert(!HasAtomicAdd<float> && !HasAtomicAdd<double> && !HasAtomicAdd<__nv_bfloat16>);

// ---------------------------------------------------------------------------- the grid

__global__ void IndexKernel(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned size = blockDim.x * blockDim.y * blockDim.z;
  // A switch in between: the variables belong to the thread, not to the moment.
  const unsigned lane_sum = __reduce_add_sync(~0U, threadIdx.x + 100 * threadIdx.y);
  out[block * size + thread] =
      1000 * threadIdx.x + 100 * threadIdx.y + 10 * threadIdx.z + block + 0 * lane_sum;
}

TEST_P(Warp, IndicesOfEveryThread) {
  for (const int os_threads : {1, 3}) {
    simt::options().os_threads = os_threads;
    DeviceArray<unsigned> out(6 * 24);
    RunKernel(dim3(3, 1, 2), dim3(4, 3, 2), 0, IndexKernel, out.data());
    const auto host = out.Host();
    for (unsigned i = 0; i < 6 * 24; ++i) {
      const unsigned t = i % 24;
      EXPECT_EQ(host[i], 1000 * (t % 4) + 100 * (t / 4 % 3) + 10 * (t / 12) + i / 24);
    }
  }
  simt::options().os_threads = 1;
}

__global__ void BlockOrderKernel(int* order, int* next) {
  if (Thread() == 0) order[atomicAdd(next, 1)] = static_cast<int>(blockIdx.x);
}

TEST(Grid, EveryBlockOnceInAnOrderOfTheSeed) {
  for (const int seed : {0, 1, 2, 3, 4}) {
    simt::options().seed = static_cast<uint64_t>(seed);
    const DeviceArray<int> order(60);
    const DeviceArray<int> next(std::vector<int>{0});
    RunKernel(dim3(60), dim3(1), 0, BlockOrderKernel, order.data(), next.data());
    const auto blocks = order.Host();
    std::vector<int> seen(60, 0);
    bool natural = true;
    for (int i = 0; i < 60; ++i) {
      ++seen[blocks[i]];
      natural = natural && blocks[i] == i;
    }
    EXPECT_EQ(seen, std::vector<int>(60, 1));
    EXPECT_EQ(natural, seed == 0);
  }
  simt::options().seed = 0;
}

struct Parameters {
  int values[20];
};

__global__ void ParameterKernel(const Parameters parameters, int* out) {
  out[Thread()] = parameters.values[Thread()];
}

TEST(Grid, ParametersAreCopiedAtLaunch) {
  Parameters parameters{};
  for (int i = 0; i < 20; ++i) parameters.values[i] = 7 * i;
  const DeviceArray<int> out(20);
  simt::Launch("parameters", dim3(1), dim3(20), 0, nullptr, ParameterKernel, parameters,
               out.data());
  parameters = Parameters{};
  const auto host = out.Host();
  for (int i = 0; i < 20; ++i) EXPECT_EQ(host[i], 7 * i);
}

__constant__ int constant_table[4];

__global__ void ConstantKernel(int* out) { out[Thread()] = constant_table[Thread()]; }

TEST(Grid, ConstantMemory) {
  const int values[4] = {5, 6, 7, 8};
  ASSERT_EQ(cudaMemcpyToSymbol(constant_table, values, sizeof values, 0, cudaMemcpyHostToDevice),
            cudaSuccess);
  const DeviceArray<int> out(4);
  RunKernel(dim3(1), dim3(4), 0, ConstantKernel, out.data());
  EXPECT_EQ(out.Host(), (std::vector<int>{5, 6, 7, 8}));
}

}  // namespace
