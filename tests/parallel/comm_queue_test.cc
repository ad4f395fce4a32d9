#include "parallel/comm_queue.h"

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "parallel/communicator.h"

namespace sala::parallel {
namespace {

Status Failure() { return MakeError(ExitCode::kDevice, "COMM-FAILED", "a link is down"); }

// With and without a thread of its own the queue does the same.
class CommQueueThreadTest : public ::testing::TestWithParam<bool> {};

TEST_P(CommQueueThreadTest, OperationsAreRunOneAfterTheOtherInTheirOrder) {
  constexpr int kOperations = 500;
  std::vector<int> order;  // no lock: only one operation is run at a time, and read after Wait
  CommQueue queue(GetParam());
  std::vector<CommQueue::Ticket> tickets;
  for (int i = 0; i < kOperations; ++i) {
    tickets.push_back(queue.Submit([&order, i] {
      if (i % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      order.push_back(i);
      return OkStatus();
    }));
  }
  ASSERT_TRUE(queue.Wait(tickets.back()).ok());
  ASSERT_EQ(order.size(), static_cast<size_t>(kOperations));
  for (int i = 0; i < kOperations; ++i) EXPECT_EQ(order[static_cast<size_t>(i)], i);
  EXPECT_TRUE(queue.idle());
  EXPECT_GT(queue.seconds_run(), 0.001);
  // Tickets of the past are done.
  EXPECT_TRUE(queue.Wait(tickets.front()).ok());
}

TEST_P(CommQueueThreadTest, WaitReturnsWhenItsOperationIsDoneAndSeesWhatItWrote) {
  CommQueue queue(GetParam());
  std::vector<float> memory(1000, 0.0F);
  for (int round = 1; round <= 50; ++round) {
    const auto value = static_cast<float>(round);
    const CommQueue::Ticket ticket = queue.Submit([&memory, value] {
      for (float& x : memory) x = value;
      return OkStatus();
    });
    ASSERT_TRUE(queue.Wait(ticket).ok());
    for (const float x : memory) ASSERT_EQ(x, value);
  }
}

TEST_P(CommQueueThreadTest, AnErrorIsKeptAndEndsWhatFollows) {
  CommQueue queue(GetParam());
  int run = 0;
  const auto good = queue.Submit([&run] {
    ++run;
    return OkStatus();
  });
  queue.Submit([] { return Failure(); });
  const auto later = queue.Submit([&run] {
    ++run;
    return MakeError(ExitCode::kData, "DS-CRC", "another error, later");
  });
  EXPECT_EQ(queue.Wait(later), Failure());
  EXPECT_EQ(run, 1);
  // Also for those whose own operation went well: the memory of later ones is not what they expect.
  EXPECT_EQ(queue.Wait(good), Failure());
  EXPECT_EQ(queue.WaitAll(), Failure());
  EXPECT_EQ(queue.Wait(queue.Submit([&run] {
    ++run;
    return OkStatus();
  })),
            Failure());
  EXPECT_EQ(run, 1);
  EXPECT_TRUE(queue.idle());
}

TEST_P(CommQueueThreadTest, DrainAndTheEndWaitForAll) {
  int run = 0;
  {
    CommQueue queue(GetParam());
    const auto slow = [&run] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      ++run;
      return OkStatus();
    };
    for (int i = 0; i < 4; ++i) queue.Submit(slow);
    queue.Drain();
    EXPECT_EQ(run, 4);
    EXPECT_TRUE(queue.idle());
    for (int i = 0; i < 4; ++i) queue.Submit(slow);
  }
  EXPECT_EQ(run, 8);
}

INSTANTIATE_TEST_SUITE_P(Both, CommQueueThreadTest, ::testing::Bool());

TEST(CommQueueThreadTest, AnExceptionOfAnOperationIsItsError) {
  CommQueue queue(/*threaded=*/true);
  queue.Submit([]() -> Status { throw std::runtime_error("the device is gone"); });
  const Status status = queue.WaitAll();
  EXPECT_EQ(ErrorCodeOf(status), "COMM-FAILED");
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kDevice);
  EXPECT_NE(MessageOf(status).find("the device is gone"), std::string::npos);
}

TEST(CommQueueThreadTest, WaitingIsCounted) {
  CommQueue queue(/*threaded=*/true);
  queue.Submit([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    return OkStatus();
  });
  ASSERT_TRUE(queue.WaitAll().ok());
  EXPECT_GE(queue.seconds_run(), 0.02);
  EXPECT_GT(queue.seconds_waited(), 0.0);
}

#ifndef SALA_SANITIZED  // a process that ends with a thread in the middle of something is a report
TEST(CommQueueDeathTest, WhatNeverCompletesEndsTheProcess) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        CommQueue queue(/*threaded=*/true);
        queue.Submit([] {
          std::this_thread::sleep_for(std::chrono::hours(1));
          return OkStatus();
        });
        queue.Drain();
      },
      ::testing::ExitedWithCode(71), "COMM-FAILED: an exchange beside the computation");
}
#endif

}  // namespace
}  // namespace sala::parallel
