// One micro-batch as model/ computes it, with sizes instead of tensors: the same allocations in the
// same scopes, the same exchanges in the same places. Not part of the room's interface.
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

// An arena that only counts.
class ArenaMeter {
 public:
  explicit ArenaMeter(int64_t alignment) : alignment_(alignment) {}
  void New(int64_t bytes) {
    used_ += std::max(alignment_, (bytes + alignment_ - 1) / alignment_ * alignment_);
    peak_ = std::max(peak_, used_);
  }
  int64_t used() const { return used_; }
  void Release(int64_t used) { used_ = used; }
  int64_t peak() const { return peak_; }

 private:
  int64_t alignment_;
  int64_t used_ = 0, peak_ = 0;
};

class MeterScope {
 public:
  explicit MeterScope(ArenaMeter& meter) : meter_(meter), used_(meter.used()) {}
  MeterScope(const MeterScope&) = delete;
  MeterScope& operator=(const MeterScope&) = delete;
  ~MeterScope() { meter_.Release(used_); }

 private:
  ArenaMeter& meter_;
  int64_t used_;
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

}  // namespace sala::recipes
