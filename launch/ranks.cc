#include "launch/ranks.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "core/exception.h"
#include "core/log.h"
#include "parallel/comm_log.h"
#include "parallel/mpi_communicator.h"

namespace sala::launch {
namespace {

// Ends the process when the other ranks do not end with it: they wait in a collective for this one
// and would wait for ever.
// `_exit` because MPI belongs to the main thread, which is blocked; the launcher then ends the job
// with this exit code.
class EndTogether {
 public:
  explicit EndTogether(const Status& status) {
    timer_ = std::thread(
        [this, exit_code = static_cast<int>(ExitCodeOf(status)), message = MessageOf(status)] {
          std::unique_lock<std::mutex> lock(mutex_);
          if (condition_.wait_for(lock, kPatience, [this] { return together_; })) return;
          SALA_LOG(Error) << message;  // with rank and host
          _exit(exit_code);
        });
  }
  EndTogether(const EndTogether&) = delete;
  EndTogether& operator=(const EndTogether&) = delete;
  ~EndTogether() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      together_ = true;
    }
    condition_.notify_all();
    timer_.join();
  }

 private:
  // Ranks that share an error reach it within one collective of each other.
  static constexpr std::chrono::seconds kPatience{5};
  std::mutex mutex_;
  std::condition_variable condition_;
  bool together_ = false;
  std::thread timer_;
};

Status AsRank(CommandLine& line, const std::function<Status(parallel::Communicator&)>& run) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<parallel::MpiSession> mpi,
                        parallel::MpiSession::Start(&line.argc, &line.argv));
  SetLogIdentity(mpi->rank(), mpi->host());
  SALA_ASSIGN_OR_RETURN(std::unique_ptr<parallel::Communicator> plain, mpi->World());
  const std::unique_ptr<parallel::Communicator> world =
      parallel::Recorded(std::move(plain), "world", parallel::ProcessCommLog());
  // A communicator of its own, so that the barrier at the end cannot meet a collective of
  // another rank's work.
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<parallel::Communicator> ending,
                        world->Split(/*colour=*/0));
  Status status = OkStatus();
  try {
    status = run(*world);
  } catch (const parallel::CommError& error) {
    status = error.status();
  } catch (const std::exception& error) {
    // Unwinding further would end in MPI_Finalize, which waits for ranks that still compute.
    status = ErrorOf(error);
  }
  if (status.ok() || mpi->size() == 1) return status;
  const EndTogether end(status);
  if (!ending->Barrier().ok()) parallel::MpiSession::Abort(static_cast<int>(ExitCodeOf(status)));
  // All ranks have it; one says it, here: behind MPI_Finalize the exit of another rank may already
  // end the job.
  if (mpi->rank() == 0) PrintError(status);
  line.print_error = false;
  return status;
}

}  // namespace

Status OnAllRanks(CommandLine& line, const std::function<Status(parallel::Communicator&)>& run) {
  if (parallel::LaunchedByMpi()) return AsRank(line, run);
  return run(
      *parallel::Recorded(parallel::MakeSelfCommunicator(), "world", parallel::ProcessCommLog()));
}

}  // namespace sala::launch
