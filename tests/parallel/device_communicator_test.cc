// Device memory between ranks: both ways have the bits of the host's communicator. Run under mpirun
// over the emulated CUDA module, or on hardware with a device per rank.
#include "parallel/device_communicator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "core/buffer.h"
#include "core/cuda_module.h"
#include "parallel/mpi_communicator.h"

namespace sala::parallel {
namespace {

Communicator* world = nullptr;
Device* device = nullptr;

enum class Way { kStaged, kNcclOrdered, kNcclFree };

class DeviceCommunicator : public ::testing::TestWithParam<Way> {
 protected:
  DeviceCommunicator() : pool_(1), scratch_(size_t{1} << 20, device) {
    auto host = world->Split(0);
    EXPECT_TRUE(host.ok());
    const Context ctx = {DeviceKind::kCuda, &pool_, &scratch_, device};
    if (GetParam() == Way::kStaged) {
      comm_ = MakeStagedCommunicator(std::move(*host), *device);
      return;
    }
    auto nccl = MakeNcclCommunicator(std::move(*host), ctx, GetParam() == Way::kNcclOrdered);
    EXPECT_TRUE(nccl.ok()) << MessageOf(nccl.status());
    comm_ = std::move(*nccl);
  }

  Communicator& comm() { return *comm_; }

  static Buffer Upload(const std::vector<float>& values) {
    Buffer buffer(std::max<size_t>(1, values.size()) * sizeof(float), device);
    device->Upload(buffer.data(), values.data(), values.size() * sizeof(float));
    return buffer;
  }
  static std::vector<float> Download(const Buffer& buffer, int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    device->Download(values.data(), buffer.data(), values.size() * sizeof(float));
    return values;
  }
  static Tensor View(const Buffer& buffer, int64_t begin, int64_t end, DType dtype = DType::kF32) {
    return Tensor(static_cast<char*>(buffer.data()) + begin * static_cast<int64_t>(SizeOf(dtype)),
                  dtype, {end - begin}, DeviceKind::kCuda);
  }

 private:
  ThreadPool pool_;
  Arena scratch_;
  std::unique_ptr<Communicator> comm_;
};

// Uneven segments, one of them empty; `large`: more than one piece of the exchange.
std::vector<int64_t> Counts(bool large) {
  std::vector<int64_t> counts;
  for (int r = 0; r < world->size(); ++r) {
    counts.push_back(r % 3 == 1 ? 0 : (large ? (int64_t{1} << 20) + 16 * r + 48 : 16 * (r + 2)));
  }
  return counts;
}

int64_t Begin(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.begin() + world->rank(), int64_t{0});
}

// Values whose float sum depends on the order, different on every rank.
std::vector<float> Values(int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    values[static_cast<size_t>(i)] = (world->rank() % 2 == 0 ? 1.0F : -1.0F) *
                                     std::ldexp(1.0F + 0.37F * static_cast<float>(i % 11),
                                                (world->rank() * 7 + static_cast<int>(i)) % 24);
  }
  return values;
}

TEST_P(DeviceCommunicator, ReduceScatterHasTheBitsOfTheHost) {
  for (const bool large : {false, true}) {
    const std::vector<int64_t> counts = Counts(large);
    const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    const int64_t mine = counts[static_cast<size_t>(world->rank())];
    const std::vector<float> values = Values(total);
    std::vector<float> expected(static_cast<size_t>(mine));
    ASSERT_TRUE(world->ReduceScatterSum(values, counts, expected).ok());

    const Buffer send = Upload(values);
    const Buffer recv = Upload(std::vector<float>(static_cast<size_t>(mine), NAN));
    const Status status =
        comm().ReduceScatterSum(ConstTensor(View(send, 0, total)), counts, View(recv, 0, mine));
    ASSERT_TRUE(status.ok()) << MessageOf(status);
    const std::vector<float> found = Download(recv, mine);
    if (GetParam() != Way::kNcclFree) {
      EXPECT_EQ(found, expected);
      continue;
    }
    // Any order: ranks - 1 additions, each rounded by at most 2^-24 of the largest partial sum,
    // which is below ranks * 2^26 here.
    const double bound = world->size() * world->size() * 0x1p26 * 0x1p-24;
    for (size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], bound) << i;
  }
}

TEST_P(DeviceCommunicator, AllGatherMovesEveryBitInPlaceAndOutOfPlace) {
  for (const bool large : {false, true}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const std::vector<int64_t> counts = Counts(large);
      const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
      const int64_t mine = counts[static_cast<size_t>(world->rank())];
      // Every rank knows what all have: bytes that depend on the place only.
      const size_t bytes = static_cast<size_t>(total) * SizeOf(dtype);
      std::vector<unsigned char> all(bytes);
      for (size_t i = 0; i < bytes; ++i) all[i] = static_cast<unsigned char>(i * 131 + i / 251);
      const size_t first = static_cast<size_t>(Begin(counts)) * SizeOf(dtype);
      const size_t own = static_cast<size_t>(mine) * SizeOf(dtype);
      for (const bool in_place : {false, true}) {
        const Buffer send(std::max<size_t>(1, own), device);
        const Buffer recv(bytes, device);
        device->Upload(send.data(), all.data() + first, own);
        device->Upload(static_cast<char*>(recv.data()) + first, all.data() + first, own);
        const ConstTensor from = in_place ? View(recv, Begin(counts), Begin(counts) + mine, dtype)
                                          : View(send, 0, mine, dtype);
        const Status status = comm().AllGather(from, counts, View(recv, 0, total, dtype));
        ASSERT_TRUE(status.ok()) << MessageOf(status);
        std::vector<unsigned char> found(bytes);
        device->Download(found.data(), recv.data(), bytes);
        EXPECT_EQ(found, all);
      }
    }
  }
}

TEST_P(DeviceCommunicator, ShiftMovesEveryBitAndDoesNotWrapAround) {
  for (int by = 1 - world->size(); by < world->size(); ++by) {
    if (by == 0) continue;
    for (const int64_t n : {int64_t{16}, (int64_t{1} << 20) + 48}) {
      const std::vector<float> values = Values(n);
      std::vector<float> expected(static_cast<size_t>(n), -7.0F);
      ASSERT_TRUE(
          world->Shift(ConstTensor(values.data(), {n}), Tensor(expected.data(), {n}), by).ok());
      const Buffer send = Upload(values);
      const Buffer recv = Upload(std::vector<float>(static_cast<size_t>(n), -7.0F));
      const Status status = comm().Shift(ConstTensor(View(send, 0, n)), View(recv, 0, n), by);
      ASSERT_TRUE(status.ok()) << MessageOf(status);
      EXPECT_EQ(Download(recv, n), expected) << "by " << by;
    }
  }
}

TEST_P(DeviceCommunicator, AllReduceSumIsTheSameOnEveryRank) {
  Buffer work;
  Buffer host_work;
  for (const int64_t n : {int64_t{4096}, int64_t{16}, int64_t{7}}) {
    std::vector<float> expected = Values(n);
    const Buffer values = Upload(expected);
    ASSERT_TRUE(AllReduceSum(*world, Tensor(expected.data(), {n}), nullptr, &host_work).ok());
    const Status status = AllReduceSum(comm(), View(values, 0, n), device, &work);
    ASSERT_TRUE(status.ok()) << MessageOf(status);
    const std::vector<float> found = Download(values, n);
    // In any order: as for ReduceScatterSum.
    const double bound =
        GetParam() == Way::kNcclFree ? world->size() * world->size() * 0x1p26 * 0x1p-24 : 0.0;
    for (size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], bound) << i;
    // The bits of rank 0 are those of all.
    std::vector<float> first = found;
    ASSERT_TRUE(
        world->Broadcast({reinterpret_cast<char*>(first.data()), first.size() * sizeof(float)}, 0)
            .ok());
    EXPECT_EQ(std::memcmp(first.data(), found.data(), found.size() * sizeof(float)), 0);
  }
}

// Those who pass the same colour, of which one is alone.
TEST_P(DeviceCommunicator, PartsCarryDeviceMemoryToo) {
  const bool alone = world->rank() == world->size() - 1;
  const auto part = comm().Split(alone ? 1 : 0);
  ASSERT_TRUE(part.ok()) << MessageOf(part.status());
  const int n = alone ? 1 : world->size() - 1;
  ASSERT_EQ((*part)->size(), n);
  const std::vector<int64_t> counts(static_cast<size_t>(n), 16);
  const Buffer send = Upload(std::vector<float>(static_cast<size_t>(16 * n), 1.5F));
  const Buffer recv = Upload(std::vector<float>(static_cast<size_t>(16 * n), NAN));
  const Status summed =
      (*part)->ReduceScatterSum(ConstTensor(View(send, 0, 16 * n)), counts, View(recv, 0, 16));
  ASSERT_TRUE(summed.ok()) << MessageOf(summed);
  const std::vector<float> expected(16, 1.5F * static_cast<float>(n));
  EXPECT_EQ(Download(recv, 16), expected);
  const Status gathered =
      (*part)->AllGather(ConstTensor(View(recv, 0, 16)), counts, View(send, 0, 16 * n));
  ASSERT_TRUE(gathered.ok()) << MessageOf(gathered);
  EXPECT_EQ(Download(send, 16 * n),
            std::vector<float>(static_cast<size_t>(16 * n), 1.5F * static_cast<float>(n)));
}

TEST_P(DeviceCommunicator, HostMemoryGoesTheWayOfTheHost) {
  double value = world->rank() + 0.5;
  ASSERT_TRUE(comm().AllReduce(std::span<double>(&value, 1), Reduce::kSum).ok());
  const int n = world->size();
  EXPECT_EQ(value, 0.5 * n + n * (n - 1) / 2.0);
  const auto texts = comm().AllGatherText(std::to_string(world->rank()));
  ASSERT_TRUE(texts.ok());
  EXPECT_EQ(texts->back(), std::to_string(n - 1));
  EXPECT_TRUE(comm().Barrier().ok());
}

// On the emulator work of a stream runs when somebody waits for it: who does not wait, in one
// direction or the other, sees old values.
TEST(SideStreamOfNccl, RunsBesideTheComputationAndInOrderWithIt) {
  ThreadPool pool(1);
  Arena scratch(size_t{1} << 20, device);
  const Context ctx = {DeviceKind::kCuda, &pool, &scratch, device};
  auto side = MakeSideStream(*device);
  ASSERT_TRUE(side.ok()) << MessageOf(side.status());
  auto host = world->Split(0);
  ASSERT_TRUE(host.ok());
  auto comm = MakeNcclCommunicator(std::move(*host), ctx, /*ordered=*/true, side->get());
  ASSERT_TRUE(comm.ok()) << MessageOf(comm.status());
  CommQueue queue(/*threaded=*/false, side->get());

  // More exchanges than the side stream has events for, each of other values.
  constexpr size_t kExchanges = 70;
  const int n = world->size();
  const std::vector<int64_t> counts(static_cast<size_t>(n), 16);
  const auto floats = [n](size_t i) {
    return std::vector<float>(static_cast<size_t>(16 * n), static_cast<float>(i + 1));
  };
  std::vector<Buffer> sends, recvs;
  for (size_t i = 0; i < kExchanges; ++i) {
    sends.emplace_back(floats(0).size() * sizeof(float), device);
    recvs.emplace_back(16 * sizeof(float), device);
    device->Zero(recvs[i].data(), recvs[i].bytes());
  }
  device->Synchronize();
  std::vector<CommQueue::Ticket> tickets;
  for (size_t i = 0; i < kExchanges; ++i) {
    // What the compute stream has been given and not done yet.
    const std::vector<float> values = floats(i);
    device->Upload(sends[i].data(), values.data(), values.size() * sizeof(float));
    tickets.push_back(queue.Submit([&, i] {
      return (*comm)->ReduceScatterSum(
          ConstTensor(Tensor(sends[i].data(), DType::kF32, {16 * n}, DeviceKind::kCuda)), counts,
          Tensor(recvs[i].data(), DType::kF32, {16}, DeviceKind::kCuda));
    }));
  }
  EXPECT_FALSE(queue.idle());
  if (device->info().emulated && n > 1) {
    EXPECT_EQ(*static_cast<const float*>(recvs.back().data()), 0.0F) << "somebody has waited";
  }
  const auto check = [&](size_t i) {
    const Status status = queue.Wait(tickets[i]);
    ASSERT_TRUE(status.ok()) << MessageOf(status);
    std::vector<float> found(16);
    device->Download(found.data(), recvs[i].data(), found.size() * sizeof(float));
    EXPECT_EQ(found, std::vector<float>(16, static_cast<float>(n) * static_cast<float>(i + 1)))
        << i;
  };
  ASSERT_TRUE(queue.Wait(tickets.front()).ok());
  EXPECT_FALSE(queue.idle());
  check(kExchanges - 1);
  EXPECT_TRUE(queue.idle());
  check(kExchanges / 2);
  check(0);
}

std::string NameOf(const ::testing::TestParamInfo<Way>& way) {
  constexpr const char* kNames[] = {"Staged", "NcclOrdered", "NcclFree"};
  return kNames[static_cast<int>(way.param)];
}

INSTANTIATE_TEST_SUITE_P(Ways, DeviceCommunicator,
                         ::testing::Values(Way::kStaged, Way::kNcclOrdered, Way::kNcclFree),
                         NameOf);

int Main(int argc, char** argv) {
  auto mpi = MpiSession::Start(&argc, &argv);
  if (!mpi.ok()) return 1;
  ::testing::InitGoogleTest(&argc, argv);
  auto comm = (*mpi)->World();
  if (!comm.ok()) return 1;
  world = comm->get();
  const auto ranks = RanksOfThisHost(*world, (*mpi)->host());
  if (!ranks.ok()) return 1;
  auto opened = OpenCudaDevice(
      {.local_rank = ranks->local_rank, .rank = world->rank(), .host = (*mpi)->host()});
  if (!opened.ok()) {
    std::fprintf(stderr, "%s\n", MessageOf(opened.status()).c_str());
    return 1;
  }
  device = opened->get();
  return RUN_ALL_TESTS();
}

}  // namespace
}  // namespace sala::parallel

int main(int argc, char** argv) { return sala::parallel::Main(argc, argv); }
