#include "recipes/rank_device.h"

#include <string>

#include "core/cuda_module.h"
#include "parallel/device_communicator.h"
#include "parallel/mpi_communicator.h"

namespace sala::recipes {

StatusOr<std::unique_ptr<Device>> OpenRankDevice(parallel::Communicator& world,
                                                 bool deterministic) {
  const std::string host = parallel::HostName();
  SALA_ASSIGN_OR_RETURN(const parallel::HostRanks ranks, parallel::RanksOfThisHost(world, host));
  auto device = OpenCudaDevice({.local_rank = ranks.local_rank,
                                .rank = world.rank(),
                                .host = host,
                                .deterministic = deterministic});
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, device.status()));
  return device;
}

}  // namespace sala::recipes
