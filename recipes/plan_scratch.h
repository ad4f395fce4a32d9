// Work space that the kernels take from the scratch arena, by their sizes. Not part of the room's
// interface.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/common/documents.h"
#include "kernels/sparse_attention/sparse_attention.h"
#include "model/spread.h"
#include "recipes/plan_pass.h"

namespace sala::recipes {

// Of a mixer, as one tensor rank has them.
struct Heads {
  int64_t heads, kv_heads, d;
  int64_t width() const { return heads * d; }
  int64_t kv_width() const { return kv_heads * d; }
};

// A product of [m, k] and [k, n].
void GemmScratch(PassContext& ctx, int64_t m, int64_t n, int64_t k);
// Whether embedding, MLPs, norms and head learn: all but in a distillation of mixers only.
bool AllTrained(const PlanInput& input);
// y = x W^T of `tokens` rows and its gradients, W's where it is trained.
void ProductScratch(PassContext& ctx, int64_t tokens, int64_t out, int64_t in, bool trained);
// Partial sums over rows, of the gradients of norm weights.
void RowSumsScratch(PassContext& ctx, int64_t rows, int64_t width);
// Room for one gathering of n numbers over the tensor ranks (kernels/common/exchange.h). Stays
// taken.
void GatherScratch(PassContext& ctx, int64_t n);
// One pass of attention in key blocks of `block` tokens over the documents that meet the share.
void AttentionScratch(PassContext& ctx, const Heads& g,
                      const std::vector<kernels::DocumentRange>& documents,
                      const model::TokenShare& share, int64_t block, bool backward);
// Choosing blocks for `group` queries a key/value head.
void SelectionScratch(PassContext& ctx, const Heads& g,
                      const std::vector<kernels::DocumentRange>& documents,
                      const model::TokenShare& share, const kernels::SparseAttentionConfig& config,
                      int64_t group);
void LightningScratch(PassContext& ctx, const Heads& g);

}  // namespace sala::recipes
