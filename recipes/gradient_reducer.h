// The gradient of a step: where micro-batches add to it, and its sum over the ranks that hold the
// same parameters (dp x cp), cut in units (model/units.h).
//
// With ZeRO stage 0 and 1 a rank has the whole gradient, and a unit is summed when the last
// micro-batch is through with it, beside the rest of the backward pass. With stage 2 and 3 there is
// room for a few units only: each is summed after every micro-batch and added to this rank's shard.
// What tensor ranks hold alike is summed over them first.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/context.h"
#include "model/parameters.h"
#include "parallel/mesh.h"

namespace sala::recipes {

// How a gradient with these unit borders is cut over `ranks` ranks, and, where sums do not depend
// on the ranks, the borders of the pieces of a unit that the global norm is added from.
parallel::UnitPartition GradientPartition(const std::vector<int64_t>& borders, int ranks,
                                          bool rank_independent);
std::vector<int64_t> NormBorders(const parallel::UnitPartition& partition, int64_t unit);

// Elements [begin, end) of the flat buffer that `copies` tensor ranks hold alike: what is summed
// over them in one call. By unit.
struct CopyRange {
  int64_t begin, end, copies;
};
std::vector<std::vector<CopyRange>> CopyRanges(const std::vector<model::ParameterSpec>& specs,
                                               int64_t units);

class GradientReducer : public model::UnitHooks {
 public:
  // `layout` is that of the parameters. The mesh must outlive this. With `rank_independent`
  // (stage 0 and 1) pieces do not depend on the number of ranks more than they must, and nothing is
  // summed before Finish: micro-batches are added by the caller.
  GradientReducer(const Context& ctx, const model::ParameterStore& layout, parallel::Mesh& mesh,
                  bool rank_independent);
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;
  ~GradientReducer() override;

  // Float32, laid out as the parameters, on the context's device.
  model::ParameterStore& store() { return store_; }
  const parallel::UnitPartition& partition() const { return partition_; }
  // Borders of the pieces of unit u that the global norm is added from: this rank's piece, or with
  // rank_independent those of all ranks, of which a rank's piece is some.
  const std::vector<int64_t>& norm_borders(int64_t u) const {
    return norm_borders_[static_cast<size_t>(u)];
  }

  void BeginStep();  // the gradient is zero
  void BeginMicroBatch(bool last);
  // Every rank has its pieces of the sum, with stage 0 all of it. Collective.
  Status Finish();
  bool rank_independent() const { return by_hand_; }
  // Elements [begin, end) of the flat buffer, inside one of this rank's pieces (stage 0: anywhere),
  // after Finish.
  Tensor Summed(int64_t begin, int64_t end);

  void Enter(int64_t unit) override;
  void Leave(int64_t unit) override;

  size_t bytes() const { return store_.bytes() + shard_.bytes() + term_.bytes() + work_.bytes(); }

 private:
  bool sliced() const { return mesh_.zero_stage() >= 2; }
  bool alone() const { return mesh_.param_size() == 1; }
  void Submit(int64_t unit);
  Status Reduce(int64_t unit);
  Status SumCopies(int64_t unit);
  void ReserveWork();

  // Values that several tensor ranks hold, one behind the other in a unit.
  struct Copies {
    int64_t begin, end;
    parallel::Communicator* group;
  };

  Context ctx_;
  parallel::Mesh& mesh_;
  bool by_hand_;
  parallel::UnitPartition partition_;
  std::vector<std::vector<int64_t>> norm_borders_;
  model::ParameterStore store_;
  model::ParameterStore shard_;  // this rank's pieces, unless they are in store_
  Buffer term_;                  // stage 2 and 3: of one unit's piece, before it is added
  std::vector<std::vector<Copies>> copies_;           // [units]
  std::vector<parallel::CommQueue::Ticket> pending_;  // [units], 0: not submitted
  std::vector<int64_t> in_slot_;                      // stage 2 and 3: unit that used a slot last
  bool last_ = false;
  Buffer work_;                       // of sums over copies
  std::unique_ptr<ThreadPool> pool_;  // of the thread beside the computation
};

}  // namespace sala::recipes
