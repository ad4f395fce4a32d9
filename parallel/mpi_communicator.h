// The MPI library's life and the communicator on top of it.
#pragma once

#include <memory>
#include <string>

#include "parallel/communicator.h"

namespace sala::parallel {

// Starts MPI and ends it on destruction. Make one, first thing in main. It asks for the thread
// level MULTIPLE, which lets exchanges run beside the computation (parallel/comm_queue.h); with
// less only the main thread calls MPI.
class MpiSession {
 public:
  static StatusOr<std::unique_ptr<MpiSession>> Start(int* argc, char*** argv);
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;
  ~MpiSession();

  // All ranks of the job, those of a host next to each other; the self communicator where there is
  // only one.
  StatusOr<std::unique_ptr<Communicator>> World();
  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& host() const { return host_; }

  // Ends every rank of the job with this exit code, after the cause was logged.
  [[noreturn]] static void Abort(int exit_code);

 private:
  MpiSession() = default;
  Status NumberRanks();
  int rank_ = 0;
  int size_ = 1;
  std::string host_;
  std::unique_ptr<Communicator> world_;
};

// This machine's name, as it stands in messages.
std::string HostName();

// "Open MPI v4.1.4", without starting MPI; "none" in a build without it.
std::string MpiLibraryVersion();

// False in a build without MPI, whose processes are alone.
bool BuiltWithMpi();

// True when this process was started by an MPI launcher (mpirun, srun): a lone process then needs
// no MPI at all.
bool LaunchedByMpi();

}  // namespace sala::parallel
