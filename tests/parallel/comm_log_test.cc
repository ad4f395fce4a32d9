#include "parallel/comm_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ctime>
#include <thread>

#include "nlohmann/json.hpp"

namespace sala::parallel {
namespace {

// Three ranks of which only this one is there: nothing is exchanged, sizes are what counts.
class Lonely : public Communicator {
 public:
  using Communicator::AllGather;
  using Communicator::ReduceScatterSum;
  int rank() const override { return 1; }
  int size() const override { return 3; }
  Status Barrier() override { return OkStatus(); }
  Status AllReduce(std::span<double>, Reduce) override { return OkStatus(); }
  Status AllReduce(std::span<int64_t>, Reduce) override { return OkStatus(); }
  Status ReduceScatterSum(std::span<const float>, std::span<const int64_t>,
                          std::span<float>) override {
    return OkStatus();
  }
  Status AllGather(std::span<const float>, std::span<const int64_t>, std::span<float>) override {
    return OkStatus();
  }
  Status Broadcast(std::span<char>, int) override { return OkStatus(); }
  StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) override {
    return std::vector<std::string>{text, text, text};
  }
  StatusOr<std::unique_ptr<Communicator>> Split(int) override { return MakeSelfCommunicator(); }
};

class CommLogTest : public testing::Test {
 protected:
  CommLog log_;
  std::unique_ptr<Communicator> comm_ = Recorded(std::make_unique<Lonely>(), "world", log_);
};

TEST_F(CommLogTest, CountsWhatIsExchangedWithOtherRanks) {
  std::vector<float> all(10);
  const std::vector<int64_t> counts = {5, 3, 2};
  std::vector<double> numbers(4);
  std::vector<int64_t> integers(2);
  std::vector<char> bytes(7);
  ASSERT_TRUE(comm_->AllGather(std::span<const float>(all).first(3), counts, all).ok());
  ASSERT_TRUE(comm_->ReduceScatterSum(all, counts, std::span<float>(all).first(3)).ok());
  ASSERT_TRUE(comm_->AllReduce(std::span<double>(numbers), Reduce::kSum).ok());
  ASSERT_TRUE(comm_->AllReduce(std::span<int64_t>(integers), Reduce::kMax).ok());
  ASSERT_TRUE(comm_->Broadcast(bytes, 0).ok());
  ASSERT_TRUE(comm_->AllGatherText("12345").ok());
  ASSERT_TRUE(comm_->Barrier().ok());
  const auto totals = log_.Totals();
  EXPECT_EQ(totals.at("world.all_gather").bytes, (5 + 2) * 4);
  EXPECT_EQ(totals.at("world.reduce_scatter").bytes, (5 + 2) * 4);
  EXPECT_EQ(totals.at("world.all_reduce").bytes, (4 + 2) * 8 * 2);
  EXPECT_EQ(totals.at("world.all_reduce").calls, 2);
  EXPECT_EQ(totals.at("world.broadcast").bytes, 7);
  EXPECT_EQ(totals.at("world.gather_text").bytes, 10);
  EXPECT_EQ(totals.at("world.barrier").calls, 1);
  EXPECT_EQ(totals.at("world.barrier").bytes, 0);
}

TEST_F(CommLogTest, TensorsAreCountedByTheirNumberType) {
  std::vector<uint16_t> bf16(10);
  const std::vector<int64_t> counts = {4, 4, 2};
  const Tensor all(bf16.data(), DType::kBF16, {10});
  const Tensor mine(bf16.data(), DType::kBF16, {4});
  class AnyTensor : public Lonely {
   public:
    using Lonely::AllGather;
    Status AllGather(const ConstTensor&, std::span<const int64_t>, const Tensor&) override {
      return OkStatus();
    }
  };
  const auto comm = Recorded(std::make_unique<AnyTensor>(), "tp", log_);
  ASSERT_TRUE(comm->AllGather(ConstTensor(mine), counts, all).ok());
  EXPECT_EQ(log_.Totals().at("tp.all_gather").bytes, (4 + 2) * 2);
}

TEST_F(CommLogTest, PartsKeepTheNameUntilTheyGetTheirOwn) {
  auto part = comm_->Split(0);
  ASSERT_TRUE(part.ok());
  ASSERT_TRUE((*part)->Barrier().ok());
  EXPECT_EQ(log_.Totals().at("world.barrier").calls, 1);
  NameGroup(**part, "dp");
  EXPECT_EQ(log_.Totals().at("dp.barrier").calls, 1);
  auto again = (*part)->Split(0);
  ASSERT_TRUE(again.ok());
  const auto infos = log_.communicators();
  ASSERT_EQ(infos.size(), 3U);
  EXPECT_EQ(infos[0].id, "0");
  EXPECT_THAT(infos[0].ranks, testing::ElementsAre(0, 1, 2));
  EXPECT_EQ(infos[1].id, "0.1");
  EXPECT_THAT(infos[1].ranks, testing::ElementsAre(1));
  EXPECT_EQ(infos[2].id, "0.1.1");
  EXPECT_EQ(infos[2].group, "dp");
  EXPECT_THAT(infos[2].ranks, testing::ElementsAre(1));
}

TEST_F(CommLogTest, ACallInsideACallIsNotCountedTwice) {
  const Communicator& host = *comm_;
  const auto device = RecordedLike(host, std::move(comm_), "dp");
  ASSERT_TRUE(device->Barrier().ok());
  const auto totals = log_.Totals();
  EXPECT_EQ(totals.size(), 1U);
  EXPECT_EQ(totals.at("dp.barrier").calls, 1);
  const auto plain = RecordedLike(*MakeSelfCommunicator(), MakeSelfCommunicator(), "dp");
  ASSERT_TRUE(plain->Barrier().ok());
  EXPECT_EQ(log_.Totals().at("dp.barrier").calls, 1);
}

TEST_F(CommLogTest, KeepsTheLastCallsAndThoseThatStillRun) {
  const size_t index = log_.AddCommunicator({.id = "7", .group = "cp", .ranks = {1}});
  const int64_t long_one = log_.Begin(index, CommKind::kSendReceive, 8);
  for (size_t i = 0; i < CommLog::kKept + 20; ++i) ASSERT_TRUE(comm_->Barrier().ok());
  std::vector<CommEntry> entries = log_.Entries();
  ASSERT_EQ(entries.size(), CommLog::kKept + 1);
  EXPECT_EQ(entries.front().sequence, long_one);
  EXPECT_TRUE(entries.front().running);
  EXPECT_EQ(entries.back().number, static_cast<int64_t>(CommLog::kKept) + 20);
  for (size_t i = 2; i < entries.size(); ++i) {
    EXPECT_EQ(entries[i].sequence, entries[i - 1].sequence + 1);
    EXPECT_FALSE(entries[i].running);
  }
  log_.End(long_one, 16);
  EXPECT_EQ(log_.Entries().size(), CommLog::kKept);
  EXPECT_EQ(log_.Totals().at("cp.send_receive").bytes, 16);
}

TEST_F(CommLogTest, ThreadsRecordBesideEachOther) {
  constexpr int kCalls = 2000;
  const auto other = Recorded(std::make_unique<Lonely>(), "dp", log_);
  std::thread thread([&] {
    for (int i = 0; i < kCalls; ++i) ASSERT_TRUE(other->Barrier().ok());
  });
  for (int i = 0; i < kCalls; ++i) {
    ASSERT_TRUE(comm_->Barrier().ok());
    log_.Entries();
  }
  thread.join();
  const auto totals = log_.Totals();
  EXPECT_EQ(totals.at("world.barrier").calls, kCalls);
  EXPECT_EQ(totals.at("dp.barrier").calls, kCalls);
  for (const CommEntry& entry : log_.Entries()) EXPECT_FALSE(entry.running);
}

TEST_F(CommLogTest, SecondsAreThoseOfTheCallingThread) {
  class Slow : public Lonely {
   public:
    Status Barrier() override {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      return OkStatus();
    }
  };
  const auto slow = Recorded(std::make_unique<Slow>(), "slow", log_);
  const double before = CommSecondsOfThisThread();
  std::thread thread([&] { ASSERT_TRUE(slow->Barrier().ok()); });
  thread.join();
  EXPECT_EQ(CommSecondsOfThisThread(), before);
  ASSERT_TRUE(slow->Barrier().ok());
  EXPECT_GE(CommSecondsOfThisThread() - before, 0.02);
}

TEST_F(CommLogTest, TheDeltaNamesWhatWasCalledSince) {
  ASSERT_TRUE(comm_->Barrier().ok());
  const auto before = log_.Totals();
  std::vector<double> numbers(1);
  ASSERT_TRUE(comm_->AllReduce(std::span<double>(numbers), Reduce::kSum).ok());
  EXPECT_EQ(CommDelta(before, log_.Totals()).dump(),
            R"({"world.all_reduce":{"calls":1,"bytes":16}})");
}

#ifndef SALA_SANITIZED
// Processor time of this thread, so that a busy machine does not count; the best of several rounds.
TEST_F(CommLogTest, CostsLessThanAMicrosecond) {
  const auto processor_seconds = [] {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  };
  constexpr int kCalls = 10000;
  double best = 1;
  for (int round = 0; round < 5; ++round) {
    const double start = processor_seconds();
    for (int i = 0; i < kCalls; ++i) ASSERT_TRUE(comm_->Barrier().ok());
    best = std::min(best, (processor_seconds() - start) / kCalls);
  }
  EXPECT_LT(best, 1e-6);
}
#endif

}  // namespace
}  // namespace sala::parallel
