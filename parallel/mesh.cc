#include "parallel/mesh.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "parallel/comm_log.h"
#include "parallel/device_communicator.h"

namespace sala::parallel {

void MeshConfig::Bind(ConfigBinder& b) {
  b.Field("dp", &dp, {.min = 0});
  b.Field("cp", &cp, {.min = 1});
  b.Field("tp", &tp, {.min = 1});
  b.Field("zero_stage", &zero_stage, {.min = 0, .max = 1});
  b.Enum("transport", &transport,
         {{"auto", Transport::kAuto}, {"mpi", Transport::kMpi}, {"nccl", Transport::kNccl}});
}

StatusOr<MeshConfig> ResolveMesh(int ranks, const MeshConfig& config) {
  const auto error = [](const std::string& text) {
    return MakeError(ExitCode::kConfig, "CFG-MESH", text);
  };
  if (config.cp != 1 || config.tp != 1) {
    return error("parallel.cp is " + std::to_string(config.cp) + " and parallel.tp is " +
                 std::to_string(config.tp) + "; this version splits data only: set both to 1");
  }
  MeshConfig resolved = config;
  if (resolved.dp == 0) resolved.dp = ranks;
  if (resolved.dp != ranks) {
    return error("parallel.dp is " + std::to_string(config.dp) + " but the job has " +
                 std::to_string(ranks) + " ranks; start mpirun -np " + std::to_string(config.dp) +
                 " or set parallel.dp to 0 (all ranks)");
  }
  return resolved;
}

namespace {

// Whether no two ranks share a device.
StatusOr<bool> DevicesAreDistinct(Communicator& world, const Device& device) {
  SALA_ASSIGN_OR_RETURN(std::vector<std::string> devices,
                        world.AllGatherText(device.options().host + "/" + device.info().bus_id));
  std::sort(devices.begin(), devices.end());
  return std::adjacent_find(devices.begin(), devices.end()) == devices.end();
}

}  // namespace

StatusOr<std::unique_ptr<Mesh>> Mesh::Create(Communicator& world, const MeshConfig& config,
                                             const Context& ctx) {
  SALA_ASSIGN_OR_RETURN(const MeshConfig resolved, ResolveMesh(world.size(), config));
  std::unique_ptr<Mesh> mesh(new Mesh(world, resolved));
  SALA_ASSIGN_OR_RETURN(mesh->dp_group_, world.Split(0));
  NameGroup(*mesh->dp_group_, "dp");
  if (!ctx.cuda()) return mesh;
  SALA_ASSIGN_OR_RETURN(const bool distinct, DevicesAreDistinct(world, *ctx.gpu));
  const Communicator& host_group = *mesh->dp_group_;  // lives on inside the one for device memory
  const bool nccl = config.transport == Transport::kNccl ||
                    (config.transport == Transport::kAuto && distinct && world.size() > 1);
  if (nccl && !distinct && !ctx.gpu->info().emulated) {
    return MakeError(ExitCode::kConfig, "CFG-MESH",
                     "parallel.transport is nccl, but several ranks share a device; start one rank "
                     "per device or use transport: mpi");
  }
  if (nccl) {
    mesh->transport_ = "NCCL";
    SALA_ASSIGN_OR_RETURN(mesh->dp_group_, MakeNcclCommunicator(std::move(mesh->dp_group_), ctx,
                                                                ctx.gpu->options().deterministic));
  } else {
    mesh->dp_group_ = MakeStagedCommunicator(std::move(mesh->dp_group_), *ctx.gpu);
  }
  mesh->dp_group_ = RecordedLike(host_group, std::move(mesh->dp_group_), "dp");
  return mesh;
}

FlatPartition FlatPartition::Even(int64_t n, int ranks, int64_t alignment) {
  FlatPartition partition;
  const int64_t units = (n + alignment - 1) / alignment;
  for (int64_t r = 0; r <= ranks; ++r)
    partition.begin.push_back(std::min(n, units * r / ranks * alignment));
  for (size_t r = 0; r + 1 < partition.begin.size(); ++r) {
    partition.counts.push_back(partition.begin[r + 1] - partition.begin[r]);
  }
  return partition;
}

}  // namespace sala::parallel
