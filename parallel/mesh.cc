#include "parallel/mesh.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "parallel/comm_log.h"
#include "parallel/device_communicator.h"

namespace sala::parallel {

void MeshConfig::Bind(ConfigBinder& b) {
  // Their product must not overflow.
  constexpr double kMost = 1 << 20;
  b.Field("dp", &dp, {.min = 0, .max = kMost});
  b.Field("cp", &cp, {.min = 1, .max = kMost});
  b.Field("tp", &tp, {.min = 1, .max = kMost});
  b.Field("zero_stage", &zero_stage, {.min = 0, .max = 3});
  b.Enum("transport", &transport,
         {{"auto", Transport::kAuto}, {"mpi", Transport::kMpi}, {"nccl", Transport::kNccl}});
}

StatusOr<MeshConfig> ResolveMesh(int ranks, const MeshConfig& config) {
  const auto error = [](const std::string& text) {
    return MakeError(ExitCode::kConfig, "CFG-MESH", text);
  };
  const int64_t inner = config.cp * config.tp;
  MeshConfig resolved = config;
  if (resolved.dp == 0) {
    if (inner > ranks || ranks % inner != 0) {
      return error("parallel.cp " + std::to_string(config.cp) + " x parallel.tp " +
                   std::to_string(config.tp) + " = " + std::to_string(inner) +
                   " does not divide the job's " + std::to_string(ranks) +
                   " ranks; start a multiple of " + std::to_string(inner) +
                   " ranks, or change cp or tp");
    }
    resolved.dp = ranks / inner;
  }
  if (resolved.dp * inner != ranks) {
    return error("parallel.dp " + std::to_string(config.dp) + " x cp " + std::to_string(config.cp) +
                 " x tp " + std::to_string(config.tp) + " = " + std::to_string(config.dp * inner) +
                 " but the job has " + std::to_string(ranks) + " ranks; start mpirun -np " +
                 std::to_string(config.dp * inner) +
                 " or set parallel.dp to 0 (all ranks that cp and tp leave)");
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

// The ranks that call with the same colour, in rank order.
StatusOr<std::unique_ptr<Communicator>> Mesh::Group(int64_t colour, const std::string& name,
                                                    const Context& ctx, bool nccl,
                                                    SideStream* side) {
  SALA_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> group,
                        world_.Split(static_cast<int>(colour)));
  NameGroup(*group, name);
  if (!ctx.cuda()) return group;
  const Communicator& host_group = *group;  // lives on inside the one for device memory
  if (nccl && group->size() > 1) {
    SALA_ASSIGN_OR_RETURN(
        group, MakeNcclCommunicator(std::move(group), ctx, ctx.gpu->options().deterministic, side));
  } else {
    group = MakeStagedCommunicator(std::move(group), *ctx.gpu);
  }
  return RecordedLike(host_group, std::move(group), name);
}

Status Mesh::MakeGroups(const Context& ctx, bool nccl) {
  const int64_t tp = world_.rank() % config_.tp;
  const int64_t cp = world_.rank() / config_.tp % config_.cp;
  const int64_t dp = world_.rank() / config_.tp / config_.cp;
  const int64_t replica = dp * config_.cp + cp;
  SALA_ASSIGN_OR_RETURN(dp_group_, Group(cp * config_.tp + tp, "dp", {}, nccl));
  SALA_ASSIGN_OR_RETURN(cp_group_, Group(dp * config_.tp + tp, "cp", ctx, nccl));
  SALA_ASSIGN_OR_RETURN(tp_group_, Group(replica, "tp", ctx, nccl));
  if (nccl) {
    SALA_ASSIGN_OR_RETURN(side_, MakeSideStream(*ctx.gpu));
  }
  SALA_ASSIGN_OR_RETURN(param_group_, Group(tp, "param", side_ ? Context{} : ctx, nccl));
  SALA_ASSIGN_OR_RETURN(sample_group_, Group(dp, "sample", {}, nccl));
  const bool threaded = !ctx.cuda() && world_.thread_safe() && world_.size() > 1;
  if (threaded || side_) {
    SALA_ASSIGN_OR_RETURN(background_param_, Group(tp, "param", ctx, nccl, side_.get()));
    SALA_ASSIGN_OR_RETURN(background_tp_, Group(replica, "tp", ctx, nccl, side_.get()));
  }
  queue_ = std::make_unique<CommQueue>(threaded, side_.get());
  return OkStatus();
}

StatusOr<std::unique_ptr<Mesh>> Mesh::Create(Communicator& world, const MeshConfig& config,
                                             const Context& ctx) {
  SALA_ASSIGN_OR_RETURN(const MeshConfig resolved, ResolveMesh(world.size(), config));
  std::unique_ptr<Mesh> mesh(new Mesh(world, resolved));
  bool nccl = false;
  if (ctx.cuda()) {
    SALA_ASSIGN_OR_RETURN(const bool distinct, DevicesAreDistinct(world, *ctx.gpu));
    nccl = config.transport == Transport::kNccl ||
           (config.transport == Transport::kAuto && distinct && world.size() > 1);
    if (nccl && !distinct && !ctx.gpu->info().emulated) {
      return MakeError(ExitCode::kConfig, "CFG-MESH",
                       "parallel.transport is nccl, but several ranks share a device; start one "
                       "rank per device or use transport: mpi");
    }
    mesh->transport_ = nccl ? "NCCL" : "MPI";
  }
  SALA_RETURN_IF_ERROR(mesh->MakeGroups(ctx, nccl));
  return mesh;
}

StatusOr<Communicator*> Mesh::TensorSubgroup(int n, bool background) {
  std::unique_ptr<Communicator>& group = tensor_subgroups_[{n, background}];
  if (!group) {
    Communicator& all = background && side_ ? *background_tp_ : *tp_group_;
    SALA_ASSIGN_OR_RETURN(group, all.Split(tp_rank() / n));
    NameGroup(*group, "kv");
  }
  return group.get();
}

}  // namespace sala::parallel
