// Communicators for device memory. What concerns host memory (small sums, texts, barriers) goes to
// the communicator they are made of.
#pragma once

#include <memory>
#include <string>

#include "core/context.h"
#include "core/device.h"
#include "parallel/comm_queue.h"
#include "parallel/communicator.h"

namespace sala::parallel {

// Device buffers go through host memory (copies through the device's pinned ring) and `host`, in
// pieces. Any number of ranks may share
// a device. Sums have the bits of `host`. The device must outlive the communicator.
std::unique_ptr<Communicator> MakeStagedCommunicator(std::unique_ptr<Communicator> host,
                                                     Device& device);

// NCCL, bootstrapped over `host`; every rank needs a device of its own. Sums are exchanged and
// added by the order of parallel/ordered_sum.h, with the bits of the other communicators, so that
// neither topology nor version changes a run; `ordered` false leaves sums to NCCL, which is faster
// and repeats only on the same machines. COMM-FAILED (71) when NCCL fails or reports an error of
// another rank while one waits. The context's device and arenas must outlive it. Collective.
//
// With `side`, which must outlive it, exchanges are ordered with that stream in place of the
// compute stream and return when they are queued; errors are then told by SideStream::Failure.
StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(std::unique_ptr<Communicator> host,
                                                             const Context& ctx, bool ordered,
                                                             SideStream* side = nullptr);

// `compute` must outlive it.
StatusOr<std::unique_ptr<SideStream>> MakeSideStream(Device& compute);

// Which of the ranks of `comm` run on this host, in rank order, and this rank's place among them.
struct HostRanks {
  int local_rank = 0;
  int local_size = 1;
};
StatusOr<HostRanks> RanksOfThisHost(Communicator& comm, const std::string& host);

// What the CUDA module offers to this room (core/cuda_module.h, find("nccl")).
struct NcclInterface {
  StatusOr<std::unique_ptr<Communicator>> (*make)(std::unique_ptr<Communicator> host,
                                                  const Context& ctx, bool ordered,
                                                  SideStream* side) = nullptr;
  std::unique_ptr<SideStream> (*make_side)(Device& compute) = nullptr;
};

}  // namespace sala::parallel
