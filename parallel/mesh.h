// The mesh of ranks: dp (data) x cp (context) x tp (tensor), tp innermost: rank = (dp * CP + cp) *
// TP + tp. Ranks of a host have neighbouring numbers (MpiSession::World), so the groups that
// exchange most lie on as few hosts as they can.
//
//   dp: each dp rank takes its own samples of the global batch.
//   cp: the tokens of a micro-batch are cut in contiguous ranges, one per cp rank.
//   tp: heads, MLP columns and vocabulary rows are cut; between the layers each tp rank has a part
//       of the tokens.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "core/config.h"
#include "core/context.h"
#include "core/status.h"
#include "parallel/comm_queue.h"
#include "parallel/communicator.h"
#include "parallel/partition.h"

namespace sala::parallel {

// How device memory travels between ranks: kAuto is NCCL where every rank has a device of its own,
// else MPI through host memory.
enum class Transport : uint8_t { kAuto, kMpi, kNccl };

struct MeshConfig {
  int64_t dp = 0;  // 0: all ranks that cp and tp leave
  int64_t cp = 1;
  int64_t tp = 1;
  // What the dp x cp ranks, which hold the same parameters, split among them instead of repeating
  // it: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
  int64_t zero_stage = 1;
  Transport transport = Transport::kAuto;

  void Bind(ConfigBinder& b);
};

// The mesh of `ranks` ranks with dp filled in: CFG-MESH (78) when dp * cp * tp is not the number of
// ranks.
StatusOr<MeshConfig> ResolveMesh(int ranks, const MeshConfig& config);

class Mesh {
 public:
  // With a GPU context the cp, tp and background groups carry its memory; those of one rank need no
  // NCCL for it. Collective.
  static StatusOr<std::unique_ptr<Mesh>> Create(Communicator& world, const MeshConfig& config,
                                                const Context& ctx = {});

  Communicator& world() const { return world_; }
  // The ranks that differ from this one in one coordinate only.
  Communicator& dp_group() const { return *dp_group_; }
  Communicator& cp_group() const { return *cp_group_; }
  Communicator& tp_group() const { return *tp_group_; }
  // dp x cp: the ranks that hold the same parameters; the place in it is dp * CP + cp.
  Communicator& param_group() const { return *param_group_; }
  // cp x tp: the ranks that work on the same samples.
  Communicator& sample_group() const { return *sample_group_; }
  // tp ranks in runs of `n` neighbours: those that hold the same key/value head; for use by the
  // main thread, or beside the computation. Made at the first call: collective over the tp group
  // then. `n` divides tp.
  StatusOr<Communicator*> TensorSubgroup(int n, bool background);

  int dp_rank() const { return dp_group_->rank(); }
  int dp_size() const { return dp_group_->size(); }
  int cp_rank() const { return cp_group_->rank(); }
  int cp_size() const { return cp_group_->size(); }
  int tp_rank() const { return tp_group_->rank(); }
  int tp_size() const { return tp_group_->size(); }
  int param_rank() const { return param_group_->rank(); }
  int param_size() const { return param_group_->size(); }

  // What runs beside the computation, and the groups it uses for it, which nobody else may use.
  CommQueue& queue() const { return *queue_; }
  Communicator& background_param_group() const {
    return background_param_ ? *background_param_ : *param_group_;
  }
  Communicator& background_tp_group() const {
    return background_tp_ ? *background_tp_ : *tp_group_;
  }
  // Where kernels of what runs beside the computation go, with the device of `ctx` in its place.
  Context Beside(const Context& ctx) const {
    Context beside = ctx;
    if (side_) beside.gpu = &side_->device();
    return beside;
  }

  // While a step is only planned, on a dry device (recipes/step_loop.cc): nothing is exchanged, and
  // who exchanges around the use of a unit (model/units.h) does nothing.
  class Planning {
   public:
    explicit Planning(Mesh& mesh) : mesh_(mesh) { mesh_.planning_ = true; }
    Planning(const Planning&) = delete;
    Planning& operator=(const Planning&) = delete;
    ~Planning() { mesh_.planning_ = false; }

   private:
    Mesh& mesh_;
  };
  bool planning() const { return planning_; }

  const MeshConfig& config() const { return config_; }  // dp resolved
  int64_t zero_stage() const { return config_.zero_stage; }
  const char* transport() const { return transport_; }  // of device memory: "MPI", "NCCL"

 private:
  Mesh(Communicator& world, const MeshConfig& config) : world_(world), config_(config) {}
  StatusOr<std::unique_ptr<Communicator>> Group(int64_t colour, const std::string& name,
                                                const Context& ctx, bool nccl,
                                                SideStream* side = nullptr);
  Status MakeGroups(const Context& ctx, bool nccl);

  Communicator& world_;
  MeshConfig config_;
  std::unique_ptr<SideStream> side_;  // on a GPU with NCCL
  std::unique_ptr<Communicator> dp_group_, cp_group_, tp_group_, param_group_, sample_group_;
  std::unique_ptr<Communicator> background_param_, background_tp_;
  std::map<std::pair<int, bool>, std::unique_ptr<Communicator>> tensor_subgroups_;
  std::unique_ptr<CommQueue> queue_;  // ends before the groups it uses
  const char* transport_ = "MPI";
  bool planning_ = false;
};

}  // namespace sala::parallel
