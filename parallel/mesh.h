// The mesh of ranks: dp (data) x cp (context) x tp (tensor), tp innermost. This version runs dp;
// the other two axes are there so that configurations, checkpoints and code name them, and are
// refused when larger than one.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/config.h"
#include "core/context.h"
#include "core/status.h"
#include "parallel/communicator.h"

namespace sala::parallel {

// How device memory travels between ranks: kAuto is NCCL where every rank has a device of its own,
// else MPI through host memory.
enum class Transport : uint8_t { kAuto, kMpi, kNccl };

struct MeshConfig {
  int64_t dp = 0;  // 0: all ranks that cp and tp leave
  int64_t cp = 1;
  int64_t tp = 1;
  int64_t zero_stage = 1;  // 0: optimizer state on every rank; 1: split over dp
  Transport transport = Transport::kAuto;

  void Bind(ConfigBinder& b);
};

// The mesh of `ranks` ranks with dp filled in: CFG-MESH (78) when dp * cp * tp is not the number of
// ranks, or an axis is not available.
StatusOr<MeshConfig> ResolveMesh(int ranks, const MeshConfig& config);

class Mesh {
 public:
  // With a GPU context the groups carry its memory. Collective.
  static StatusOr<std::unique_ptr<Mesh>> Create(Communicator& world, const MeshConfig& config,
                                                const Context& ctx = {});

  Communicator& world() const { return world_; }
  Communicator& dp_group() const { return *dp_group_; }
  int dp_rank() const { return dp_group_->rank(); }
  int dp_size() const { return dp_group_->size(); }
  const MeshConfig& config() const { return config_; }  // dp resolved
  const char* transport() const { return transport_; }  // of device memory: "MPI", "NCCL"

 private:
  Mesh(Communicator& world, const MeshConfig& config) : world_(world), config_(config) {}
  Communicator& world_;
  MeshConfig config_;
  std::unique_ptr<Communicator> dp_group_;
  const char* transport_ = "MPI";
};

// A flat buffer of n elements cut over ranks in contiguous pieces, as even as multiples of
// `alignment` allow.
struct FlatPartition {
  std::vector<int64_t> begin;   // [ranks + 1], first 0, last n
  std::vector<int64_t> counts;  // [ranks]

  static FlatPartition Even(int64_t n, int ranks, int64_t alignment = 16);
};

}  // namespace sala::parallel
