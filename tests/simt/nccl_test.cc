// The stand-in for NCCL, under mpirun with any number of ranks.
#include <gtest/gtest.h>
#include <mpi.h>
#include <nccl.h>

#include <cstdint>
#include <vector>

#include "tests/simt/launch.h"

namespace {

using simt_test::DeviceArray;

int world_rank = 0;
int world_size = 1;

class Nccl : public testing::Test {
 protected:
  void SetUp() override {
    ncclUniqueId id;
    if (world_rank == world_size - 1) {
      ASSERT_EQ(ncclGetUniqueId(&id), ncclSuccess);
    }
    MPI_Bcast(&id, sizeof id, MPI_BYTE, world_size - 1, MPI_COMM_WORLD);
    rank_ = world_size - 1 - world_rank;  // not the order of MPI
    ASSERT_EQ(ncclCommInitRank(&comm_, world_size, id, rank_), ncclSuccess);
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    EXPECT_EQ(ncclCommDestroy(comm_), ncclSuccess);
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
  }
  void Wait() { ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess); }
  // Element i of rank r.
  static float Value(int r, int i) { return static_cast<float>((r + 1) * 10 + i % 7); }
  std::vector<float> Values(int count) const {
    std::vector<float> values(count);
    for (int i = 0; i < count; ++i) values[i] = Value(rank_, i);
    return values;
  }
  static float Sum(int i) {
    float sum = 0.0F;
    for (int r = 0; r < world_size; ++r) sum += Value(r, i);
    return sum;
  }

  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  int rank_ = 0;
};

TEST_F(Nccl, KnowsItself) {
  int count = 0;
  int rank = -1;
  EXPECT_EQ(ncclCommCount(comm_, &count), ncclSuccess);
  EXPECT_EQ(ncclCommUserRank(comm_, &rank), ncclSuccess);
  EXPECT_EQ(count, world_size);
  EXPECT_EQ(rank, rank_);
  ncclResult_t error = ncclInternalError;
  EXPECT_EQ(ncclCommGetAsyncError(comm_, &error), ncclSuccess);
  EXPECT_EQ(error, ncclSuccess);
  int version = 0;
  EXPECT_EQ(ncclGetVersion(&version), ncclSuccess);
  EXPECT_EQ(version, NCCL_VERSION_CODE);
}

TEST_F(Nccl, AllReduceRunsWithTheStream) {
  const int count = 1000;
  const DeviceArray<float> data(Values(count));
  ASSERT_EQ(ncclAllReduce(data.data(), data.data(), count, ncclFloat32, ncclSum, comm_, stream_),
            ncclSuccess);
  EXPECT_EQ(simt_test::Peek(data.data() + 3), Value(rank_, 3));
  Wait();
  const auto result = data.Host();
  for (int i = 0; i < count; ++i) ASSERT_EQ(result[i], Sum(i));
}

TEST_F(Nccl, AllReduceOperations) {
  const DeviceArray<float> data(Values(8));
  const DeviceArray<float> least(8);
  const DeviceArray<float> most(8);
  const DeviceArray<float> mean(8);
  ASSERT_EQ(ncclAllReduce(data.data(), least.data(), 8, ncclFloat32, ncclMin, comm_, stream_),
            ncclSuccess);
  ASSERT_EQ(ncclAllReduce(data.data(), most.data(), 8, ncclFloat32, ncclMax, comm_, stream_),
            ncclSuccess);
  ASSERT_EQ(ncclAllReduce(data.data(), mean.data(), 8, ncclFloat32, ncclAvg, comm_, stream_),
            ncclSuccess);
  Wait();
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(least.Host()[i], Value(0, i));
    EXPECT_EQ(most.Host()[i], Value(world_size - 1, i));
    EXPECT_FLOAT_EQ(mean.Host()[i], Sum(i) / static_cast<float>(world_size));
  }
}

template <typename T>
void TestAllReduce(ncclDataType_t type, ncclComm_t comm, cudaStream_t stream, int rank) {
  std::vector<T> values(5);
  for (int i = 0; i < 5; ++i) values[i] = static_cast<T>(static_cast<float>(rank + 2 * i));
  const DeviceArray<T> data(values);
  ASSERT_EQ(ncclAllReduce(data.data(), data.data(), 5, type, ncclSum, comm, stream), ncclSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  for (int i = 0; i < 5; ++i) {
    const int expected = world_size * (world_size - 1) / 2 + 2 * i * world_size;
    EXPECT_EQ(static_cast<float>(data.Host()[i]), static_cast<float>(expected));
  }
}

TEST_F(Nccl, AllReduceTypes) {
  TestAllReduce<__nv_bfloat16>(ncclBfloat16, comm_, stream_, rank_);
  TestAllReduce<double>(ncclFloat64, comm_, stream_, rank_);
  TestAllReduce<int32_t>(ncclInt32, comm_, stream_, rank_);
  TestAllReduce<int64_t>(ncclInt64, comm_, stream_, rank_);
  TestAllReduce<uint8_t>(ncclUint8, comm_, stream_, rank_);
}

TEST_F(Nccl, ReduceScatterAndAllGather) {
  const int share = 6;
  const DeviceArray<float> all(Values(share * world_size));
  float* mine = all.data() + rank_ * share;  // in place, as NCCL allows it
  ASSERT_EQ(ncclReduceScatter(all.data(), mine, share, ncclFloat32, ncclSum, comm_, stream_),
            ncclSuccess);
  Wait();
  for (int i = 0; i < share; ++i) EXPECT_EQ(mine[i], Sum(rank_ * share + i));
  ASSERT_EQ(ncclAllGather(mine, all.data(), share, ncclFloat32, comm_, stream_), ncclSuccess);
  Wait();
  for (int i = 0; i < share * world_size; ++i) EXPECT_EQ(all.Host()[i], Sum(i));
}

TEST_F(Nccl, ReduceAndBroadcast) {
  const int root = world_size - 1;
  const DeviceArray<float> data(Values(9));
  const DeviceArray<float> sum(std::vector<float>(9, -1.0F));
  ASSERT_EQ(ncclReduce(data.data(), sum.data(), 9, ncclFloat32, ncclSum, root, comm_, stream_),
            ncclSuccess);
  Wait();
  for (int i = 0; i < 9; ++i) EXPECT_EQ(sum.Host()[i], rank_ == root ? Sum(i) : -1.0F);
  ASSERT_EQ(ncclBroadcast(sum.data(), sum.data(), 9, ncclFloat32, root, comm_, stream_),
            ncclSuccess);
  Wait();
  for (int i = 0; i < 9; ++i) EXPECT_EQ(sum.Host()[i], Sum(i));
}

// Everyone sends before it receives: only a group can do that.
TEST_F(Nccl, RingOfAGroup) {
  const int count = 300000;
  const DeviceArray<float> data(Values(count));
  const DeviceArray<float> from_left(count);
  const int right = (rank_ + 1) % world_size;
  const int left = (rank_ + world_size - 1) % world_size;
  ASSERT_EQ(ncclGroupStart(), ncclSuccess);
  ASSERT_EQ(ncclSend(data.data(), count, ncclFloat32, right, comm_, stream_), ncclSuccess);
  ASSERT_EQ(ncclRecv(from_left.data(), count, ncclFloat32, left, comm_, stream_), ncclSuccess);
  ASSERT_EQ(ncclGroupEnd(), ncclSuccess);
  Wait();
  const auto result = from_left.Host();
  for (int i = 0; i < count; ++i) ASSERT_EQ(result[i], Value(left, i));
}

TEST_F(Nccl, AGroupOverTwoStreams) {
  cudaStream_t second = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking), cudaSuccess);
  const DeviceArray<float> data(Values(10));
  const DeviceArray<float> copy(10);
  const DeviceArray<float> from_left(10);
  const int right = (rank_ + 1) % world_size;
  const int left = (rank_ + world_size - 1) % world_size;
  cudaMemcpyAsync(copy.data(), data.data(), 40, cudaMemcpyDeviceToDevice, second);
  ASSERT_EQ(ncclGroupStart(), ncclSuccess);
  ASSERT_EQ(ncclRecv(from_left.data(), 10, ncclFloat32, left, comm_, stream_), ncclSuccess);
  ASSERT_EQ(ncclSend(copy.data(), 10, ncclFloat32, right, comm_, second), ncclSuccess);
  ASSERT_EQ(ncclGroupEnd(), ncclSuccess);
  ASSERT_EQ(cudaStreamSynchronize(second), cudaSuccess);
  Wait();
  for (int i = 0; i < 10; ++i) EXPECT_EQ(from_left.Host()[i], Value(left, i));
  EXPECT_EQ(cudaStreamDestroy(second), cudaSuccess);
}

TEST_F(Nccl, Split) {
  ncclComm_t half = nullptr;
  ASSERT_EQ(ncclCommSplit(comm_, rank_ % 2, -rank_, &half, nullptr), ncclSuccess);
  int count = 0;
  int rank = -1;
  ASSERT_EQ(ncclCommCount(half, &count), ncclSuccess);
  ASSERT_EQ(ncclCommUserRank(half, &rank), ncclSuccess);
  EXPECT_EQ(count, (world_size + 1 - rank_ % 2) / 2);
  EXPECT_EQ(rank, count - 1 - rank_ / 2);
  const DeviceArray<int> one(std::vector<int>{1});
  ASSERT_EQ(ncclAllReduce(one.data(), one.data(), 1, ncclInt32, ncclSum, half, stream_),
            ncclSuccess);
  Wait();
  EXPECT_EQ(one.Host()[0], count);
  EXPECT_EQ(ncclCommDestroy(half), ncclSuccess);
  ncclComm_t none = nullptr;
  ASSERT_EQ(ncclCommSplit(comm_, rank_ == 0 ? 0 : NCCL_SPLIT_NOCOLOR, 0, &none, nullptr),
            ncclSuccess);
  EXPECT_EQ(none != nullptr, rank_ == 0);
  if (none != nullptr) {
    EXPECT_EQ(ncclCommDestroy(none), ncclSuccess);
  }
}

// A communicator of some of the processes, while others make another one.
TEST_F(Nccl, ApartFromOthers) {
  const int color = world_rank % 2;
  MPI_Comm some = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, color, world_rank, &some);
  int size = 0;
  int rank = 0;
  MPI_Comm_size(some, &size);
  MPI_Comm_rank(some, &rank);
  ncclUniqueId id;
  if (rank == 0) {
    ASSERT_EQ(ncclGetUniqueId(&id), ncclSuccess);
  }
  MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, some);
  ncclComm_t comm = nullptr;
  ASSERT_EQ(ncclCommInitRankConfig(&comm, size, id, rank, nullptr), ncclSuccess);
  const DeviceArray<int> value(std::vector<int>{1 + 100 * color});
  ASSERT_EQ(ncclAllReduce(value.data(), value.data(), 1, ncclInt32, ncclSum, comm, stream_),
            ncclSuccess);
  Wait();
  EXPECT_EQ(value.Host()[0], size * (1 + 100 * color));
  EXPECT_EQ(ncclCommDestroy(comm), ncclSuccess);
  MPI_Comm_free(&some);
}

TEST_F(Nccl, RefusesWrongCalls) {
  const DeviceArray<float> data(4);
  EXPECT_EQ(ncclAllReduce(data.data(), data.data(), 4, ncclFloat8e4m3, ncclSum, comm_, stream_),
            ncclInvalidArgument);
  EXPECT_EQ(ncclSend(data.data(), 4, ncclFloat32, world_size, comm_, stream_), ncclInvalidArgument);
  EXPECT_EQ(ncclGroupEnd(), ncclInvalidUsage);
  ncclComm_t none = nullptr;
  EXPECT_EQ(ncclCommInitRank(&none, 2, ncclUniqueId{}, 2), ncclInvalidArgument);
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world_size);
  const int mine = RUN_ALL_TESTS();
  int any = 0;
  MPI_Allreduce(&mine, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return any;
}
