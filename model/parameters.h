// Named parameters in one flat buffer, and the same layout again for gradients and optimizer
// moments.
//
// Names are those of the exported model ("model.layers.0.self_attn.q_proj.weight"), weights are
// [out, in]. Every tensor starts at a multiple of 16 elements; the gap elements stay zero. A flat
// layout makes communication few and large and lets the optimizer state be cut anywhere.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "core/context.h"
#include "core/tensor.h"
#include "model/config.h"
#include "model/units.h"
#include "parallel/mesh.h"

namespace sala::model {

// What muP and weight decay need to know of a tensor (docs/training.md).
enum class ParameterKind : uint8_t {
  kMatrix,     // 2-D weights of the blocks
  kVector,     // norm weights
  kEmbedding,  // input embedding (also the head, when tied)
  kHead,       // untied output head
};

struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;  // of the part this rank has
  ParameterKind kind = ParameterKind::kMatrix;
  int64_t unit = 0;    // UnitOfEmbedding, UnitOfLayer, ...
  int64_t offset = 0;  // elements, in the flat buffer
  int64_t numel = 0;

  // Where the part lies in the whole tensor. Elements from `stored` on are rows of padding behind
  // the vocabulary: they are zero and not saved.
  std::vector<int64_t> global_shape;
  std::vector<int64_t> box_offset;
  int64_t stored = 0;
  // Tensor ranks that hold these same values; their gradients are parts of one sum. The owner, one
  // of them, saves and counts them.
  int64_t copies = 1;
  bool owner = true;

  std::vector<int64_t> box_shape() const;  // without padding
};

// All parameters of a model, as one tensor rank has them, in a fixed order: embedding, layers,
// final norm, head. In a layer what all tensor ranks hold alike comes last, so that its gradient is
// one range.
std::vector<ParameterSpec> ParameterSpecs(const ModelConfig& config, const TensorShard& shard = {});

// The tensors of one mixer of the given type with the prefix "model.layers.I.self_attn.".
std::vector<ParameterSpec> MixerSpecs(const ModelConfig& config, int64_t layer, MixerType type,
                                      const TensorShard& shard = {});

// Assigns offsets in order; returns the size of the flat buffer in elements.
int64_t LayOut(std::vector<ParameterSpec>& specs);

// Where the units of laid out specs begin and end in the flat buffer: [units + 1].
std::vector<int64_t> UnitBorders(const std::vector<ParameterSpec>& specs);

// How much of the flat buffer a store keeps in memory.
struct Placement {
  enum Kind : uint8_t {
    kWhole,
    kShard,  // a rank's pieces of a partition
    kSlots,  // room for a few units that take turns (model/units.h, SlotOf)
  };
  Kind kind = kWhole;
  parallel::UnitPartition partition = {};  // kShard
  int rank = 0;

  static Placement Shard(const parallel::UnitPartition& partition, int rank) {
    return {kShard, partition, rank};
  }
  static Placement Slots() { return {kSlots, {}, 0}; }
};

class ParameterStore {
 public:
  ParameterStore() = default;
  // Zero-filled float32 in host memory.
  explicit ParameterStore(std::vector<ParameterSpec> specs, const Placement& placement = {})
      : ParameterStore(std::move(specs), DType::kF32, nullptr, placement) {}
  // Zero-filled, in memory of `device` (null: of the host).
  ParameterStore(std::vector<ParameterSpec> specs, DType dtype, Device* device,
                 const Placement& placement = {});

  const std::vector<ParameterSpec>& specs() const { return specs_; }
  const std::vector<int64_t>& unit_borders() const { return borders_; }  // [kUnits + 1]
  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }  // elements with gaps, whether or not in memory
  size_t bytes() const { return data_.bytes(); }
  int64_t parameters() const;        // elements this rank has, without gaps and padding
  int64_t whole_parameters() const;  // of the whole tensors
  bool whole() const { return placement_.kind == Placement::kWhole; }

  // The elements of a whole float32 store in host memory.
  float* data();
  const float* data() const;
  // Elements [begin, end) of the flat buffer, gaps included, which must lie in memory in a row;
  // all.
  Tensor Flat();
  Tensor Flat(int64_t begin, int64_t end);
  void Zero();

  bool Has(const std::string& name) const { return index_.count(name) > 0; }
  const ParameterSpec& Spec(const std::string& name) const;
  Tensor Get(const std::string& name);  // CHECKs that it exists
  ConstTensor Get(const std::string& name) const;
  // Calls part(begin, end) for the elements of a tensor that are in memory, counted from its first;
  // padding is left out.
  void ForEachPart(const ParameterSpec& spec,
                   const std::function<void(int64_t begin, int64_t end)>& part) const;

  // Who is told before a unit's tensors are used and after; null: nobody needs to know.
  UnitHooks* hooks() const { return hooks_; }
  void set_hooks(UnitHooks* hooks) { hooks_ = hooks; }

 private:
  DeviceKind device_kind() const;
  int64_t Place(int64_t offset) const;  // element of the flat buffer -> element in memory
  char* At(int64_t offset) const;

  std::vector<ParameterSpec> specs_;
  std::vector<int64_t> borders_;
  std::map<std::string, size_t> index_;
  DType dtype_ = DType::kF32;
  int64_t size_ = 0;
  Placement placement_;
  std::vector<int64_t> slots_;  // kSlots: SlotBorders
  UnitHooks* hooks_ = nullptr;
  Buffer data_;
};

// The parameters a model computes with. On a CPU they are the float32 store itself. On a GPU they
// are a second store on the device, rounded to bfloat16; the float32 store in host memory then is
// where training starts from and what a checkpoint is written from, and the optimizer keeps the
// masters in between (recipes/optimizer.h).
//
// With ZeRO-3 a rank keeps its shard (on a CPU: that part of the host's store), and units are
// gathered into slots shortly before they are used, the next one while the present one is computed
// with. With ZeRO-1 and 2 the parameters are whole; after an update the units are gathered beside
// what follows, and a unit's first use waits for it.
class ComputeParameters : public UnitHooks {
 public:
  // `host` must outlive this and stay where it is; `mesh` (null: one rank) too.
  explicit ComputeParameters(const Context& ctx, ParameterStore& host,
                             parallel::Mesh* mesh = nullptr);
  ComputeParameters(const ComputeParameters&) = delete;
  ComputeParameters& operator=(const ComputeParameters&) = delete;
  ~ComputeParameters() override;

  ParameterStore& host() { return *host_; }
  ParameterStore& store() { return store_ ? *store_ : *host_; }  // what the model is bound to
  bool on_device() const { return on_device_; }
  bool sharded() const { return sharded_; }  // ZeRO-3
  // Elements [begin, end) of this rank's part, where the optimizer writes them.
  Tensor Own(int64_t begin, int64_t end);
  // Rounds the host's values onto the device again, after they were changed there.
  void Refresh(const Context& ctx);
  // After `Own` parts of the partition were changed: gathers unit u, beside what follows, or with
  // ZeRO-3 forgets what is in the slots.
  void Share(int64_t u, const parallel::UnitPartition& partition);
  // Waits for all gathering.
  void Settle();

  void Enter(int64_t unit) override;
  void Leave(int64_t) override {}

  size_t bytes() const;  // of what this adds to the host's store

 private:
  // Unit u of the partition, beside what follows, to where the model reads it.
  void Gather(int64_t u, const parallel::UnitPartition& partition);

  ParameterStore* host_;
  parallel::Mesh* mesh_;
  bool on_device_, sharded_;
  std::unique_ptr<ParameterStore> store_;  // on a GPU, or slots
  std::unique_ptr<ParameterStore> shard_;  // on a GPU with ZeRO-3
  parallel::UnitPartition partition_;      // ZeRO-3
  SlotSchedule slots_;
  std::vector<parallel::CommQueue::Ticket> pending_;  // [units], 0: nothing
};

// Normal draws with the muP standard deviations (matrices initializer_range / sqrt(m), embedding
// and head initializer_range; training.md), norm weights 1. Draws depend on (seed, tensor name)
// only.
void InitialiseParameters(const ModelConfig& config, int64_t seed, ParameterStore& store);

// Fills what the store has of one tensor, from the numbers that `next` gives for the elements of
// the whole tensor in order: the values do not depend on how tensors are cut.
void FillTensor(ParameterStore& store, const ParameterSpec& spec,
                const std::function<double()>& next);

// One tensor: normal with this standard deviation.
void InitialiseNormal(int64_t seed, double standard_deviation, ParameterStore& store,
                      const std::string& name);

}  // namespace sala::model
