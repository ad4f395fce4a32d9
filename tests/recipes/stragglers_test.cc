#include "recipes/stragglers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "nlohmann/json.hpp"

namespace sala::recipes {
namespace {

// This rank is rank 1 of 3; every rank sends the same but rank 0 ten times as much, rank 2 half.
class ThreeRanks : public parallel::Communicator {
 public:
  using Communicator::AllGather;
  using Communicator::ReduceScatterSum;
  int rank() const override { return 1; }
  int size() const override { return 3; }
  Status Barrier() override { return OkStatus(); }
  Status AllReduce(std::span<double>, parallel::Reduce) override { return OkStatus(); }
  Status AllReduce(std::span<int64_t>, parallel::Reduce) override { return OkStatus(); }
  Status ReduceScatterSum(std::span<const float>, std::span<const int64_t>,
                          std::span<float>) override {
    return OkStatus();
  }
  Status AllGather(std::span<const float> send, std::span<const int64_t> counts,
                   std::span<float> recv) override {
    for (size_t i = 0; i < send.size(); ++i) {
      recv[i] = 10 * send[i];
      recv[send.size() + i] = send[i];
      recv[2 * send.size() + i] = send[i] / 2;
    }
    return OkStatus();
  }
  Status Broadcast(std::span<char>, int) override { return OkStatus(); }
  StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) override {
    return std::vector<std::string>(3, text);
  }
  StatusOr<std::unique_ptr<Communicator>> Split(int) override {
    return parallel::MakeSelfCommunicator();
  }
};

TEST(StragglersTest, ComputingIsTheStepWithoutItsCollectives) {
  ThreeRanks world;
  Stragglers stragglers;
  // Computes 1, 2, ... 40 ms, and waits 5 ms each time.
  for (int i = 1; i <= 40; ++i) stragglers.Add(0.001 * i + 0.005, 0.005);
  auto line = stragglers.Gather(world, 17);
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ((*line)["step"], 17);
  EXPECT_EQ((*line)["p50_ms"].dump(), "[200.0,20.0,10.0]");
  EXPECT_EQ((*line)["p95_ms"].dump(), "[380.0,38.0,19.0]");
  EXPECT_EQ((*line)["max_ms"].dump(), "[400.0,40.0,20.0]");
  EXPECT_EQ((*line)["comm_ms"].dump(), "[2000.0,200.0,100.0]");
  // Quantiles are of the last 50 steps, seconds in collectives since the last line.
  for (int i = 0; i < 50; ++i) stragglers.Add(0.003, 0.001);
  line = stragglers.Gather(world, 67);
  ASSERT_TRUE(line.ok());
  EXPECT_EQ((*line)["max_ms"].dump(), "[20.0,2.0,1.0]");
  EXPECT_EQ((*line)["comm_ms"].dump(), "[500.0,50.0,25.0]");
}

TEST(StragglersTest, TheTableBeginsWithTheSlowest) {
  ThreeRanks world;
  Stragglers stragglers;
  EXPECT_TRUE(stragglers.Table({}).empty());
  stragglers.Add(0.030, 0.010);
  ASSERT_TRUE(stragglers.Gather(world, 1).ok());
  const std::vector<std::string> table = stragglers.Table({"fa", "fa", "fb"}, 2);
  ASSERT_EQ(table.size(), 3U);
  EXPECT_THAT(table[1], testing::StartsWith("0@fa "));
  EXPECT_THAT(table[1], testing::HasSubstr(" 200.00 "));
  EXPECT_THAT(table[1], testing::EndsWith(" 10.00x"));
  EXPECT_THAT(table[2], testing::StartsWith("1@fa "));
  EXPECT_THAT(table[2], testing::EndsWith(" 1.00x"));
}

}  // namespace
}  // namespace sala::recipes
