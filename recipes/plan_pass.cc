#include "recipes/plan_pass.h"

#include "kernels/attention/block_attention.h"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/gemm/serial.h"
#include "kernels/kl_divergence/kl_divergence.h"
#include "kernels/lightning/lightning.h"
#include "kernels/sparse_attention/sparse_attention.h"
#include "recipes/halo/transfer.h"

namespace sala::recipes {
namespace {

using kernels::DocumentRange;
using kernels::Write;
using model::MixerType;
using model::ModelConfig;
using model::TokenShare;

constexpr int64_t kFloat = 4;
constexpr int64_t kRowGrain = 32;  // rows of one partial sum (kernels/common/tensor_check.h)

int64_t CeilDiv(int64_t n, int64_t d) { return (n + d - 1) / d; }

// ---- work space of the CPU's kernels ----

void GemmScratch(PassContext& ctx, int64_t m, int64_t n, int64_t k) {
  if (m == 0 || n == 0) return;
  if (ctx.cuda()) {
    // The library's, as for compute capability 9 (kernels/gemm/cuda/cublaslt.cc).
    const MeterScope scope(ctx.scratch);
    ctx.scratch.New(int64_t{64} << 20);
    return;
  }
  const int64_t threads = ctx.input.threads;
  const bool cut_rows = m >= n;
  const int64_t length = cut_rows ? m : n;
  constexpr int64_t kSmallest = 96;
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t piece =
      threads == 1
          ? length
          : std::max(kSmallest,
                     CeilDiv(CeilDiv(length, threads * kPiecesPerThread), kSmallest) * kSmallest);
  const int64_t workers = std::min(threads, CeilDiv(length, piece));
  const MeterScope scope(ctx.scratch);
  ctx.scratch.New(workers *
                  kernels::GemmSerialWorkspace(cut_rows ? piece : m, cut_rows ? n : piece, k) *
                  kFloat);
}

// y = x W^T and both gradients.
void ProductScratch(PassContext& ctx, int64_t tokens, int64_t out, int64_t in) {
  GemmScratch(ctx, tokens, out, in);
  GemmScratch(ctx, tokens, in, out);
  GemmScratch(ctx, out, in, tokens);
}

void RowSumsScratch(PassContext& ctx, int64_t rows, int64_t width) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  ctx.scratch.New(CeilDiv(rows, kRowGrain) * width * kFloat);
}

// Room for one gathering of n numbers over the tensor ranks (kernels/common/exchange.h).
void GatherScratch(PassContext& ctx, int64_t n) {
  ctx.scratch.New(n * kFloat);
  ctx.scratch.New(n * ctx.tp_ranks * kFloat);
}

struct Heads {
  int64_t heads, kv_heads, d;
  int64_t width() const { return heads * d; }
  int64_t kv_width() const { return kv_heads * d; }
};

void AttentionScratch(PassContext& ctx, const Heads& g, const std::vector<DocumentRange>& documents,
                      const TokenShare& share, int64_t block, bool backward) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  const int64_t group = g.heads / g.kv_heads;
  const int64_t rows = kernels::TileTokens(block, group) * group;
  int64_t blocks = 0;
  int64_t most = 1;
  for (const DocumentRange& document : documents) {
    const DocumentRange queries = kernels::PartOf(document, share.begin, share.tokens());
    const int64_t n = queries.length() == 0 ? 0 : CeilDiv(queries.end, block);
    blocks += n;
    most = std::max(most, n);
  }
  // Keys, and backwards values too, once more transposed.
  for (int i = 0; i < (backward ? 2 : 1); ++i)
    ctx.scratch.New(blocks * g.kv_heads * block * g.d * kFloat);
  const int64_t gemm = std::max({kernels::GemmSerialWorkspace(rows, block, g.d),
                                 kernels::GemmSerialWorkspace(rows, g.d, block),
                                 kernels::GemmSerialWorkspace(block, g.d, rows)});
  for (int64_t thread = 0; thread < ctx.input.threads; ++thread) {
    for (int i = 0; i < (backward ? 3 : 2); ++i) ctx.scratch.New(rows * g.d * kFloat);
    for (int i = 0; i < (backward ? 2 : 1); ++i) ctx.scratch.New(rows * block * kFloat);
    for (int i = 0; i < 2; ++i) ctx.scratch.New(rows * kFloat);
    ctx.scratch.New(gemm * kFloat);
    ctx.scratch.New(most * 8);
  }
}

void SelectionScratch(PassContext& ctx, const Heads& g, const std::vector<DocumentRange>& documents,
                      const TokenShare& share, const kernels::SparseAttentionConfig& config,
                      int64_t group) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  int64_t fine = 0, coarse = 0, longest = 0;
  for (const DocumentRange& document : documents) {
    const int64_t n = kernels::PartOf(document, share.begin, share.tokens()).end;
    fine += kernels::FineCount(config, n);
    coarse += kernels::CoarseCount(config, n);
    longest = std::max(longest, n);
  }
  ctx.scratch.New(fine * g.kv_width() * kFloat);
  ctx.scratch.New(coarse * g.kv_width() * kFloat);
  constexpr int64_t kKeyTile = 128;
  const int64_t tokens = kernels::TileTokens(config.block_size, group);
  const int64_t rows = tokens * group;
  for (int64_t thread = 0; thread < ctx.input.threads; ++thread) {
    ctx.scratch.New(rows * g.d * kFloat);
    ctx.scratch.New(rows * kKeyTile * kFloat);
    ctx.scratch.New(rows * kFloat);
    ctx.scratch.New(rows * kFloat);
    ctx.scratch.New(tokens * (kernels::FineCount(config, longest) + 1) * kFloat);
    ctx.scratch.New(kernels::GemmSerialWorkspace(rows, kKeyTile, g.d) * kFloat);
  }
}

void LightningScratch(PassContext& ctx, const Heads& g) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  constexpr int64_t kChunk = 64;
  const int64_t side = std::max(kChunk, g.d);
  for (int64_t thread = 0; thread < ctx.input.threads; ++thread) {
    ctx.scratch.New(kChunk * g.d * kFloat);
    ctx.scratch.New(kChunk * kChunk * kFloat);
    ctx.scratch.New(g.d * g.d * kFloat);
    ctx.scratch.New(kernels::GemmSerialWorkspace(side, side, side) * kFloat);
  }
}

// ---- the model ----

// BatchTables (model/model.h).
struct Tables {
  TokenShare share;
  std::vector<DocumentRange> dense, sparse;
  bool attention_rope = false, lightning_rope = false;
};

class ModelPass {
 public:
  // `enter` is told of units.
  ModelPass(PassContext& ctx, const ModelConfig& config, bool sparse,
            const std::function<void(int64_t)>& enter)
      : ctx_(ctx), config_(config), sparse_(sparse), enter_(enter) {
    share_ = model::ShareTokens(0, ctx.cp, ctx.cp_ranks, ctx.tp, ctx.tp_ranks);
  }

  const TokenShare& share() const { return share_; }
  int64_t hidden() const { return config_.hidden_size; }
  int64_t layers() const { return config_.num_hidden_layers; }
  bool summed() const { return ctx_.tp_ranks > 1; }

  void Activations(int64_t rows, int64_t width) { ctx_.arena.New(rows * width * ctx_.element); }
  void Floats(int64_t n) { ctx_.arena.New(n * kFloat); }

  Tables MakeTables(const std::vector<int32_t>& cu_seqlens) {
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

  // Spread::Gather.
  void Gather(int64_t width) {
    if (!summed()) return;
    Activations(share_.tokens(), width);
    ctx_.Count("tp.all_gather", (share_.tokens() - share_.part()) * width * ctx_.element);
  }

  // Spread::Sum.
  void Sum(int64_t width, Write write) {
    const MeterScope scope(ctx_.arena);
    const bool direct = write == Write::kOverwrite && !ctx_.cuda();
    if (!direct) Floats(share_.part() * width);
    if (write == Write::kAccumulate && ctx_.cuda()) Activations(share_.part(), width);
    ctx_.Count("tp.reduce_scatter", (share_.tokens() - share_.part()) * width * kFloat);
  }

  void RowParallel(int64_t in, Write write) {
    GemmScratch(ctx_, share_.tokens(), hidden(), in);
    if (!summed()) return;
    const MeterScope scope(ctx_.arena);
    Floats(share_.tokens() * hidden());
    Sum(hidden(), write);
  }

  void Embed() {
    enter_(model::UnitOfEmbedding());
    Activations(share_.part(), hidden());
    if (!summed()) return;
    const MeterScope scope(ctx_.arena);
    Activations(share_.tokens(), hidden());
    if (ctx_.cuda()) Floats(share_.tokens() * hidden());
    Sum(hidden(), Write::kOverwrite);
  }

  void LayerForward(const Tables& tables, int64_t layer) {
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
    ProductScratch(ctx_, share_.tokens(), 2 * inner, hidden());
    Activations(share_.tokens(), inner);
    RowParallel(inner, Write::kAccumulate);
  }

  void LayerBackward(const Tables& tables, int64_t layer) {
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
      ProductScratch(ctx_, share_.tokens(), hidden(), inner);
      Activations(share_.tokens(), 2 * inner);
      sum_terms();
    }
    RowSumsScratch(ctx_, share_.part(), hidden());
    Gather(hidden());
    MixerBackward(tables, config_.mixer(layer));
    sum_terms();
  }

  void MixerForward(const Tables& tables, MixerType type, Write write) {
    const Heads g = HeadsOf(type);
    const int64_t tokens = share_.tokens();
    const int64_t projected = ProjectedWidth(type);
    Activations(tokens, projected);
    ProductScratch(ctx_, tokens, projected, hidden());
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

  void MixerBackward(const Tables& tables, MixerType type) {
    const Heads g = HeadsOf(type);
    const int64_t tokens = share_.tokens();
    const MeterScope scope(ctx_.arena);
    Activations(tokens, g.width());  // du
    ProductScratch(ctx_, tokens, hidden(), g.width());
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

  // Model::Forward.
  Tables Forward(const std::vector<int32_t>& cu_seqlens, bool recompute) {
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

  void Backward(const Tables& tables, bool recompute, bool embedding_trained) {
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

  // Model::ForwardOnly; `hook` behind each layer, before its memory is given back.
  void ForwardOnly(const std::vector<int32_t>& cu_seqlens,
                   const std::function<void(int64_t)>& hook = nullptr) {
    const TokenShare share =
        model::ShareTokens(cu_seqlens.back(), ctx_.cp, ctx_.cp_ranks, ctx_.tp, ctx_.tp_ranks);
    Activations(share.part(), hidden());
    const MeterScope scope(ctx_.arena);
    const Tables tables = MakeTables(cu_seqlens);
    Embed();
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

  void EnterHead() {
    enter_(config_.tie_word_embeddings ? model::UnitOfEmbedding() : model::UnitOfHead(layers()));
  }

  // Entries of the vocabulary that this rank has, without padding.
  int64_t Vocabulary() const {
    const int64_t rows = config_.VocabularyRows(ctx_.tp_ranks);
    return std::clamp<int64_t>(config_.vocab_size - rows * ctx_.tp, 0, rows);
  }

 private:
  Heads HeadsOf(MixerType type) const {
    if (type == MixerType::kLightning) {
      const int64_t heads = config_.lightning_nh / ctx_.tp_ranks;
      return {heads, heads, config_.lightning_head_dim};
    }
    return {config_.num_attention_heads / ctx_.tp_ranks,
            std::max<int64_t>(1, config_.num_key_value_heads / ctx_.tp_ranks), config_.head_dim};
  }
  bool HasNorm(MixerType type) const {
    return type == MixerType::kSoftmax ? config_.attn_qk_norm : config_.qk_norm;
  }
  bool HasGate(MixerType type) const {
    return type == MixerType::kSoftmax ? config_.attn_use_output_gate : config_.use_output_gate;
  }
  bool HasOutputNorm(MixerType type) const {
    return type == MixerType::kLightning && config_.use_output_norm;
  }
  // Queries and keys are used as they are projected.
  bool Raw(const Tables& tables, MixerType type) const {
    const bool rope = type == MixerType::kSoftmax ? tables.attention_rope : tables.lightning_rope;
    return !rope && !HasNorm(type);
  }
  int64_t ProjectedWidth(MixerType type) const {
    const Heads g = HeadsOf(type);
    return g.width() * (HasGate(type) ? 2 : 1) + 2 * g.kv_width();
  }

  void OutputNorm(MixerType type, bool backward, const Heads& g) {
    const int64_t tokens = share_.tokens();
    const MeterScope scope(ctx_.scratch);
    if (HasOutputNorm(type) && summed() && tokens > 0) {
      GatherScratch(ctx_, tokens);
      ctx_.Count("tp.all_gather", tokens * kFloat * (ctx_.tp_ranks - 1));
    }
    if (backward && HasOutputNorm(type)) RowSumsScratch(ctx_, tokens, g.width());
  }

  // Spread::GatherContext and SumContext.
  void GatherContext(int64_t width) {
    Activations(share_.total, width);
    ctx_.Count("cp.all_gather", (share_.total - share_.tokens()) * width * ctx_.element);
  }
  void SumContext(int64_t width) {
    Activations(share_.tokens(), width);
    const MeterScope scope(ctx_.arena);
    if (ctx_.cuda()) Floats(share_.tokens() * width);
    ctx_.Count("cp.reduce_scatter", (share_.total - share_.tokens()) * width * kFloat);
  }

  void SoftmaxForward(const Tables& tables, const Heads& g) {
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
    SelectionScratch(ctx_, g, tables.sparse, share_, config_.sparse,
                     sharing * g.heads / g.kv_heads);
    AttentionScratch(ctx_, g, tables.sparse, share_, config_.sparse.block_size, false);
  }

  void SoftmaxBackward(const Tables& tables, const Heads& g) {
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

  // Spread::EnteringState.
  void EnteringState(const Heads& g, bool backwards) {
    const int64_t state = g.heads * g.d * g.d;
    Floats(state);
    const MeterScope scope(ctx_.arena);
    Floats(state);
    const int64_t window =
        model::StateWindow(share_, kernels::LightningSlopes(config_.lightning_nh));
    for (int64_t s = 1; s <= window; ++s) {
      const int64_t sender = ctx_.cp - (backwards ? -s : s);
      const bool receives = 0 <= sender && sender < ctx_.cp_ranks;
      ctx_.Count("cp.send_receive", receives ? state * kFloat : 0);
    }
  }
  void LinearForward(const Heads& g) {
    if (ctx_.cp_ranks > 1) {
      Floats(g.heads * g.d * g.d);
      EnteringState(g, false);
    }
    LightningScratch(ctx_, g);
  }
  void LinearBackward(const Heads& g) {
    const MeterScope scope(ctx_.arena);
    if (ctx_.cp_ranks > 1) {
      Floats(g.heads * g.d * g.d);
      EnteringState(g, true);
    }
    LightningScratch(ctx_, g);
  }

  static constexpr int64_t kDenseBlock = 64;

  PassContext& ctx_;
  const ModelConfig& config_;
  bool sparse_;
  const std::function<void(int64_t)>& enter_;
  TokenShare share_;
};

// ---- losses and tasks ----

// `heads` logits a token, and what the tensor ranks exchange for each chunk of tokens.
void LossChunks(PassContext& ctx, const ModelPass& pass, int64_t heads, int64_t result_bytes,
                const std::vector<int64_t>& floats) {
  const int64_t tokens = pass.share().tokens();
  const int64_t chunk = std::min<int64_t>(ctx.cuda() ? 2048 : 512, tokens);
  const int64_t vocabulary = pass.Vocabulary();
  const MeterScope scope(ctx.scratch);
  for (int64_t i = 0; i < heads; ++i) ctx.scratch.New(chunk * vocabulary * kFloat);
  ctx.scratch.New(chunk * result_bytes);
  if (pass.summed()) {
    for (const int64_t n : floats) GatherScratch(ctx, chunk * n);
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      for (const int64_t n : floats) {
        ctx.Count("tp.all_gather",
                  std::min(chunk, tokens - begin) * n * kFloat * (ctx.tp_ranks - 1));
      }
    }
  }
  ProductScratch(ctx, chunk, vocabulary, pass.hidden());
}

void CrossEntropyLoss(PassContext& ctx, const ModelPass& pass) {
  LossChunks(ctx, pass, 1, 16, {kernels::kCrossEntropyShardFloats});
}

// HiddenGradient of model/loss.cc.
void HiddenGradient(ModelPass& pass) {
  pass.Activations(pass.share().part(), pass.hidden());
  if (pass.summed()) pass.Activations(pass.share().tokens(), pass.hidden());
}
void SumHiddenGradient(PassContext& ctx, ModelPass& pass) {
  if (!pass.summed()) return;
  const MeterScope scope(ctx.arena);
  if (ctx.cuda()) pass.Floats(pass.share().tokens() * pass.hidden());
  pass.Sum(pass.hidden(), Write::kOverwrite);
}

void PassTrain(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  ModelPass pass(ctx, ctx.input.model, ctx.input.sparse_attention, ctx.enter);
  const Tables tables = pass.Forward(cu_seqlens, ctx.input.recompute);
  HiddenGradient(pass);
  pass.EnterHead();
  pass.Gather(pass.hidden());
  CrossEntropyLoss(ctx, pass);
  SumHiddenGradient(ctx, pass);
  pass.Backward(tables, ctx.input.recompute, /*embedding_trained=*/true);
}

void PassDistil(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  ModelPass teacher(ctx, ctx.input.teacher, false, ctx.enter_teacher);
  ModelPass student(ctx, ctx.input.model, false, ctx.enter);
  teacher.ForwardOnly(cu_seqlens);
  const Tables tables = student.Forward(cu_seqlens, ctx.input.recompute);
  student.Gather(student.hidden());
  HiddenGradient(student);
  teacher.EnterHead();
  student.EnterHead();
  student.Gather(student.hidden());
  LossChunks(ctx, student, 2, 24, {kernels::kKlSoftmaxFloats, kernels::kKlPartFloats});
  if (ctx.input.cross_entropy) {
    student.Activations(student.share().tokens(), student.hidden());
    CrossEntropyLoss(ctx, student);
  }
  SumHiddenGradient(ctx, student);
  student.Backward(tables, ctx.input.recompute, ctx.input.trainable == HaloTrainable::kAll);
}

void PassAlign(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  const ModelConfig all_linear = AllLinear(ctx.input.model);
  ModelPass mixers(ctx, all_linear, false, ctx.enter);
  const Tables tables = mixers.MakeTables(cu_seqlens);
  ModelPass teacher(ctx, ctx.input.model, false, ctx.enter_teacher);
  teacher.ForwardOnly(cu_seqlens, [&](int64_t layer) {
    const MeterScope layer_scope(ctx.arena);
    ctx.enter(model::UnitOfLayer(layer));
    mixers.Activations(mixers.share().part(), mixers.hidden());
    mixers.MixerForward(tables, MixerType::kLightning, Write::kOverwrite);
    mixers.Activations(mixers.share().part(), mixers.hidden());
    mixers.Gather(mixers.hidden());
    mixers.MixerBackward(tables, MixerType::kLightning);
  });
}

}  // namespace

PassContext::PassContext(const PlanInput& plan, int64_t rank)
    : input(plan),
      cp(static_cast<int>(rank / plan.mesh.tp % plan.mesh.cp)),
      cp_ranks(static_cast<int>(plan.mesh.cp)),
      tp(static_cast<int>(rank % plan.mesh.tp)),
      tp_ranks(static_cast<int>(plan.mesh.tp)),
      element(plan.device == DeviceKind::kCuda ? 2 : kFloat),
      arena(plan.device == DeviceKind::kCuda ? 256 : 64),
      scratch(plan.device == DeviceKind::kCuda ? 256 : 64) {}

void PassMicroBatch(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  switch (ctx.input.phase) {
    case PlanPhase::kTrain:
    case PlanPhase::kFinetune:
      PassTrain(ctx, cu_seqlens);
      break;
    case PlanPhase::kAlign:
      PassAlign(ctx, cu_seqlens);
      break;
    case PlanPhase::kDistil:
      PassDistil(ctx, cu_seqlens);
      break;
  }
}

}  // namespace sala::recipes
