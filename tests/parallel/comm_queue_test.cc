#include "parallel/comm_queue.h"

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

namespace sala::parallel {
namespace {

Status Failed(const char* text) { return MakeError(ExitCode::kDevice, "COMM-FAILED", text); }

class CommQueueTest : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(WithAndWithoutThread, CommQueueTest, testing::Bool());

TEST_P(CommQueueTest, OperationsRunInTheOrderOfTheirSubmission) {
  CommQueue queue(GetParam());
  std::vector<int> done;
  CommQueue::Ticket last = 0;
  for (int i = 0; i < 100; ++i) {
    const CommQueue::Ticket ticket = queue.Submit([&done, i] {
      done.push_back(i);
      return OkStatus();
    });
    EXPECT_GT(ticket, last);
    last = ticket;
  }
  ASSERT_TRUE(queue.Wait(last).ok());
  EXPECT_TRUE(queue.idle());
  ASSERT_EQ(done.size(), 100);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(done[static_cast<size_t>(i)], i);
}

TEST_P(CommQueueTest, NothingRunsAfterTheFirstError) {
  CommQueue queue(GetParam());
  bool ran = false;
  queue.Submit([] { return Failed("the first"); });
  const CommQueue::Ticket after = queue.Submit([&ran] {
    ran = true;
    return Failed("the second");
  });
  EXPECT_NE(MessageOf(queue.Wait(after)).find("the first"), std::string::npos);
  EXPECT_NE(MessageOf(queue.WaitAll()).find("the first"), std::string::npos);
  EXPECT_FALSE(ran);
}

TEST(CommQueueThreadTest, AnExceptionIsAnError) {
  CommQueue queue(/*threaded=*/true);
  queue.Submit([]() -> Status { throw std::runtime_error("no memory left"); });
  const Status status = queue.WaitAll();
  EXPECT_EQ(ErrorCodeOf(status), "COMM-FAILED");
  EXPECT_NE(MessageOf(status).find("no memory left"), std::string::npos);
}

TEST(CommQueueThreadTest, WaitingIsCounted) {
  CommQueue queue(/*threaded=*/true);
  const double seconds = 0.05;
  queue.Submit([seconds] {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    return OkStatus();
  });
  ASSERT_TRUE(queue.WaitAll().ok());
  // The operation may have begun before the waiting did, by far less than half.
  EXPECT_GE(queue.seconds_waited(), seconds / 2);
  EXPECT_GE(queue.seconds_run(), seconds);
}

TEST(CommQueueDeathTest, AnOperationThatHangsEndsTheProcess) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        CommQueue queue(/*threaded=*/true);
        queue.Submit([] {
          std::this_thread::sleep_for(std::chrono::hours(1));
          return OkStatus();
        });
        queue.Drain();
      },
      testing::ExitedWithCode(71), "COMM-FAILED: an exchange beside the computation");
}

}  // namespace
}  // namespace sala::parallel
