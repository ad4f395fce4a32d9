// A command that runs alone or as one rank of an MPI job.
#pragma once

#include <functional>

#include "core/status.h"
#include "launch/command.h"
#include "parallel/communicator.h"

namespace sala::launch {

// `run` on all ranks of the job, or on one where no launcher started the process. An error of all
// ranks is printed once; where one rank fails alone it waits a few seconds for the others and then
// ends the job with its exit code.
Status OnAllRanks(CommandLine& line, const std::function<Status(parallel::Communicator&)>& run);

}  // namespace sala::launch
