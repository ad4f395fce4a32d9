#include "recipes/plan_model.h"

#include <algorithm>

#include "kernels/lightning/lightning.h"
#include "model/units.h"

namespace sala::recipes {
namespace {

using kernels::DocumentRange;
using kernels::Write;
using model::MixerType;
using model::ModelConfig;

}  // namespace

ModelPass::ModelPass(PassContext& ctx, const ModelConfig& config, bool sparse,
                     const std::function<void(int64_t)>& enter)
    : ctx_(ctx), config_(config), sparse_(sparse), enter_(enter) {
  share_ = model::ShareTokens(0, ctx.cp, ctx.cp_ranks, ctx.tp, ctx.tp_ranks);
}

Tables ModelPass::MakeTables(const std::vector<int32_t>& cu_seqlens) {
  Tables tables;
  share_ = model::ShareTokens(cu_seqlens.back(), ctx_.cp, ctx_.cp_ranks, ctx_.tp, ctx_.tp_ranks);
  tables.share = share_;
  for (const DocumentRange& document : kernels::Documents(cu_seqlens)) {
    if (std::max(document.begin, share_.begin) >= std::min(document.end, share_.end)) continue;
    const bool sparse = sparse_ && document.length() >= config_.sparse.dense_len;
    (sparse ? tables.sparse : tables.dense).push_back(document);
  }
  if (ctx_.cuda()) {
    for (int i = 0; i < 3; ++i) Floats(share_.tokens());  // tokens, labels, positions
  }
  const auto rope = [&](int64_t d) {
    Floats(share_.tokens() * (d / 2));
    Floats(share_.tokens() * (d / 2));
  };
  tables.attention_rope = config_.attn_use_rope && config_.has_softmax();
  tables.lightning_rope = config_.lightning_use_rope && config_.has_lightning();
  if (tables.attention_rope) rope(config_.head_dim);
  if (tables.lightning_rope) rope(config_.lightning_head_dim);
  return tables;
}

void ModelPass::Products(int64_t tokens, int64_t out, int64_t in, bool trained) {
  if (!forward_only_) return ProductScratch(ctx_, tokens, out, in, trained);
  GemmScratch(ctx_, tokens, out, in);
}

bool ModelPass::Trained(MixerType type) const {
  if (ctx_.input.phase != PlanPhase::kDistil) return true;
  return ctx_.input.trainable != HaloTrainable::kLinearMixers || type == MixerType::kLightning;
}

void ModelPass::Gather(int64_t width) {
  if (!summed()) return;
  Activations(share_.tokens(), width);
  ctx_.Count("tp.all_gather", (share_.tokens() - share_.part()) * width * ctx_.element);
}

void ModelPass::Sum(int64_t width, Write write) {
  const MeterScope scope(ctx_.arena);
  const bool direct = write == Write::kOverwrite && !ctx_.cuda();
  if (!direct) Floats(share_.part() * width);
  if (write == Write::kAccumulate && ctx_.cuda()) Activations(share_.part(), width);
  ctx_.Count("tp.reduce_scatter", (share_.tokens() - share_.part()) * width * kFloat);
}

void ModelPass::RowParallel(int64_t in, Write write) {
  GemmScratch(ctx_, share_.tokens(), hidden(), in);
  if (!summed()) return;
  const MeterScope scope(ctx_.arena);
  Floats(share_.tokens() * hidden());
  Sum(hidden(), write);
}

void ModelPass::Embed() {
  enter_(model::UnitOfEmbedding());
  Activations(share_.part(), hidden());
  if (!summed()) return;
  const MeterScope scope(ctx_.arena);
  Activations(share_.tokens(), hidden());
  if (ctx_.cuda()) Floats(share_.tokens() * hidden());
  Sum(hidden(), Write::kOverwrite);
}

void ModelPass::LayerForward(const Tables& tables, int64_t layer) {
  enter_(model::UnitOfLayer(layer));
  const int64_t part = share_.part();
  Activations(part, hidden());  // n1
  Floats(part);
  Activations(part, hidden());  // mid
  Gather(hidden());
  MixerForward(tables, config_.mixer(layer), Write::kAccumulate);
  Activations(part, hidden());  // n2
  Floats(part);
  Gather(hidden());
  const int64_t inner = config_.intermediate_size / ctx_.tp_ranks;
  Activations(share_.tokens(), 2 * inner);
  Products(share_.tokens(), 2 * inner, hidden(), AllTrained(ctx_.input));
  Activations(share_.tokens(), inner);
  RowParallel(inner, Write::kAccumulate);
}

void ModelPass::LayerBackward(const Tables& tables, int64_t layer) {
  const MeterScope scope(ctx_.arena);
  Activations(share_.part(), hidden());  // dn
  if (summed()) Floats(share_.tokens() * hidden());
  const auto sum_terms = [&] {
    if (summed()) Sum(hidden(), Write::kOverwrite);
  };
  const int64_t inner = config_.intermediate_size / ctx_.tp_ranks;
  {
    const MeterScope mlp(ctx_.arena);
    Gather(hidden());
    Activations(share_.tokens(), inner);
    Products(share_.tokens(), hidden(), inner, AllTrained(ctx_.input));
    Activations(share_.tokens(), 2 * inner);
    sum_terms();
  }
  RowSumsScratch(ctx_, share_.part(), hidden());
  Gather(hidden());
  MixerBackward(tables, config_.mixer(layer));
  sum_terms();
}

void ModelPass::MixerForward(const Tables& tables, MixerType type, Write write) {
  const Heads g = HeadsOf(type);
  const int64_t tokens = share_.tokens();
  const int64_t projected = ProjectedWidth(type);
  Activations(tokens, projected);
  Products(tokens, projected, hidden(), Trained(type));
  if (!Raw(tables, type)) {
    for (const int64_t heads : {g.heads, g.kv_heads}) {
      Activations(tokens, heads * g.d);
      if (HasNorm(type)) Floats(tokens * heads);
    }
  }
  Activations(tokens, g.width());  // o
  if (type == MixerType::kSoftmax) {
    SoftmaxForward(tables, g);
  } else {
    LinearForward(g);
  }
  if (HasGate(type) || HasOutputNorm(type)) {
    Activations(tokens, g.width());
    Floats(tokens);
    OutputNorm(type, false, g);
  }
  RowParallel(g.width(), write);
}

void ModelPass::MixerBackward(const Tables& tables, MixerType type) {
  const Heads g = HeadsOf(type);
  const int64_t tokens = share_.tokens();
  const MeterScope scope(ctx_.arena);
  Activations(tokens, g.width());  // du
  Products(tokens, hidden(), g.width(), Trained(type));
  Activations(tokens, ProjectedWidth(type));
  if (HasGate(type) || HasOutputNorm(type)) {
    Activations(tokens, g.width());
    OutputNorm(type, true, g);
  }
  if (!Raw(tables, type)) {
    Activations(tokens, g.width());
    Activations(tokens, g.kv_width());
  }
  if (type == MixerType::kSoftmax) {
    SoftmaxBackward(tables, g);
  } else {
    LinearBackward(g);
  }
  RowSumsScratch(ctx_, tokens, g.d);
}

Tables ModelPass::Forward(const std::vector<int32_t>& cu_seqlens, bool recompute) {
  Tables tables = MakeTables(cu_seqlens);
  Embed();
  for (int64_t layer = 0; layer < layers(); ++layer) {
    Activations(share_.part(), hidden());
    if (recompute) {
      const MeterScope scope(ctx_.arena);
      LayerForward(tables, layer);
    } else {
      LayerForward(tables, layer);
    }
  }
  Floats(share_.part());
  Activations(share_.part(), hidden());
  enter_(model::UnitOfNorm(layers()));
  return tables;
}

void ModelPass::Backward(const Tables& tables, bool recompute, bool embedding_trained) {
  const MeterScope scope(ctx_.arena);
  Activations(share_.part(), hidden());
  enter_(model::UnitOfNorm(layers()));
  RowSumsScratch(ctx_, share_.part(), hidden());
  for (int64_t layer = layers() - 1; layer >= 0; --layer) {
    enter_(model::UnitOfLayer(layer));
    const MeterScope layer_scope(ctx_.arena);
    if (recompute) {
      Activations(share_.part(), hidden());
      LayerForward(tables, layer);
    }
    LayerBackward(tables, layer);
  }
  if (!embedding_trained) return;
  const MeterScope embedding_scope(ctx_.arena);
  Gather(hidden());
}

void ModelPass::ForwardOnly(const std::vector<int32_t>& cu_seqlens,
                            const std::function<void(int64_t)>& hook, bool input_given) {
  forward_only_ = true;
  const model::TokenShare share =
      model::ShareTokens(cu_seqlens.back(), ctx_.cp, ctx_.cp_ranks, ctx_.tp, ctx_.tp_ranks);
  if (input_given) Activations(share.part(), hidden());
  Activations(share.part(), hidden());
  const MeterScope scope(ctx_.arena);
  const Tables tables = MakeTables(cu_seqlens);
  if (!input_given) Embed();
  Activations(share_.part(), hidden());
  for (int64_t layer = 0; layer < layers(); ++layer) {
    const MeterScope layer_scope(ctx_.arena);
    LayerForward(tables, layer);
    if (!hook) continue;
    Activations(share_.part(), hidden());
    RowParallel(HeadsOf(config_.mixer(layer)).width(), Write::kOverwrite);
    hook(layer);
  }
  Floats(share_.part());
  enter_(model::UnitOfNorm(layers()));
}

void ModelPass::EnterHead() {
  enter_(config_.tie_word_embeddings ? model::UnitOfEmbedding() : model::UnitOfHead(layers()));
}

int64_t ModelPass::Vocabulary() const {
  const int64_t rows = config_.VocabularyRows(ctx_.tp_ranks);
  return std::clamp<int64_t>(config_.vocab_size - rows * ctx_.tp, 0, rows);
}

Heads ModelPass::HeadsOf(MixerType type) const {
  if (type == MixerType::kLightning) {
    const int64_t heads = config_.lightning_nh / ctx_.tp_ranks;
    return {heads, heads, config_.lightning_head_dim};
  }
  return {config_.num_attention_heads / ctx_.tp_ranks,
          std::max<int64_t>(1, config_.num_key_value_heads / ctx_.tp_ranks), config_.head_dim};
}

bool ModelPass::HasNorm(MixerType type) const {
  return type == MixerType::kSoftmax ? config_.attn_qk_norm : config_.qk_norm;
}

bool ModelPass::HasGate(MixerType type) const {
  return type == MixerType::kSoftmax ? config_.attn_use_output_gate : config_.use_output_gate;
}

bool ModelPass::HasOutputNorm(MixerType type) const {
  return type == MixerType::kLightning && config_.use_output_norm;
}

bool ModelPass::Raw(const Tables& tables, MixerType type) const {
  const bool rope = type == MixerType::kSoftmax ? tables.attention_rope : tables.lightning_rope;
  return !rope && !HasNorm(type);
}

int64_t ModelPass::ProjectedWidth(MixerType type) const {
  const Heads g = HeadsOf(type);
  return g.width() * (HasGate(type) ? 2 : 1) + 2 * g.kv_width();
}

void ModelPass::OutputNorm(MixerType type, bool backward, const Heads& g) {
  const int64_t tokens = share_.tokens();
  const MeterScope scope(ctx_.scratch);
  if (HasOutputNorm(type) && summed() && tokens > 0) {
    GatherScratch(ctx_, tokens);
    ctx_.Count("tp.all_gather", tokens * kFloat * (ctx_.tp_ranks - 1));
  }
  if (backward && HasOutputNorm(type)) RowSumsScratch(ctx_, tokens, g.width());
}

void ModelPass::GatherContext(int64_t width) {
  Activations(share_.total, width);
  ctx_.Count("cp.all_gather", (share_.total - share_.tokens()) * width * ctx_.element);
}

void ModelPass::SumContext(int64_t width) {
  Activations(share_.tokens(), width);
  const MeterScope scope(ctx_.arena);
  if (ctx_.cuda()) Floats(share_.tokens() * width);
  ctx_.Count("cp.reduce_scatter", (share_.total - share_.tokens()) * width * kFloat);
}

void ModelPass::SoftmaxForward(const Tables& tables, const Heads& g) {
  const int64_t tokens = share_.tokens();
  // Columns of the projection are packed before they travel.
  const bool packed = Raw(tables, MixerType::kSoftmax) && tokens > 1;
  if (ctx_.cp_ranks > 1) {
    if (packed) Activations(tokens, g.kv_width());
    GatherContext(g.kv_width());
    if (tokens > 1) Activations(tokens, g.kv_width());
    GatherContext(g.kv_width());
  }
  Floats(tokens * g.heads);  // lse
  if (!tables.dense.empty()) AttentionScratch(ctx_, g, tables.dense, share_, kDenseBlock, false);
  if (tables.sparse.empty()) return;
  Floats(tokens * g.kv_heads * std::max<int64_t>(1, config_.sparse.free_blocks()));
  const MeterScope scope(ctx_.arena);
  if (packed) Activations(tokens, g.width());
  const int64_t sharing =
      std::max<int64_t>(1, ctx_.tp_ranks / config_.num_key_value_heads);  // ranks of a head
  if (sharing > 1) {
    Activations(tokens, sharing * g.width());
    const MeterScope rows(ctx_.arena);
    Activations(sharing * tokens, g.width());
    ctx_.Count("kv.all_gather", (sharing - 1) * tokens * g.width() * ctx_.element);
  }
  SelectionScratch(ctx_, g, tables.sparse, share_, config_.sparse, sharing * g.heads / g.kv_heads);
  AttentionScratch(ctx_, g, tables.sparse, share_, config_.sparse.block_size, false);
}

void ModelPass::SoftmaxBackward(const Tables& tables, const Heads& g) {
  const MeterScope scope(ctx_.arena);
  if (ctx_.cp_ranks > 1) {
    Floats(share_.total * g.kv_width());
    Floats(share_.total * g.kv_width());
  }
  if (!tables.dense.empty()) AttentionScratch(ctx_, g, tables.dense, share_, kDenseBlock, true);
  if (!tables.sparse.empty())
    AttentionScratch(ctx_, g, tables.sparse, share_, config_.sparse.block_size, true);
  if (ctx_.cp_ranks == 1) return;
  SumContext(g.kv_width());
  SumContext(g.kv_width());
}

void ModelPass::EnteringState(const Heads& g, bool backwards) {
  const int64_t state = g.heads * g.d * g.d;
  Floats(state);
  const MeterScope scope(ctx_.arena);
  Floats(state);
  const int64_t window = model::StateWindow(share_, kernels::LightningSlopes(config_.lightning_nh));
  for (int64_t s = 1; s <= window; ++s) {
    const int64_t sender = ctx_.cp - (backwards ? -s : s);
    const bool receives = 0 <= sender && sender < ctx_.cp_ranks;
    ctx_.Count("cp.send_receive", receives ? state * kFloat : 0);
  }
}

void ModelPass::LinearForward(const Heads& g) {
  if (ctx_.cp_ranks > 1) {
    Floats(g.heads * g.d * g.d);
    EnteringState(g, false);
  }
  LightningScratch(ctx_, g);
}

void ModelPass::LinearBackward(const Heads& g) {
  const MeterScope scope(ctx_.arena);
  if (ctx_.cp_ranks > 1) {
    Floats(g.heads * g.d * g.d);
    EnteringState(g, true);
  }
  LightningScratch(ctx_, g);
}

}  // namespace sala::recipes
