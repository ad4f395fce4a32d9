// The contract of Communicator, run alone and under mpirun: every rank runs every test.
#include "parallel/communicator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "parallel/comm_log.h"
#include "parallel/mpi_communicator.h"
#include "parallel/ordered_sum.h"

namespace sala::parallel {
namespace {

Communicator* world = nullptr;

// Values whose float sum depends on the order, different on every rank.
float Value(int rank, int64_t i) {
  return (rank % 2 == 0 ? 1.0F : -1.0F) * std::ldexp(1.0F + 0.37F * static_cast<float>(i % 11),
                                                     (rank * 7 + static_cast<int>(i)) % 24);
}

std::vector<int64_t> UnevenCounts() {
  std::vector<int64_t> counts;
  for (int r = 0; r < world->size(); ++r) counts.push_back(r % 3 == 1 ? 0 : 5 + 4 * r);
  return counts;
}

// The order of ordered_sum.h, written out.
template <typename Number, typename Value>
Number TreeSum(int first, int n, const Value& value) {
  if (n == 1) return value(first);
  const int left = (n + 1) / 2;
  return TreeSum<Number>(first, left, value) + TreeSum<Number>(first + left, n - left, value);
}

TEST(CommunicatorTest, SumsAreAddedByTheTreeOverRanks) {
  std::vector<double> values;
  for (int64_t i = 0; i < 20; ++i)
    values.push_back(static_cast<double>(Value(world->rank(), i)) / 3);
  ASSERT_TRUE(world->AllReduce(std::span<double>(values), Reduce::kSum).ok());
  for (int64_t i = 0; i < 20; ++i) {
    const auto expected = TreeSum<double>(
        0, world->size(), [i](int r) { return static_cast<double>(Value(r, i)) / 3; });
    EXPECT_EQ(values[static_cast<size_t>(i)], expected);
  }
}

TEST(CommunicatorTest, ReduceScatterAddsByTheTreeOverRanks) {
  const std::vector<int64_t> counts = UnevenCounts();
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  std::vector<float> send;
  for (int64_t i = 0; i < total; ++i) send.push_back(Value(world->rank(), i));
  std::vector<float> recv(static_cast<size_t>(counts[static_cast<size_t>(world->rank())]), NAN);
  ASSERT_TRUE(world->ReduceScatterSum(send, counts, recv).ok());
  int64_t begin = 0;
  for (int r = 0; r < world->rank(); ++r) begin += counts[static_cast<size_t>(r)];
  for (size_t i = 0; i < recv.size(); ++i) {
    const auto expected = TreeSum<float>(
        0, world->size(), [&](int r) { return Value(r, begin + static_cast<int64_t>(i)); });
    EXPECT_EQ(std::memcmp(&recv[i], &expected, sizeof(float)), 0) << recv[i] << " " << expected;
  }
}

TEST(CommunicatorTest, AllGatherKeepsRankOrderInPlaceAndOutOfPlace) {
  const std::vector<int64_t> counts = UnevenCounts();
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  int64_t begin = 0;
  for (int r = 0; r < world->rank(); ++r) begin += counts[static_cast<size_t>(r)];
  const int64_t mine = counts[static_cast<size_t>(world->rank())];
  std::vector<float> send;
  for (int64_t i = 0; i < mine; ++i) send.push_back(static_cast<float>(begin + i));
  std::vector<float> recv(static_cast<size_t>(total), NAN);
  ASSERT_TRUE(world->AllGather(send, counts, recv).ok());
  std::vector<float> in_place(static_cast<size_t>(total), NAN);
  std::copy(send.begin(), send.end(), in_place.begin() + begin);
  ASSERT_TRUE(
      world->AllGather({in_place.data() + begin, static_cast<size_t>(mine)}, counts, in_place)
          .ok());
  for (int64_t i = 0; i < total; ++i) {
    EXPECT_EQ(recv[static_cast<size_t>(i)], static_cast<float>(i));
    EXPECT_EQ(in_place[static_cast<size_t>(i)], static_cast<float>(i));
  }
}

TEST(CommunicatorTest, AllReduceKinds) {
  const double r = world->rank();
  const double n = world->size();
  std::vector<double> values = {r + 1, -r};
  ASSERT_TRUE(world->AllReduce(std::span<double>(values), Reduce::kSum).ok());
  EXPECT_EQ(values[0], n * (n + 1) / 2);
  EXPECT_EQ(values[1], -n * (n - 1) / 2);
  values = {r, -r};
  ASSERT_TRUE(world->AllReduce(std::span<double>(values), Reduce::kMax).ok());
  EXPECT_EQ(values[0], n - 1);
  EXPECT_EQ(values[1], 0);
  std::vector<int64_t> integers = {world->rank(), 1};
  ASSERT_TRUE(world->AllReduce(std::span<int64_t>(integers), Reduce::kMin).ok());
  EXPECT_EQ(integers[0], 0);
  EXPECT_EQ(integers[1], 1);
}

TEST(CommunicatorTest, BroadcastAndText) {
  std::string text = world->rank() == 0 ? "from the root" : "             ";
  ASSERT_TRUE(world->Broadcast({text.data(), text.size()}, 0).ok());
  EXPECT_EQ(text, "from the root");
  const auto all = world->AllGatherText(std::string(static_cast<size_t>(world->rank()), 'x'));
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(static_cast<int>(all->size()), world->size());
  for (int r = 0; r < world->size(); ++r)
    EXPECT_EQ((*all)[static_cast<size_t>(r)], std::string(static_cast<size_t>(r), 'x'));
}

TEST(CommunicatorTest, DealtItemsAreAddedInTheirOrder) {
  // Fewer items than ranks, a number that no group of ranks divides, none.
  for (const int items : {1, 23, 0}) {
    const auto value = [](int item, int column) {
      return static_cast<double>(Value(item, 3 + column)) / 7;
    };
    std::vector<double> mine;
    for (int i = world->rank(); i < items; i += world->size()) {
      mine.push_back(value(i, 0));
      mine.push_back(value(i, 1));
    }
    const auto sums = SumDealtItems(*world, mine, 2);
    ASSERT_TRUE(sums.ok());
    std::vector<double> expected = {0, 0};
    for (int i = 0; i < items; ++i) {
      for (int column : {0, 1}) expected[static_cast<size_t>(column)] += value(i, column);
    }
    EXPECT_EQ(*sums, expected) << items << " items";
  }
}

TEST(CommunicatorTest, AllGatherInPiecesMovesWhatOneWould) {
  const std::vector<int64_t> counts = UnevenCounts();
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const auto begin = std::accumulate(counts.begin(), counts.begin() + world->rank(), int64_t{0});
  const auto mine = static_cast<size_t>(counts[static_cast<size_t>(world->rank())]);
  std::vector<float> expected(static_cast<size_t>(total));
  std::iota(expected.begin(), expected.end(), 1.0F);
  for (const int64_t piece : {int64_t{1}, int64_t{3}, int64_t{1000}}) {
    std::vector<float> recv(static_cast<size_t>(total), NAN);
    const std::vector<float> send(expected.begin() + begin,
                                  expected.begin() + begin + static_cast<int64_t>(mine));
    ASSERT_TRUE(AllGatherInPieces(*world, send, counts, recv, piece).ok());
    EXPECT_EQ(recv, expected) << piece;
    // This rank's part may be where it belongs already.
    std::copy(send.begin(), send.end(), recv.begin() + begin);
    ASSERT_TRUE(AllGatherInPieces(*world, {recv.data() + begin, mine}, counts, recv, piece).ok());
    EXPECT_EQ(recv, expected) << piece;
  }
}

TEST(CommunicatorTest, ShiftGoesToTheNeighbourAndDoesNotWrapAround) {
  for (int by = 1 - world->size(); by < world->size(); ++by) {
    if (by == 0) continue;
    for (const int64_t n :
         {int64_t{0}, int64_t{1}, int64_t{100'000}}) {  // also above MPI's eager size
      std::vector<float> send(static_cast<size_t>(n));
      for (int64_t i = 0; i < n; ++i) send[static_cast<size_t>(i)] = Value(world->rank(), i);
      std::vector<float> recv(send.size(), -7.0F);
      ASSERT_TRUE(world->Shift(ConstTensor(send.data(), {n}), Tensor(recv.data(), {n}), by).ok());
      const int sender = world->rank() - by;
      const bool exists = 0 <= sender && sender < world->size();
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(recv[static_cast<size_t>(i)], exists ? Value(sender, i) : -7.0F)
            << "by " << by << ", element " << i;
      }
    }
  }
}

TEST(CommunicatorTest, AllReduceSumAddsByTheTreeOverRanks) {
  Buffer work;
  // Fewer elements than ranks, a number that ranks do not divide; work space that is too large.
  for (const int64_t n : {int64_t{1000}, int64_t{0}, int64_t{1}, int64_t{7}}) {
    std::vector<float> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(Value(world->rank(), i));
    ASSERT_TRUE(AllReduceSum(*world, Tensor(values.data(), {n}), nullptr, &work).ok());
    for (int64_t i = 0; i < n; ++i) {
      const auto expected = TreeSum<float>(0, world->size(), [i](int r) { return Value(r, i); });
      EXPECT_EQ(std::memcmp(&values[static_cast<size_t>(i)], &expected, sizeof(float)), 0)
          << values[static_cast<size_t>(i)] << " " << expected;
    }
  }
  EXPECT_EQ(work.bytes() > 0, world->size() > 1);
}

TEST(CommunicatorTest, SplitMakesGroups) {
  auto part = world->Split(world->rank() % 2);
  ASSERT_TRUE(part.ok());
  std::vector<int64_t> ranks = {world->rank()};
  ASSERT_TRUE((*part)->AllReduce(std::span<int64_t>(ranks), Reduce::kMin).ok());
  EXPECT_EQ(ranks[0], world->rank() % 2);
}

// With --recorded: ranks of a part are those of the first communicator.
TEST(CommunicatorTest, RecordedPartsKnowTheirRanks) {
  const size_t before = ProcessCommLog().communicators().size();
  auto part = world->Split(world->rank() % 2);
  ASSERT_TRUE(part.ok());
  const auto infos = ProcessCommLog().communicators();
  if (before == 0) return;
  ASSERT_EQ(infos.size(), before + 1);
  std::vector<int> ranks;
  for (int r = world->rank() % 2; r < world->size(); r += 2) ranks.push_back(r);
  EXPECT_EQ(infos.back().ranks, ranks);
}

TEST(CommunicatorTest, OneRanksErrorReachesAll) {
  EXPECT_TRUE(AgreeOnStatus(*world, OkStatus()).ok());
  const int failing = world->size() - 1;
  const Status mine =
      world->rank() == failing ? MakeError(ExitCode::kData, "DS-CRC", "file x: wrong") : OkStatus();
  const Status agreed = AgreeOnStatus(*world, mine);
  EXPECT_EQ(ExitCodeOf(agreed), ExitCode::kData);
  EXPECT_EQ(ErrorCodeOf(agreed), "DS-CRC");
  EXPECT_NE(MessageOf(agreed).find("file x: wrong"), std::string::npos);
}

}  // namespace
}  // namespace sala::parallel

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  if (!sala::parallel::LaunchedByMpi()) {
    const auto self = sala::parallel::MakeSelfCommunicator();
    sala::parallel::world = self.get();
    return RUN_ALL_TESTS();
  }
  auto session = sala::parallel::MpiSession::Start(&argc, &argv);
  auto world = (*session)->World();
  // The same contract with the decorator of parallel/comm_log.h around it.
  if (argc > 1 && std::string(argv[1]) == "--recorded") {
    world = sala::parallel::Recorded(std::move(world).value(), "world",
                                     sala::parallel::ProcessCommLog());
  }
  sala::parallel::world = world->get();
  return RUN_ALL_TESTS();
}
