#include "model/mixer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "core/trace.h"
#include "kernels/attention/attention.h"
#include "kernels/gemm/gemm.h"
#include "kernels/lightning/lightning.h"
#include "kernels/logit_scale/logit_scale.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/sparse_attention/sparse_attention.h"
#include "kernels/tensor_ops/tensor_ops.h"
#include "model/projection.h"
#include "model/row_parallel.h"

namespace sala::model {
namespace {

using kernels::Write;

// Sizes of a rank's share of a mixer and the tables it rotates with.
struct Geometry {
  bool softmax;
  int64_t heads, kv_heads, first_head, all_heads, head_dim;
  float eps, scale;
  ConstTensor cos, sin;

  Geometry(const ModelConfig& config, const Spread& spread, MixerType type,
           const BatchTables& tables)
      : softmax(type == MixerType::kSoftmax),
        heads((softmax ? config.num_attention_heads : config.lightning_nh) / spread.tp_size()),
        kv_heads(softmax ? std::max<int64_t>(1, config.num_key_value_heads / spread.tp_size())
                         : heads),
        first_head(heads * spread.tp_rank()),
        all_heads(heads * spread.tp_size()),
        head_dim(softmax ? config.head_dim : config.lightning_head_dim),
        eps(static_cast<float>(config.rms_norm_eps)),
        scale(static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)))),
        cos(softmax ? tables.attention_cos : tables.lightning_cos),
        sin(softmax ? tables.attention_sin : tables.lightning_sin) {}
};

// The maps of a mixer's input, and which piece of the projection each is.
enum Piece : size_t { kQuery, kKey, kValue, kGate };
Projection MixerInputs(const MixerTensors& w) {
  return Projection({w.q_proj, w.k_proj, w.v_proj, w.gate});
}

// Norm and rotation of queries or keys; the input itself where the configuration has neither.
Tensor NormAndRotate(const Context& ctx, Arena& arena, const Geometry& g, const Tensor& raw,
                     int64_t heads, const ConstTensor& norm, Tensor* rstd) {
  if (norm.empty() && g.cos.empty()) return raw;
  Tensor y = arena.New(raw.dtype(), {raw.dim(0), heads * g.head_dim});
  if (!norm.empty()) *rstd = arena.New(DType::kF32, {raw.dim(0), heads});
  kernels::QkNormRopeForward(ctx, raw.AsHeads(heads, g.head_dim), norm, g.eps, g.cos, g.sin,
                             y.AsHeads(heads, g.head_dim), *rstd);
  return y;
}

void NormAndRotateBackward(const Context& ctx, const Geometry& g, const Tensor& dy,
                           const ConstTensor& raw, int64_t heads, const ConstTensor& norm,
                           const ConstTensor& rstd, const Tensor& dx, const Tensor& dnorm) {
  kernels::QkNormRopeBackward(ctx, dy.AsHeads(heads, g.head_dim), raw.AsHeads(heads, g.head_dim),
                              norm, rstd, g.cos, g.sin, dx.AsHeads(heads, g.head_dim), dnorm);
}

// Rows of heads one behind the other, as exchanges want them: x itself where it is so already.
Tensor Packed(const Context& ctx, Arena& arena, const Tensor& x) {
  if (x.contiguous()) return x;
  const Tensor packed = arena.New(x.dtype(), {x.dim(0), x.dim(1)});
  kernels::CopyColumns(ctx, x, packed);
  return packed;
}

void SoftmaxForward(const Context& ctx, Arena& arena, const ModelConfig& config,
                    const Spread& spread, const Geometry& g, const BatchTables& tables,
                    MixerState& s) {
  const int64_t t = s.q.dim(0);
  const auto gathered = [&](const Tensor& x) {
    if (spread.cp_size() == 1) return x;
    return spread.GatherContext(ctx, arena, tables.share, Packed(ctx, arena, x));
  };
  s.all_k = gathered(s.k);
  s.all_v = gathered(s.v);
  const Tensor q = s.q.AsHeads(g.heads, g.head_dim);
  const Tensor k = s.all_k.AsHeads(g.kv_heads, g.head_dim);
  const Tensor v = s.all_v.AsHeads(g.kv_heads, g.head_dim);
  const Tensor o = s.o.AsHeads(g.heads, g.head_dim);
  const int64_t first = tables.share.begin;
  s.lse = arena.New(DType::kF32, {t, g.heads});
  if (!tables.dense_documents.empty()) {
    kernels::AttentionForward(ctx, q, k, v, tables.dense_documents, g.scale, o, s.lse, first);
  }
  if (!tables.sparse_documents.empty()) {
    s.blocks =
        arena.New(DType::kI32, {t, g.kv_heads, std::max<int64_t>(1, config.sparse.free_blocks())});
    // All query heads of a key/value head choose together.
    const ArenaScope scope(arena);
    const Tensor group =
        spread.GatherGroup(ctx, arena, config.num_key_value_heads, Packed(ctx, arena, s.q));
    kernels::SelectBlocks(ctx, group.AsHeads(group.dim(1) / g.head_dim, g.head_dim), k,
                          tables.sparse_documents, config.sparse, g.scale, s.blocks, first);
    kernels::SparseAttentionForward(ctx, q, k, v, tables.sparse_documents, config.sparse, g.scale,
                                    s.blocks, o, s.lse, first);
  }
}

// dk and dv of all tokens in `documents`, from the queries of this range.
void SoftmaxBackward(const Context& ctx, const ModelConfig& config, const Geometry& g,
                     const BatchTables& tables, const MixerState& s, const ConstTensor& dout,
                     const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const auto heads = [&](const ConstTensor& x) { return x.AsHeads(g.heads, g.head_dim); };
  const auto kv_heads = [&](const ConstTensor& x) { return x.AsHeads(g.kv_heads, g.head_dim); };
  const Tensor dq_heads = dq.AsHeads(g.heads, g.head_dim);
  const Tensor dk_heads = dk.AsHeads(g.kv_heads, g.head_dim);
  const Tensor dv_heads = dv.AsHeads(g.kv_heads, g.head_dim);
  const int64_t first = tables.share.begin;
  if (!tables.dense_documents.empty()) {
    kernels::AttentionBackward(ctx, heads(s.q), kv_heads(s.all_k), kv_heads(s.all_v), heads(s.o),
                               s.lse, heads(dout), tables.dense_documents, g.scale, dq_heads,
                               dk_heads, dv_heads, first);
  }
  if (!tables.sparse_documents.empty()) {
    kernels::SparseAttentionBackward(ctx, heads(s.q), kv_heads(s.all_k), kv_heads(s.all_v),
                                     heads(s.o), s.lse, heads(dout), tables.sparse_documents,
                                     config.sparse, g.scale, s.blocks, dq_heads, dk_heads, dv_heads,
                                     first);
  }
}

// The same with the sums over ranges: dk and dv of this range's tokens.
void SpreadSoftmaxBackward(const Context& ctx, Arena& arena, const ModelConfig& config,
                           const Spread& spread, const Geometry& g, const BatchTables& tables,
                           const MixerState& s, const ConstTensor& dout, const Tensor& dq,
                           const Tensor& dk, const Tensor& dv) {
  if (spread.cp_size() == 1) {
    SoftmaxBackward(ctx, config, g, tables, s, dout, dq, dk, dv);
    return;
  }
  const ArenaScope scope(arena);
  // Documents of other ranges only get nothing from here.
  const Tensor all_dk = arena.NewZeroed(DType::kF32, {s.all_k.dim(0), s.all_k.dim(1)});
  const Tensor all_dv = arena.NewZeroed(DType::kF32, {s.all_v.dim(0), s.all_v.dim(1)});
  SoftmaxBackward(ctx, config, g, tables, s, dout, dq, all_dk, all_dv);
  for (const auto& [all, mine] : {std::pair(all_dk, dk), std::pair(all_dv, dv)}) {
    kernels::CopyColumns(ctx, spread.SumContext(ctx, arena, tables.share, all), mine);
  }
}

// Of this rank's heads.
std::vector<float> Slopes(const Geometry& g) {
  const std::vector<float> all = kernels::LightningSlopes(g.all_heads);
  return {all.begin() + g.first_head, all.begin() + g.first_head + g.heads};
}

void LinearForward(const Context& ctx, Arena& arena, const Spread& spread, const Geometry& g,
                   const BatchTables& tables, MixerState& s, const Tensor& state_out) {
  const auto heads = [&](const Tensor& x) { return x.AsHeads(g.heads, g.head_dim); };
  const std::vector<float> slopes = Slopes(g);
  if (spread.cp_size() > 1) {
    const Tensor own = arena.NewZeroed(DType::kF32, {g.heads, g.head_dim, g.head_dim});
    if (spread.cp_rank() + 1 < spread.cp_size()) {
      kernels::LightningStates(ctx, heads(s.k), heads(s.v), tables.cu_seqlens, slopes, {}, own);
    }
    const Tensor entering = spread.EnteringState(
        ctx, arena, tables.share, tables.survives, slopes,
        StateWindow(tables.share, kernels::LightningSlopes(g.all_heads)), false, own);
    if (tables.carried_in) s.state_in = entering;
  }
  kernels::LightningForward(ctx, heads(s.q), heads(s.k), heads(s.v), tables.cu_seqlens, slopes,
                            g.scale, s.state_in, heads(s.o), state_out);
}

void LinearBackward(const Context& ctx, Arena& arena, const Spread& spread, const Geometry& g,
                    const BatchTables& tables, const MixerState& s, const ConstTensor& dout,
                    const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const ArenaScope scope(arena);
  const auto heads = [&](const auto& x) { return x.AsHeads(g.heads, g.head_dim); };
  const std::vector<float> slopes = Slopes(g);
  Tensor leaving;  // gradient of the state that leaves the last token
  if (spread.cp_size() > 1) {
    const Tensor own = arena.NewZeroed(DType::kF32, {g.heads, g.head_dim, g.head_dim});
    if (tables.carried_in) {
      kernels::LightningStateGradient(ctx, heads(s.q), heads(dout), tables.cu_seqlens, slopes,
                                      g.scale, true, {}, own);
    }
    const Tensor entering = spread.EnteringState(
        ctx, arena, tables.share, tables.survives, slopes,
        StateWindow(tables.share, kernels::LightningSlopes(g.all_heads)), true, own);
    if (tables.carried_out) leaving = entering;
  }
  kernels::LightningBackward(ctx, heads(s.q), heads(s.k), heads(s.v), heads(dout),
                             tables.cu_seqlens, slopes, g.scale, s.state_in, leaving, heads(dq),
                             heads(dk), heads(dv), {});
}

kernels::WidthShard Width(const Spread& spread, const Geometry& g) {
  return {.width = g.all_heads * g.head_dim, .exchange = spread.exchange()};
}

// Gate and output norm, then the output projection, summed over the tensor ranks.
void Finish(const Context& ctx, Arena& arena, const Spread& spread, const Geometry& g,
            const MixerTensors& weights, const BatchTables& tables, MixerState& s,
            const MixerOutput& output) {
  s.u = s.o;
  if (!weights.gate.empty() || !weights.o_norm.empty()) {
    s.u = arena.New(s.o.dtype(), {s.o.dim(0), s.o.dim(1)});
    s.o_rstd = arena.New(DType::kF32, {s.o.dim(0)});
    kernels::OutputGateForward(ctx, s.o, weights.o_norm, s.z, g.eps, s.u, s.o_rstd,
                               Width(spread, g));
  }
  RowParallel(ctx, arena, spread, tables.share, s.u, weights.o_proj, output.alpha, output.y,
              output.write);
}

void Append(std::vector<float>& to, const Tensor& from) {
  for (int64_t t = 0; t < from.dim(0); ++t) {
    const auto* row = from.Row<float>(t);
    to.insert(to.end(), row, row + from.dim(1));
  }
}

MixerState ProjectInputs(const Context& ctx, Arena& arena, const Geometry& g,
                         const MixerTensors& weights, const RunOptions& options,
                         const ConstTensor& positions, const ConstTensor& x) {
  MixerState s;
  s.x = x;
  const Projection inputs = MixerInputs(weights);
  s.projected = arena.New(x.dtype(), {x.dim(0), inputs.width()});
  inputs.Forward(ctx, x, s.projected);
  s.q_raw = inputs.Piece(s.projected, kQuery);
  s.k_raw = inputs.Piece(s.projected, kKey);
  s.v = inputs.Piece(s.projected, kValue);
  s.z = inputs.Piece(s.projected, kGate);
  s.q = NormAndRotate(ctx, arena, g, s.q_raw, g.heads, weights.q_norm, &s.q_rstd);
  s.k = NormAndRotate(ctx, arena, g, s.k_raw, g.kv_heads, weights.k_norm, &s.k_rstd);
  if (g.softmax && options.logit_scale_base > 0) {
    kernels::LogitScaleForward(ctx, positions, options.logit_scale_base,
                               s.q.AsHeads(g.heads, g.head_dim));
  }
  s.o = arena.New(x.dtype(), {x.dim(0), g.heads * g.head_dim});
  return s;
}

}  // namespace

MixerState MixerForward(const Context& ctx, Arena& arena, const ModelConfig& config,
                        const Spread& spread, MixerType type, const MixerTensors& weights,
                        const BatchTables& tables, const RunOptions& options, const ConstTensor& x,
                        const MixerOutput& output, LayerCache* cache) {
  const TraceScope trace(type == MixerType::kSoftmax ? "softmax mixer" : "linear mixer");
  const Geometry g(config, spread, type, tables);
  MixerState s = ProjectInputs(ctx, arena, g, weights, options, tables.positions, x);
  if (g.softmax) {
    SoftmaxForward(ctx, arena, config, spread, g, tables, s);
    if (cache != nullptr) {
      Append(cache->k, s.k);
      Append(cache->v, s.v);
    }
  } else {
    Tensor state;
    if (cache != nullptr) {
      cache->state.assign(static_cast<size_t>(g.heads * g.head_dim * g.head_dim), 0.0F);
      state = Tensor(cache->state.data(), {g.heads, g.head_dim, g.head_dim});
    }
    LinearForward(ctx, arena, spread, g, tables, s, state);
  }
  Finish(ctx, arena, spread, g, weights, tables, s, output);
  return s;
}

void MixerBackward(const Context& ctx, Arena& arena, const ModelConfig& config,
                   const Spread& spread, MixerType type, const MixerTensors& weights,
                   const BatchTables& tables, const MixerState& s, float alpha,
                   const ConstTensor& dy, const Tensor& dx, const MixerTensors& gradients) {
  const TraceScope trace(type == MixerType::kSoftmax ? "softmax mixer backward"
                                                     : "linear mixer backward");
  const Geometry g(config, spread, type, tables);
  const ArenaScope scope(arena);
  const auto like = [&](const Tensor& x) { return arena.New(x.dtype(), {x.dim(0), x.dim(1)}); };

  const Tensor du = like(s.u);
  kernels::GemmNN(ctx, dy, weights.o_proj, du, {.alpha = alpha});
  if (!gradients.o_proj.empty()) {
    kernels::GemmTN(ctx, dy, s.u, gradients.o_proj, {.alpha = alpha, .write = Write::kAccumulate});
  }
  // Gradients of all maps of the input, side by side as the maps are.
  const Projection inputs = MixerInputs(weights);
  const Tensor dprojected = like(s.projected);
  Tensor dout = du;
  if (!weights.gate.empty() || !weights.o_norm.empty()) {
    dout = like(s.o);
    kernels::OutputGateBackward(ctx, du, s.o, weights.o_norm, s.z, s.o_rstd, dout,
                                inputs.Piece(dprojected, kGate), gradients.o_norm,
                                Width(spread, g));
  }

  // With a norm or a rotation in between, the mixer's own gradients come first.
  const bool raw = s.q.raw() == s.q_raw.raw();
  const Tensor dq = raw ? inputs.Piece(dprojected, kQuery) : like(s.q);
  const Tensor dk = raw ? inputs.Piece(dprojected, kKey) : like(s.k);
  const Tensor dv = inputs.Piece(dprojected, kValue);
  if (g.softmax) {
    SpreadSoftmaxBackward(ctx, arena, config, spread, g, tables, s, dout, dq, dk, dv);
  } else {
    LinearBackward(ctx, arena, spread, g, tables, s, dout, dq, dk, dv);
  }
  if (!raw) {
    NormAndRotateBackward(ctx, g, dq, s.q_raw, g.heads, weights.q_norm, s.q_rstd,
                          inputs.Piece(dprojected, kQuery), gradients.q_norm);
    NormAndRotateBackward(ctx, g, dk, s.k_raw, g.kv_heads, weights.k_norm, s.k_rstd,
                          inputs.Piece(dprojected, kKey), gradients.k_norm);
  }
  inputs.Backward(ctx, dprojected, s.x, dx,
                  {gradients.q_proj, gradients.k_proj, gradients.v_proj, gradients.gate});
}

void MixerDecode(const Context& ctx, Arena& arena, const ModelConfig& config, MixerType type,
                 const MixerTensors& weights, const BatchTables& tables, const RunOptions& options,
                 const ConstTensor& positions, const ConstTensor& x, const MixerOutput& output,
                 LayerCache* cache) {
  const Spread alone;
  const Geometry g(config, alone, type, tables);
  MixerState s = ProjectInputs(ctx, arena, g, weights, options, positions, x);
  const auto one = [&](const Tensor& row, int64_t heads) {
    return row.Reshape({heads, g.head_dim});
  };
  if (g.softmax) {
    Append(cache->k, s.k);
    Append(cache->v, s.v);
    const int64_t n = static_cast<int64_t>(cache->k.size()) / (g.kv_heads * g.head_dim);
    const ConstTensor keys(cache->k.data(), {n, g.kv_heads, g.head_dim});
    const ConstTensor values(cache->v.data(), {n, g.kv_heads, g.head_dim});
    if (options.sparse_attention && n >= config.sparse.dense_len) {
      kernels::SparseAttentionDecode(ctx, one(s.q, g.heads), keys, values, config.sparse, g.scale,
                                     one(s.o, g.heads));
    } else {
      kernels::AttentionDecode(ctx, one(s.q, g.heads), keys, values, g.scale, one(s.o, g.heads));
    }
  } else {
    kernels::LightningDecode(
        ctx, one(s.q, g.heads), one(s.k, g.heads), one(s.v, g.heads), Slopes(g), g.scale,
        Tensor(cache->state.data(), {g.heads, g.head_dim, g.head_dim}), one(s.o, g.heads));
  }
  Finish(ctx, arena, alone, g, weights, tables, s, output);
}

}  // namespace sala::model
