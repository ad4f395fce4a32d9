#include "model/model.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "core/trace.h"
#include "kernels/embedding/embedding.h"
#include "kernels/gemm/gemm.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/tensor_ops/tensor_ops.h"
#include "model/mixer.h"
#include "model/projection.h"
#include "model/row_parallel.h"

namespace sala::model {
namespace {

using kernels::Write;

Tensor NewLike(Arena& arena, const ConstTensor& x) {
  return arena.New(x.dtype(), {x.dim(0), x.dim(1)});
}

Projection MlpInputs(const LayerTensors& w) { return Projection({w.gate_proj, w.up_proj}); }

// Writes gate_up, gate, up and h = silu(gate) * up of the normalised input n.
void MlpInner(const Context& ctx, Arena& arena, const LayerTensors& w, const ConstTensor& n,
              LayerState& s) {
  const Projection inputs = MlpInputs(w);
  s.gate_up = arena.New(n.dtype(), {n.dim(0), inputs.width()});
  inputs.Forward(ctx, n, s.gate_up);
  s.gate = inputs.Piece(s.gate_up, 0);
  s.up = inputs.Piece(s.gate_up, 1);
  s.h = arena.New(n.dtype(), {n.dim(0), s.gate.dim(1)});
  kernels::SwiGluForward(ctx, s.gate, s.up, s.h);
}

// Views of a store, empty for tensors that are absent or not wanted.
class Binder {
 public:
  Binder(ParameterStore& store, const std::function<bool(const ParameterSpec&)>& wanted)
      : store_(store), wanted_(wanted) {}

  Tensor operator()(const std::string& name) const {
    if (!store_.Has(name) || (wanted_ && !wanted_(store_.Spec(name)))) return {};
    return store_.Get(name);
  }

 private:
  ParameterStore& store_;
  const std::function<bool(const ParameterSpec&)>& wanted_;
};

}  // namespace

MixerTensors BindMixer(const ModelConfig& config, int64_t layer, MixerType type,
                       ParameterStore& store,
                       const std::function<bool(const ParameterSpec&)>& wanted) {
  const Binder get(store, wanted);
  const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
  const bool softmax = type == MixerType::kSoftmax;
  MixerTensors m;
  m.q_proj = get(prefix + "q_proj.weight");
  m.k_proj = get(prefix + "k_proj.weight");
  m.v_proj = get(prefix + "v_proj.weight");
  m.o_proj = get(prefix + "o_proj.weight");
  m.gate = get(prefix + (softmax ? "o_gate.weight" : "z_proj.weight"));
  m.q_norm = get(prefix + "q_norm.weight");
  m.k_norm = get(prefix + "k_norm.weight");
  m.o_norm = get(prefix + "o_norm.weight");
  return m;
}

ModelTensors BindTensors(const ModelConfig& config, ParameterStore& store,
                         const std::function<bool(const ParameterSpec&)>& wanted) {
  const Binder get(store, wanted);
  ModelTensors tensors;
  tensors.embedding = get("model.embed_tokens.weight");
  tensors.hooks = store.hooks();
  tensors.norm = get("model.norm.weight");
  tensors.head = config.tie_word_embeddings ? tensors.embedding : get("lm_head.weight");
  for (int64_t l = 0; l < config.num_hidden_layers; ++l) {
    const std::string prefix = "model.layers." + std::to_string(l) + ".";
    LayerTensors layer;
    layer.input_norm = get(prefix + "input_layernorm.weight");
    layer.post_norm = get(prefix + "post_attention_layernorm.weight");
    layer.mixer = BindMixer(config, l, config.mixer(l), store, wanted);
    layer.gate_proj = get(prefix + "mlp.gate_proj.weight");
    layer.up_proj = get(prefix + "mlp.up_proj.weight");
    layer.down_proj = get(prefix + "mlp.down_proj.weight");
    tensors.layers.push_back(layer);
  }
  return tensors;
}

ConstTensor ToDevice(const Context& ctx, Arena& arena, std::span<const int32_t> values) {
  const auto n = static_cast<int64_t>(values.size());
  if (!ctx.cuda()) return {values.data(), {n}};
  const Tensor copy = arena.New(DType::kI32, {n});
  ctx.gpu->Upload(copy.raw(), values.data(), values.size() * sizeof(int32_t));
  return copy;
}

int64_t Batch::targets() const {
  return std::count_if(labels.begin(), labels.end(), [](int32_t label) { return label >= 0; });
}

Batch SingleDocument(const std::vector<int32_t>& tokens) {
  Batch batch;
  batch.tokens = tokens;
  batch.labels.assign(tokens.size(), -1);
  batch.positions.resize(tokens.size());
  std::iota(batch.positions.begin(), batch.positions.end(), 0);
  batch.cu_seqlens = {0, static_cast<int32_t>(tokens.size())};
  return batch;
}

Model::Model(ModelConfig config, ParameterStore& store, const Spread& spread)
    : config_(std::move(config)), spread_(spread) {
  tensors_ = BindTensors(config_, store);
}

Model Model::WithMixer(int64_t layer, MixerType type, const MixerTensors& mixer) const {
  Model changed = *this;
  changed.config_.mixer_types[static_cast<size_t>(layer)] = NameOf(type);
  changed.tensors_.layers[static_cast<size_t>(layer)].mixer = mixer;
  return changed;
}

namespace {

// Sets what depends on where documents begin and end.
void CutDocuments(const ModelConfig& config, const std::vector<kernels::DocumentRange>& documents,
                  const RunOptions& options, BatchTables* tables) {
  const TokenShare& share = tables->share;
  tables->cu_seqlens = {0};
  for (const kernels::DocumentRange& document : documents) {
    const int64_t first = std::max(document.begin, share.begin);
    const int64_t last = std::min(document.end, share.end);
    if (first >= last) continue;
    tables->cu_seqlens.push_back(static_cast<int32_t>(last - share.begin));
    tables->carried_in |= document.begin < share.begin;
    tables->carried_out |= document.end > share.end;
    const bool sparse = options.sparse_attention && document.length() >= config.sparse.dense_len;
    (sparse ? tables->sparse_documents : tables->dense_documents).push_back(document);
  }
  for (size_t r = 0; r + 1 < share.cp_borders.size(); ++r) {
    const int64_t begin = share.cp_borders[r];
    const int64_t end = share.cp_borders[r + 1];
    const bool starts_here = std::any_of(documents.begin(), documents.end(),
                                         [begin, end](const kernels::DocumentRange& document) {
                                           return begin <= document.begin && document.begin < end;
                                         });
    tables->survives.push_back(starts_here ? 0 : 1);
  }
}

}  // namespace

BatchTables MakeBatchTables(const Context& ctx, Arena& arena, const ModelConfig& config,
                            const Spread& spread, const Batch& batch, const RunOptions& options) {
  SALA_CHECK(!batch.cu_seqlens.empty() && batch.cu_seqlens.back() == batch.size())
      << "cu_seqlens must end at the last token";
  BatchTables tables;
  tables.share = spread.Share(batch.size());
  CutDocuments(config, kernels::Documents(batch.cu_seqlens), options, &tables);
  const auto mine = [&](const std::vector<int32_t>& values) {
    return ToDevice(ctx, arena,
                    std::span(values).subspan(static_cast<size_t>(tables.share.begin),
                                              static_cast<size_t>(tables.share.tokens())));
  };
  tables.tokens = mine(batch.tokens);
  tables.labels = mine(batch.labels);
  tables.positions = mine(batch.positions);
  const auto table = [&](int64_t head_dim, Tensor* cos, Tensor* sin) {
    *cos = arena.New(DType::kF32, {tables.share.tokens(), head_dim / 2});
    *sin = arena.New(DType::kF32, {tables.share.tokens(), head_dim / 2});
    kernels::RopeTable(ctx, tables.positions, head_dim, static_cast<float>(config.rope_theta), *cos,
                       *sin);
  };
  if (config.attn_use_rope && config.has_softmax())
    table(config.head_dim, &tables.attention_cos, &tables.attention_sin);
  if (config.lightning_use_rope && config.has_lightning())
    table(config.lightning_head_dim, &tables.lightning_cos, &tables.lightning_sin);
  return tables;
}

Tensor Model::Embed(const Context& ctx, Arena& arena, const BatchTables& tables) const {
  tensors_.Enter(UnitOfEmbedding());
  const auto scale = static_cast<float>(config_.scale_emb);
  const TokenShare& share = tables.share;
  const Tensor x = arena.New(ctx.activation(), {share.part(), config_.hidden_size});
  if (spread_.tp_size() == 1) {
    kernels::EmbeddingForward(ctx, tables.tokens, tensors_.embedding, scale, x);
    return x;
  }
  const ArenaScope scope(arena);
  const int64_t first_row = tensors_.embedding.dim(0) * spread_.tp_rank();
  const Tensor rows = arena.New(ctx.activation(), {share.tokens(), config_.hidden_size});
  kernels::EmbeddingForward(ctx, tables.tokens, tensors_.embedding, scale, rows, first_row);
  spread_.Sum(ctx, arena, share, rows, x, Write::kOverwrite);
  return x;
}

// out = x + r * mixer(norm(x)); out += r * mlp(norm(out)). `out` may not be the state's x.
void Model::LayerForward(const Context& ctx, Arena& arena, const BatchTables& tables,
                         const RunOptions& options, int64_t layer, LayerState& s,
                         const Tensor& out) const {
  const TraceScope trace("layer", layer);
  tensors_.Enter(UnitOfLayer(layer));
  const LayerTensors& w = tensors_.layers[static_cast<size_t>(layer)];
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const auto r = static_cast<float>(config_.residual_scale());
  const int64_t part = s.x.dim(0);

  s.n1 = NewLike(arena, s.x);
  s.rstd1 = arena.New(DType::kF32, {part});
  kernels::RmsNormForward(ctx, s.x, w.input_norm, eps, s.n1, s.rstd1);
  s.mid = NewLike(arena, s.x);
  kernels::Cast(ctx, s.x, s.mid);
  s.mixer = MixerForward(ctx, arena, config_, spread_, config_.mixer(layer), w.mixer, tables,
                         options, spread_.Gather(ctx, arena, tables.share, s.n1),
                         {.y = s.mid, .alpha = r, .write = Write::kAccumulate});

  const TraceScope mlp("mlp");
  s.n2 = NewLike(arena, s.x);
  s.rstd2 = arena.New(DType::kF32, {part});
  kernels::RmsNormForward(ctx, s.mid, w.post_norm, eps, s.n2, s.rstd2);
  s.n2_all = spread_.Gather(ctx, arena, tables.share, s.n2);
  MlpInner(ctx, arena, w, s.n2_all, s);
  kernels::Cast(ctx, s.mid, out);
  RowParallel(ctx, arena, spread_, tables.share, s.h, w.down_proj, r, out, Write::kAccumulate);
}

// dx [part, H] holds the gradient of the layer's output on entry and of its input on return.
void Model::LayerBackward(const Context& ctx, Arena& arena, const BatchTables& tables,
                          int64_t layer, const LayerState& s, const LayerTensors& gradients,
                          const Tensor& dx) const {
  const TraceScope trace("layer backward", layer);
  const LayerTensors& w = tensors_.layers[static_cast<size_t>(layer)];
  const auto r = static_cast<float>(config_.residual_scale());
  const ArenaScope scope(arena);
  // Each tensor rank has a term of the gradient of what it was given.
  const bool summed = spread_.tp_size() > 1;
  const Tensor dn = NewLike(arena, s.x);
  const Tensor dn_terms =
      summed ? arena.New(DType::kF32, {tables.share.tokens(), config_.hidden_size}) : dn;
  const auto sum_terms = [&] {
    if (summed) spread_.Sum(ctx, arena, tables.share, dn_terms, dn, Write::kOverwrite);
  };

  {
    const TraceScope mlp("mlp backward");
    const ArenaScope mlp_scope(arena);
    const Tensor dy = spread_.Gather(ctx, arena, tables.share, dx);
    const Tensor dh = NewLike(arena, s.h);
    kernels::GemmNN(ctx, dy, w.down_proj, dh, {.alpha = r});
    if (!gradients.down_proj.empty()) {
      kernels::GemmTN(ctx, dy, s.h, gradients.down_proj, {.alpha = r, .write = Write::kAccumulate});
    }
    const Projection inputs = MlpInputs(w);
    const Tensor dgate_up = NewLike(arena, s.gate_up);
    kernels::SwiGluBackward(ctx, dh, s.gate, s.up, inputs.Piece(dgate_up, 0),
                            inputs.Piece(dgate_up, 1));
    inputs.Backward(ctx, dgate_up, s.n2_all, dn_terms, {gradients.gate_proj, gradients.up_proj});
    sum_terms();
  }
  kernels::RmsNormBackward(ctx, dn, s.mid, w.post_norm, s.rstd2, dx, Write::kAccumulate,
                           gradients.post_norm);

  MixerBackward(ctx, arena, config_, spread_, config_.mixer(layer), w.mixer, tables, s.mixer, r,
                spread_.Gather(ctx, arena, tables.share, dx), dn_terms, gradients.mixer);
  sum_terms();
  kernels::RmsNormBackward(ctx, dn, s.x, w.input_norm, s.rstd1, dx, Write::kAccumulate,
                           gradients.input_norm);
}

ForwardState Model::Forward(const Context& ctx, Arena& arena, const Batch& batch,
                            const RunOptions& options) const {
  const PartScope part(StepPart::kForward);
  ForwardState state;
  state.tables = MakeBatchTables(ctx, arena, config_, spread_, batch, options);
  Tensor x = Embed(ctx, arena, state.tables);
  for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {
    Tensor out = NewLike(arena, x);
    LayerState layer;
    layer.x = x;
    if (options.recompute) {
      const ArenaScope scope(arena);
      LayerForward(ctx, arena, state.tables, options, l, layer, out);
      layer = LayerState{};
      layer.x = x;
    } else {
      LayerForward(ctx, arena, state.tables, options, l, layer, out);
    }
    state.layers.push_back(layer);
    x = out;
  }
  state.last = x;
  state.rstd = arena.New(DType::kF32, {x.dim(0)});
  state.hidden = NewLike(arena, x);
  tensors_.Enter(UnitOfNorm(config_.num_hidden_layers));
  kernels::RmsNormForward(ctx, x, tensors_.norm, static_cast<float>(config_.rms_norm_eps),
                          state.hidden, state.rstd);
  return state;
}

void Model::Backward(const Context& ctx, Arena& arena, const Batch& batch,
                     const RunOptions& options, const ForwardState& state,
                     const ConstTensor& dhidden, const ModelTensors& gradients) const {
  const PartScope part(StepPart::kBackward);
  const ArenaScope scope(arena);
  const int64_t layers = config_.num_hidden_layers;
  const Tensor dx = NewLike(arena, dhidden);
  tensors_.Enter(UnitOfNorm(layers));
  gradients.Enter(UnitOfNorm(layers));
  kernels::RmsNormBackward(ctx, dhidden, state.last, tensors_.norm, state.rstd, dx,
                           Write::kOverwrite, gradients.norm);
  gradients.Leave(UnitOfNorm(layers));
  for (int64_t l = layers - 1; l >= 0; --l) {
    const LayerTensors& layer_gradients = gradients.layers[static_cast<size_t>(l)];
    const LayerState& kept = state.layers[static_cast<size_t>(l)];
    tensors_.Enter(UnitOfLayer(l));
    gradients.Enter(UnitOfLayer(l));
    if (options.recompute) {
      // The same code on the same input: the recomputed activations, block choices included, have
      // the bits of the first run.
      const ArenaScope layer_scope(arena);
      LayerState again;
      again.x = kept.x;
      const Tensor out = NewLike(arena, kept.x);
      LayerForward(ctx, arena, state.tables, options, l, again, out);
      LayerBackward(ctx, arena, state.tables, l, again, layer_gradients, dx);
    } else {
      LayerBackward(ctx, arena, state.tables, l, kept, layer_gradients, dx);
    }
    gradients.Leave(UnitOfLayer(l));
  }
  gradients.Enter(UnitOfEmbedding());
  if (!gradients.embedding.empty()) {
    const ArenaScope embedding_scope(arena);
    const int64_t first_row = spread_.tp_size() == 1
                                  ? kernels::kWholeTable
                                  : gradients.embedding.dim(0) * spread_.tp_rank();
    kernels::EmbeddingBackward(
        ctx, state.tables.tokens, spread_.Gather(ctx, arena, state.tables.share, dx),
        static_cast<float>(config_.scale_emb), gradients.embedding, first_row);
  }
  gradients.Leave(UnitOfEmbedding());
}

Tensor Model::ForwardOnly(const Context& ctx, Arena& arena, const Batch& batch,
                          const RunOptions& options, int64_t first_layer, Tensor x,
                          const LayerHook& hook,
                          const std::function<void(int64_t, const ConstTensor&)>& on_input) const {
  const PartScope step_part(StepPart::kForward);
  const int64_t part = spread_.Share(batch.size()).part();
  const Tensor hidden = arena.New(ctx.activation(), {part, config_.hidden_size});
  const ArenaScope scope(arena);
  const BatchTables tables = MakeBatchTables(ctx, arena, config_, spread_, batch, options);
  if (x.empty()) {
    SALA_CHECK(first_layer == 0) << "starting at layer " << first_layer << " needs its input";
    x = Embed(ctx, arena, tables);
  }
  const Tensor out = NewLike(arena, x);
  for (int64_t l = first_layer; l < config_.num_hidden_layers; ++l) {
    if (on_input) on_input(l, x);
    const ArenaScope layer_scope(arena);
    LayerState layer;
    layer.x = x;
    LayerForward(ctx, arena, tables, options, l, layer, out);
    if (hook) {
      // The residual form above adds the mixer's output without keeping it; alignment wants it
      // alone.
      const Tensor y = NewLike(arena, x);
      RowParallel(ctx, arena, spread_, tables.share, layer.mixer.u,
                  tensors_.layers[static_cast<size_t>(l)].mixer.o_proj, 1.0F, y, Write::kOverwrite);
      hook(l, layer.mixer.x, y);
    }
    kernels::Cast(ctx, out, x);
  }
  const Tensor rstd = arena.New(DType::kF32, {part});
  tensors_.Enter(UnitOfNorm(config_.num_hidden_layers));
  kernels::RmsNormForward(ctx, x, tensors_.norm, static_cast<float>(config_.rms_norm_eps), hidden,
                          rstd);
  return hidden;
}

void Model::RunLayers(const Context& ctx, Arena& arena, const Batch& batch,
                      const RunOptions& options, int64_t first_layer, int64_t end_layer,
                      const Tensor& x) const {
  const ArenaScope scope(arena);
  const BatchTables tables = MakeBatchTables(ctx, arena, config_, spread_, batch, options);
  const Tensor out = NewLike(arena, x);
  for (int64_t l = first_layer; l < end_layer; ++l) {
    const ArenaScope layer_scope(arena);
    LayerState layer;
    layer.x = x;
    LayerForward(ctx, arena, tables, options, l, layer, out);
    kernels::Cast(ctx, out, x);
  }
}

std::vector<float> Model::Logits(const Context& ctx, const ConstTensor& hidden) const {
  SALA_CHECK(!ctx.cuda()) << "whole rows of logits are computed on the CPU";
  const int64_t rows = hidden.dim(0);
  std::vector<float> logits(static_cast<size_t>(rows * config_.vocab_size));
  kernels::GemmNT(ctx, hidden, tensors_.head, Tensor(logits.data(), {rows, config_.vocab_size}),
                  {.alpha = logit_scale()});
  return logits;
}

std::vector<float> Model::Prefill(const Context& ctx, Arena& arena,
                                  const std::vector<int32_t>& tokens, const RunOptions& options,
                                  Cache* cache) const {
  SALA_CHECK(!tokens.empty()) << "a prompt needs at least one token";
  const Batch batch = SingleDocument(tokens);
  const ArenaScope scope(arena);
  const BatchTables tables = MakeBatchTables(ctx, arena, config_, {}, batch, options);
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  cache->length = batch.size();
  cache->layers.assign(static_cast<size_t>(config_.num_hidden_layers), LayerCache{});
  Tensor x = arena.New(DType::kF32, {batch.size(), config_.hidden_size});
  kernels::EmbeddingForward(ctx, batch.tokens_view(), tensors_.embedding,
                            static_cast<float>(config_.scale_emb), x);
  const Tensor n = NewLike(arena, x);
  const Tensor rstd = arena.New(DType::kF32, {batch.size()});
  for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {
    const ArenaScope layer_scope(arena);
    kernels::RmsNormForward(ctx, x, tensors_.layers[static_cast<size_t>(l)].input_norm, eps, n,
                            rstd);
    MixerForward(ctx, arena, config_, {}, config_.mixer(l),
                 tensors_.layers[static_cast<size_t>(l)].mixer, tables, options, n,
                 {.y = x,
                  .alpha = static_cast<float>(config_.residual_scale()),
                  .write = Write::kAccumulate},
                 &cache->layers[static_cast<size_t>(l)]);
    MlpForward(ctx, arena, l, x);
  }
  kernels::RmsNormForward(ctx, x, tensors_.norm, eps, n, rstd);
  return Logits(ctx, n.Rows(batch.size() - 1, batch.size()));
}

// x += r * mlp(norm(x)), nothing kept.
void Model::MlpForward(const Context& ctx, Arena& arena, int64_t layer, const Tensor& x) const {
  const LayerTensors& w = tensors_.layers[static_cast<size_t>(layer)];
  const ArenaScope scope(arena);
  const Tensor n = NewLike(arena, x);
  const Tensor rstd = arena.New(DType::kF32, {x.dim(0)});
  kernels::RmsNormForward(ctx, x, w.post_norm, static_cast<float>(config_.rms_norm_eps), n, rstd);
  LayerState inner;
  MlpInner(ctx, arena, w, n, inner);
  kernels::GemmNT(
      ctx, inner.h, w.down_proj, x,
      {.alpha = static_cast<float>(config_.residual_scale()), .write = Write::kAccumulate});
}

std::vector<float> Model::Decode(const Context& ctx, Arena& arena, int32_t token,
                                 const RunOptions& options, Cache* cache) const {
  Batch batch = SingleDocument({token});
  batch.positions[0] = static_cast<int32_t>(cache->length);
  ++cache->length;
  const ArenaScope scope(arena);
  const BatchTables tables = MakeBatchTables(ctx, arena, config_, {}, batch, options);
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const Tensor x = arena.New(DType::kF32, {1, config_.hidden_size});
  const Tensor n = NewLike(arena, x);
  const Tensor rstd = arena.New(DType::kF32, {1});
  kernels::EmbeddingForward(ctx, batch.tokens_view(), tensors_.embedding,
                            static_cast<float>(config_.scale_emb), x);
  for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {
    const ArenaScope layer_scope(arena);
    kernels::RmsNormForward(ctx, x, tensors_.layers[static_cast<size_t>(l)].input_norm, eps, n,
                            rstd);
    MixerDecode(ctx, arena, config_, config_.mixer(l),
                tensors_.layers[static_cast<size_t>(l)].mixer, tables, options,
                batch.positions_view(), n,
                {.y = x,
                 .alpha = static_cast<float>(config_.residual_scale()),
                 .write = Write::kAccumulate},
                &cache->layers[static_cast<size_t>(l)]);
    MlpForward(ctx, arena, l, x);
  }
  kernels::RmsNormForward(ctx, x, tensors_.norm, eps, n, rstd);
  return Logits(ctx, n);
}

}  // namespace sala::model
