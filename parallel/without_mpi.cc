// parallel/mpi_communicator.h in a build without MPI (SALA_GPU_SUITE): a process is alone.
#include <unistd.h>

#include <cstdlib>

#include "parallel/mpi_communicator.h"

namespace sala::parallel {

std::string HostName() {
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  return name;
}

StatusOr<std::unique_ptr<MpiSession>> MpiSession::Start(int*, char***) {
  return MakeError(ExitCode::kDevice, "COMM-FAILED",
                   "this program was built without MPI; start it without mpirun");
}

MpiSession::~MpiSession() = default;

StatusOr<std::unique_ptr<Communicator>> MpiSession::World() { return MakeSelfCommunicator(); }

void MpiSession::Abort(int exit_code) { _exit(exit_code); }

std::string MpiLibraryVersion() { return "none"; }

bool BuiltWithMpi() { return false; }

// Asked all the same: ranks of a launcher that each believe to be alone would write one run
// directory.
bool LaunchedByMpi() {
  return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMIX_RANK") != nullptr ||
         std::getenv("PMI_RANK") != nullptr;
}

}  // namespace sala::parallel
