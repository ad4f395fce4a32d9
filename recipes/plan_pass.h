// One micro-batch as model/ computes it, with sizes instead of tensors: the same allocations in the
// same scopes, the same exchanges in the same places. The model's passes are in plan_model.h, what
// kernels take in plan_scratch.h. Not part of the room's interface.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/common/documents.h"
#include "model/config.h"
#include "model/parameters.h"
#include "model/spread.h"
#include "recipes/plan.h"

namespace sala::recipes {

constexpr int64_t kFloat = 4;  // bytes

// An Arena that only counts (core/arena.h), with the same blocks.
class ArenaMeter {
 public:
  ArenaMeter(int64_t alignment, int64_t block_bytes)
      : alignment_(alignment), block_bytes_(block_bytes) {}

  struct Mark {
    size_t block = 0;
    int64_t offset = 0, used = 0;
  };
  void New(int64_t bytes);
  Mark mark() const { return at_; }
  void Release(const Mark& mark) { at_ = mark; }

  int64_t peak() const { return peak_; }
  // What becomes resident of its blocks. More than the peak where something did not fit into the
  // rest of a block, and with huge pages by their size (core/host_memory.h).
  int64_t touched(bool huge_pages) const;

 private:
  struct Block {
    int64_t size = 0, touched = 0;
  };
  int64_t alignment_, block_bytes_;
  std::vector<Block> blocks_;
  Mark at_;
  int64_t peak_ = 0;
};

class MeterScope {
 public:
  explicit MeterScope(ArenaMeter& meter) : meter_(meter), mark_(meter.mark()) {}
  MeterScope(const MeterScope&) = delete;
  MeterScope& operator=(const MeterScope&) = delete;
  ~MeterScope() { meter_.Release(mark_); }

 private:
  ArenaMeter& meter_;
  ArenaMeter::Mark mark_;
};

// A rank's place, and what its passes add up.
struct PassContext {
  PassContext(const PlanInput& plan, int64_t rank);

  const PlanInput& input;
  int cp, cp_ranks, tp, tp_ranks;
  int64_t element;  // bytes of an activation
  ArenaMeter arena, scratch;
  CommPlan comm;
  // A unit of the trained parameters, or of the teacher's, is about to be used.
  std::function<void(int64_t unit)> enter, enter_teacher;

  bool cuda() const { return input.device == DeviceKind::kCuda; }
  void Count(const std::string& name, int64_t bytes) {
    ++comm[name].calls;
    comm[name].bytes += bytes;
  }
};

// Adds one micro-batch with the documents of cu_seqlens.
void PassMicroBatch(PassContext& ctx, const std::vector<int32_t>& cu_seqlens);

// EvaluateCrossEntropy of model/loss.h.
void PassEvaluate(PassContext& ctx, const model::ModelConfig& config,
                  const std::vector<int32_t>& cu_seqlens);

// One item of Scorer (recipes/halo/score.h) on `teacher` with its first layer linear.
void PassScore(PassContext& ctx, const model::ModelConfig& teacher,
               const std::vector<int32_t>& cu_seqlens);

}  // namespace sala::recipes
