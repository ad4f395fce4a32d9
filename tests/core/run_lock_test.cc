#include "core/run_lock.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>

#include "core/file.h"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::HasSubstr;

TEST(RunLock, OneHolderAtATime) {
  const TempDir dir;
  {
    const RunLock lock = RunLock::Acquire(dir.path()).value();
    EXPECT_THAT(ReadFile(dir / "RUN.lock").value(), HasSubstr("pid " + std::to_string(::getpid())));
    const Status second = RunLock::Acquire(dir.path()).status();
    EXPECT_EQ(ErrorCodeOf(second), "RUN-LOCKED");
    EXPECT_EQ(ExitCodeOf(second), ExitCode::kIo);
    EXPECT_THAT(MessageOf(second), HasSubstr("process " + std::to_string(::getpid())));
  }
  EXPECT_FALSE(PathExists(dir / "RUN.lock"));
  EXPECT_TRUE(RunLock::Acquire(dir.path()).ok());
  EXPECT_EQ(ErrorCodeOf(RunLock::Acquire(dir / "none").status()), "FILE-WRITE");
}

TEST(RunLock, ALockOfADeadProcessIsTakenOver) {
  const TempDir dir;
  const pid_t child = ::fork();
  if (child == 0) {
    const auto lock = RunLock::Acquire(dir.path());
    ::_exit(lock.ok() ? 0 : 1);  // without destructors: the file stays
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(WEXITSTATUS(status), 0);
  ASSERT_TRUE(PathExists(dir / "RUN.lock"));
  ::testing::internal::CaptureStderr();
  EXPECT_TRUE(RunLock::Acquire(dir.path()).ok());
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              HasSubstr("stale lock of process " + std::to_string(child)));
}

TEST(RunLock, TellsARunThatWasKilledFromOneThatLives) {
  const TempDir dir;
  EXPECT_EQ(GoneRun(dir.path()), "no process holds RUN.lock");
  std::array<int, 2> ready{};
  ASSERT_EQ(::pipe(ready.data()), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto lock = RunLock::Acquire(dir.path());
    static_cast<void>(!::write(ready[1], "x", 1));
    while (lock.ok()) ::pause();
    ::_exit(1);
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_EQ(GoneRun(dir.path()), "");
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_THAT(GoneRun(dir.path()), HasSubstr("process " + std::to_string(child) + " on "));
  EXPECT_TRUE(RunLock::Acquire(dir.path()).ok()) << "looking keeps no lock";
  ASSERT_TRUE(WriteFileAtomically(dir / "RUN.lock",
                                  "host no-such-host-here\npid 12\nstarted 2026-01-01T00:00:00Z\n")
                  .ok());
  EXPECT_EQ(GoneRun(dir.path()), "") << "cannot be known";
}

TEST(RunLock, AnotherHostIsNotTakenOver) {
  const TempDir dir;
  ASSERT_TRUE(WriteFileAtomically(dir / "RUN.lock",
                                  "host no-such-host-here\npid 12\nstarted 2026-01-01T00:00:00Z\n")
                  .ok());
  EXPECT_THAT(MessageOf(RunLock::Acquire(dir.path()).status()), HasSubstr("RUN-LOCKED"));
  EXPECT_TRUE(PathExists(dir / "RUN.lock"));
}

TEST(RunLock, ManyProcessesOneWinner) {
  const TempDir dir;
  std::array<int, 2> go{};
  ASSERT_EQ(::pipe(go.data()), 0);
  std::array<pid_t, 8> children{};
  for (pid_t& child : children) {
    child = ::fork();
    if (child != 0) continue;
    ::close(go[1]);
    char byte = 0;
    (void)!::read(go[0], &byte, 1);  // returns when the parent closes its end: all start together
    const auto lock = RunLock::Acquire(dir.path());
    ::usleep(200000);  // the winner holds it while the others try
    ::_exit(lock.ok() ? 1 : 0);
  }
  ::close(go[0]);
  ::close(go[1]);
  int winners = 0;
  for (pid_t child : children) {
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    winners += WEXITSTATUS(status);
  }
  EXPECT_EQ(winners, 1);
}

}  // namespace
}  // namespace sala
