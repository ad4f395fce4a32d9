// The GPU of one rank, for commands that compute on one.
#pragma once

#include <memory>

#include "core/device.h"
#include "core/status.h"
#include "parallel/communicator.h"

namespace sala::recipes {

// The device with this rank's number on its host, modulo those that are there. Collective: all
// ranks learn of one that has none. CUDA-MODULE, CUDA-NONE, CUDA-FAILED, CUDA-MEMORY (71).
StatusOr<std::unique_ptr<Device>> OpenRankDevice(parallel::Communicator& world,
                                                 bool deterministic = true);

}  // namespace sala::recipes
