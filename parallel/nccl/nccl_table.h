// What the NCCL part of the CUDA module offers. Part of the CUDA module.
#pragma once

#include <memory>

#include "parallel/device_communicator.h"

namespace sala::parallel {

StatusOr<std::unique_ptr<Communicator>> MakeNccl(std::unique_ptr<Communicator> host,
                                                 const Context& ctx, bool ordered,
                                                 SideStream* side);
std::unique_ptr<SideStream> MakeSide(Device& compute);
const NcclInterface& NcclTable();

}  // namespace sala::parallel
