// The chunked form on a global grid of kChunk tokens (docs/math/lightning.md). Heads are
// independent: one item of work each.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <vector>

#include "core/elementary.h"
#include "kernels/attention/block_attention.h"
#include "kernels/cuda_kernels.h"
#include "kernels/gemm/serial.h"
#include "kernels/lightning/chunk_math.h"
#include "kernels/lightning/lightning.h"

namespace sala::kernels {
namespace {

constexpr int64_t kChunk = 64;

// One chunk of tokens and where its documents begin. All positions count from the chunk's first
// token.
struct Chunk {
  int64_t begin = 0;  // absolute
  int64_t n = 0;
  int64_t carried =
      0;             // tokens 0 .. carried - 1 belong to the document that began before the chunk
  int64_t last = 0;  // first token of the chunk that is in the document of its last token
  std::array<int64_t, kChunk> first{};  // per token, first token of its document inside the chunk

  bool StateSurvives() const { return carried == n; }
};

// `carries_in`: the first document began before token 0.
std::vector<Chunk> CutInChunks(std::span<const int32_t> cu_seqlens, bool carries_in) {
  const std::vector<DocumentRange> documents = Documents(cu_seqlens);
  const int64_t tokens = cu_seqlens.back();
  std::vector<Chunk> chunks;
  size_t s = 0;
  for (int64_t begin = 0; begin < tokens; begin += kChunk) {
    Chunk chunk;
    chunk.begin = begin;
    chunk.n = std::min(kChunk, tokens - begin);
    for (int64_t i = 0; i < chunk.n; ++i) {
      while (documents[s].end <= begin + i) ++s;
      const int64_t start = documents[s].begin - begin;
      if (start < 0 || (s == 0 && carries_in)) chunk.carried = i + 1;
      chunk.first[static_cast<size_t>(i)] = std::max<int64_t>(0, start);
    }
    chunk.last = chunk.first[static_cast<size_t>(chunk.n - 1)];
    chunks.push_back(chunk);
  }
  return chunks;
}

bool BeginsDocument(const Chunk& chunk) { return !chunk.StateSurvives(); }

// lambda^e. Powers below 1e-30 count as 0, which keeps denormal numbers out of the products.
float DecayPower(float slope, int64_t e) {
  const double p = PortableExp(-static_cast<double>(slope) * static_cast<double>(e));
  return p < 1e-30 ? 0.0F : static_cast<float>(p);
}

// The powers e = 0 .. kChunk. Only non-negative ones, so nothing exceeds 1.
struct DecayTable {
  explicit DecayTable(float slope) {
    for (int64_t e = 0; e <= kChunk; ++e) power[static_cast<size_t>(e)] = DecayPower(slope, e);
  }
  std::array<float, kChunk + 1> power{};
};

// One thread's buffers.
struct Work {
  float* a = nullptr;       // [kChunk, D], a scaled operand
  float* scores = nullptr;  // [kChunk, kChunk]
  float* state = nullptr;   // [D, D]
  float* gemm = nullptr;
};

std::vector<Work> NewWork(const Context& ctx, int64_t d) {
  const auto floats = [&ctx](int64_t n) {
    return static_cast<float*>(ctx.scratch->Allocate(static_cast<size_t>(n) * sizeof(float)));
  };
  const int64_t side = std::max(kChunk, d);
  std::vector<Work> all(static_cast<size_t>(ctx.pool->threads()));
  for (Work& work : all) {
    work.a = floats(kChunk * d);
    work.scores = floats(kChunk * kChunk);
    work.state = floats(d * d);
    work.gemm = floats(GemmSerialWorkspace(side, side, side));
  }
  return all;
}

// One head's rows of a [T, N, D] tensor.
struct HeadRows {
  HeadRows(const ConstTensor& x, int64_t head)
      : data(x.Data<float>() + head * x.dim(2)), stride(x.stride(0)) {}
  const float* At(int64_t token) const { return data + token * stride; }
  const float* data;
  int64_t stride;
};
struct MutableHeadRows {
  MutableHeadRows(const Tensor& x, int64_t head)
      : data(x.Data<float>() + head * x.dim(2)), stride(x.stride(0)) {}
  float* At(int64_t token) const { return data + token * stride; }
  float* data;
  int64_t stride;
};

// The products of one head, chunk by chunk.
class HeadChunks {
 public:
  HeadChunks(int64_t d, float slope, float scale, const Work& work)
      : d_(d), scale_(scale), decay_(slope), work_(work) {}

  float* state() const { return work_.state; }
  void LoadState(const ConstTensor& states, int64_t head) const {
    if (states.empty()) {
      std::fill_n(work_.state, d_ * d_, 0.0F);
    } else {
      std::copy_n(states.Data<float>() + head * d_ * d_, d_ * d_, work_.state);
    }
  }
  void StoreState(const Tensor& states, int64_t head) const {
    if (!states.empty()) {
      std::copy_n(work_.state, d_ * d_, states.Data<float>() + head * d_ * d_);
    }
  }

  // scores[i, j] = scale lambda^(i-j) x_i . y_j inside documents, j <= i
  void Scores(const Chunk& c, const HeadRows& x, const HeadRows& y) const {
    GemmSerialNT(c.n, c.n, d_, scale_, x.At(c.begin), x.stride, y.At(c.begin), y.stride,
                 work_.scores, kChunk, Write::kOverwrite, work_.gemm);
    DecayScores(c.n, decay_.power.data(), c.first.data(), work_.scores, kChunk);
  }
  // out_i = sum_j scores[i, j] x_j
  void ApplyScores(const Chunk& c, const HeadRows& x, const MutableHeadRows& out) const {
    GemmSerialNN(c.n, d_, c.n, 1.0F, work_.scores, kChunk, x.At(c.begin), x.stride, out.At(c.begin),
                 out.stride, Write::kOverwrite, work_.gemm);
  }
  // out_j = sum_i scores[i, j] x_i
  void ApplyScoresTransposed(const Chunk& c, const HeadRows& x, const MutableHeadRows& out) const {
    GemmSerialTN(c.n, d_, c.n, 1.0F, work_.scores, kChunk, x.At(c.begin), x.stride, out.At(c.begin),
                 out.stride, Write::kOverwrite, work_.gemm);
  }

  // Rows `from_head` of the tokens that see the incoming state: scale lambda^(i+1) x_i, in work.a.
  void ScaleCarried(const Chunk& c, const HeadRows& x) const {
    std::array<float, kChunk> factor{};
    for (int64_t i = 0; i < c.carried; ++i) {
      factor[static_cast<size_t>(i)] = scale_ * decay_.power[static_cast<size_t>(i + 1)];
    }
    ScaleRows(c.carried, d_, factor.data(), x.At(c.begin), x.stride, work_.a);
  }
  // The tokens that reach the outgoing state: lambda^(n-1-j) x_j, in work.a.
  void ScaleOutgoing(const Chunk& c, const HeadRows& x) const {
    std::array<float, kChunk> factor{};
    for (int64_t j = c.last; j < c.n; ++j) {
      factor[static_cast<size_t>(j - c.last)] = decay_.power[static_cast<size_t>(c.n - 1 - j)];
    }
    ScaleRows(c.n - c.last, d_, factor.data(), x.At(c.begin + c.last), x.stride, work_.a);
  }

  // out += work.a M or work.a M^T with M the state, for `rows` rows of out.
  void AddTimesState(int64_t rows, float* out, int64_t stride) const {
    GemmSerialNN(rows, d_, d_, 1.0F, work_.a, d_, work_.state, d_, out, stride, Write::kAccumulate,
                 work_.gemm);
  }
  void AddTimesStateTransposed(int64_t rows, float* out, int64_t stride) const {
    GemmSerialNT(rows, d_, d_, 1.0F, work_.a, d_, work_.state, d_, out, stride, Write::kAccumulate,
                 work_.gemm);
  }

  // state = (lambda^n state, or 0 where it does not survive the chunk) + work.a^T y, over `rows`
  // rows.
  void UpdateState(const Chunk& c, int64_t rows, const float* y, int64_t stride) const {
    if (c.StateSurvives()) {
      Scale(d_ * d_, decay_.power[static_cast<size_t>(c.n)], work_.state);
    } else {
      std::fill_n(work_.state, d_ * d_, 0.0F);
    }
    if (rows == 0) return;
    GemmSerialTN(d_, d_, rows, 1.0F, work_.a, d_, y, stride, work_.state, d_, Write::kAccumulate,
                 work_.gemm);
  }
  // S' = a S + sum_j lambda^(n-1-j) k_j v_j^T
  void AdvanceState(const Chunk& c, const HeadRows& k, const HeadRows& v) const {
    ScaleOutgoing(c, k);
    UpdateState(c, c.n - c.last, v.At(c.begin + c.last), v.stride);
  }
  // R' = a R + sum_i scale lambda^(i+1) q_i dO_i^T over the carried tokens
  void ReturnState(const Chunk& c, const HeadRows& q, const HeadRows& dout) const {
    ScaleCarried(c, q);
    UpdateState(c, c.carried, dout.At(c.begin), dout.stride);
  }

 private:
  int64_t d_;
  float scale_;
  DecayTable decay_;
  Work work_;
};

struct Operands {
  Operands(const ConstTensor& q_in, const ConstTensor& k_in, const ConstTensor& v_in, int64_t head)
      : q(q_in, head), k(k_in, head), v(v_in, head) {}
  HeadRows q;
  HeadRows k;
  HeadRows v;
};

// dq, with the states recomputed from the first chunk to the last.
void SweepForward(const HeadChunks& head, const std::vector<Chunk>& chunks, const Operands& x,
                  const HeadRows& dout, const MutableHeadRows& dq) {
  for (const Chunk& c : chunks) {
    head.Scores(c, dout, x.v);
    head.ApplyScores(c, x.k, dq);
    if (c.carried > 0) {
      head.ScaleCarried(c, dout);
      head.AddTimesStateTransposed(c.carried, dq.At(c.begin), dq.stride);
    }
    head.AdvanceState(c, x.k, x.v);
  }
}

// dk and dv, with R = dL/dS carried from the last chunk to the first in the place of the state.
void SweepBackward(const HeadChunks& head, const std::vector<Chunk>& chunks, const Operands& x,
                   const HeadRows& dout, const MutableHeadRows& dk, const MutableHeadRows& dv) {
  for (auto it = chunks.rbegin(); it != chunks.rend(); ++it) {
    const Chunk& c = *it;
    const int64_t outgoing = c.n - c.last;
    head.Scores(c, dout, x.v);
    head.ApplyScoresTransposed(c, x.q, dk);
    head.ScaleOutgoing(c, x.v);
    head.AddTimesStateTransposed(outgoing, dk.At(c.begin + c.last), dk.stride);
    head.Scores(c, x.q, x.k);
    head.ApplyScoresTransposed(c, dout, dv);
    head.ScaleOutgoing(c, x.k);
    head.AddTimesState(outgoing, dv.At(c.begin + c.last), dv.stride);
    head.ReturnState(c, x.q, dout);
  }
}

void CheckState(const ConstTensor& state, int64_t heads, int64_t d) {
  if (state.empty()) return;
  SALA_CHECK(state.rank() == 3 && state.dim(0) == heads && state.dim(1) == d && state.dim(2) == d &&
             state.dtype() == DType::kF32 && state.contiguous())
      << "state " << ShapeText(state) << " for " << heads << " heads of " << d;
}

// One call over packed documents, forward or backward: its heads one after the other, each with
// work space of the thread it runs on.
class HeadLoop {
 public:
  // `tensors` are shaped as q, `states` may be empty; aborts where one does not fit.
  HeadLoop(const Context& ctx, const ConstTensor& q, std::span<const int32_t> cu_seqlens,
           std::span<const float> slopes, float scale, std::initializer_list<ConstTensor> tensors,
           std::initializer_list<ConstTensor> states)
      : ctx_(ctx), heads_(q.dim(1)), d_(q.dim(2)), slopes_(slopes), scale_(scale) {
    SALA_CHECK(ctx.device == DeviceKind::kCpu) << "this form runs on the CPU";
    SALA_CHECK(!cu_seqlens.empty() && cu_seqlens.back() <= q.dim(0))
        << "documents end after the " << q.dim(0) << " tokens";
    SALA_CHECK(static_cast<int64_t>(slopes.size()) == heads_)
        << slopes.size() << " slopes for " << heads_ << " heads";
    for (const ConstTensor& x : tensors) CheckHeads(x, q.dim(0), heads_, d_);
    for (const ConstTensor& x : states) CheckState(x, heads_, d_);
  }

  // Calls body(head, h) for every head h.
  template <typename Body>
  void Run(const Body& body) const {
    const ArenaScope scope(*ctx_.scratch);
    const std::vector<Work> work = NewWork(ctx_, d_);
    ForEachItem(ctx_, heads_, [&](int64_t worker, int64_t h) {
      body(HeadChunks(d_, slopes_[static_cast<size_t>(h)], scale_,
                      work[static_cast<size_t>(worker)]),
           h);
    });
  }

 private:
  const Context& ctx_;
  int64_t heads_;
  int64_t d_;
  std::span<const float> slopes_;
  float scale_;
};

}  // namespace

std::vector<float> LightningSlopes(int64_t n) {
  SALA_CHECK(n >= 1) << n << " heads";
  int64_t p = 1;
  while (2 * p <= n) p *= 2;
  const auto slope = [](int64_t h, int64_t heads) {
    return static_cast<float>(
        PortableExp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(heads)));
  };
  std::vector<float> slopes;
  for (int64_t h = 0; h < p; ++h) slopes.push_back(slope(h, p));
  for (int64_t h = 0; h < n - p; ++h) slopes.push_back(slope(2 * h, 2 * p));
  return slopes;
}

void LightningForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                      const ConstTensor& v, std::span<const int32_t> cu_seqlens,
                      std::span<const float> slopes, float scale, const ConstTensor& state_in,
                      const Tensor& out, const Tensor& state_out) {
  if (ctx.cuda()) {
    return Cuda(ctx).LightningForward(ctx, q, k, v, cu_seqlens, slopes, scale, state_in, out,
                                      state_out);
  }
  const HeadLoop loop(ctx, q, cu_seqlens, slopes, scale, {q, k, v, out}, {state_in, state_out});
  const std::vector<Chunk> chunks = CutInChunks(cu_seqlens, !state_in.empty());
  loop.Run([&](const HeadChunks& head, int64_t h) {
    const Operands x(q, k, v, h);
    const MutableHeadRows o(out, h);
    head.LoadState(state_in, h);
    for (const Chunk& c : chunks) {
      head.Scores(c, x.q, x.k);
      head.ApplyScores(c, x.v, o);
      if (c.carried > 0) {
        head.ScaleCarried(c, x.q);
        head.AddTimesState(c.carried, o.At(c.begin), o.stride);
      }
      head.AdvanceState(c, x.k, x.v);
    }
    head.StoreState(state_out, h);
  });
}

void LightningBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                       const ConstTensor& v, const ConstTensor& dout,
                       std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                       float scale, const ConstTensor& state_in, const ConstTensor& dstate_out,
                       const Tensor& dq, const Tensor& dk, const Tensor& dv,
                       const Tensor& dstate_in) {
  if (ctx.cuda()) {
    return Cuda(ctx).LightningBackward(ctx, q, k, v, dout, cu_seqlens, slopes, scale, state_in,
                                       dstate_out, dq, dk, dv, dstate_in);
  }
  const HeadLoop loop(ctx, q, cu_seqlens, slopes, scale, {q, k, v, dout, dq, dk, dv},
                      {state_in, dstate_out, dstate_in});
  const std::vector<Chunk> chunks =
      CutInChunks(cu_seqlens, !state_in.empty() || !dstate_in.empty());
  loop.Run([&](const HeadChunks& head, int64_t h) {
    const Operands x(q, k, v, h);
    const HeadRows g(dout, h);
    head.LoadState(state_in, h);
    SweepForward(head, chunks, x, g, MutableHeadRows(dq, h));
    head.LoadState(dstate_out, h);
    SweepBackward(head, chunks, x, g, MutableHeadRows(dk, h), MutableHeadRows(dv, h));
    head.StoreState(dstate_in, h);
  });
}

void LightningStates(const Context& ctx, const ConstTensor& k, const ConstTensor& v,
                     std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                     const ConstTensor& state_in, const Tensor& state_out) {
  if (ctx.cuda()) {
    return Cuda(ctx).LightningStates(ctx, k, v, cu_seqlens, slopes, state_in, state_out);
  }
  const HeadLoop loop(ctx, k, cu_seqlens, slopes, /*scale=*/1.0F, {k, v}, {state_in, state_out});
  const std::vector<Chunk> chunks = CutInChunks(cu_seqlens, !state_in.empty());
  // What comes before the last chunk that begins a document does not reach the end.
  const auto last = std::find_if(chunks.rbegin(), chunks.rend(), BeginsDocument);
  const auto first = last == chunks.rend() ? chunks.begin() : last.base() - 1;
  loop.Run([&](const HeadChunks& head, int64_t h) {
    head.LoadState(state_in, h);
    for (auto c = first; c != chunks.end(); ++c) {
      head.AdvanceState(*c, HeadRows(k, h), HeadRows(v, h));
    }
    head.StoreState(state_out, h);
  });
}

void LightningStateGradient(const Context& ctx, const ConstTensor& q, const ConstTensor& dout,
                            std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                            float scale, bool carried_in, const ConstTensor& dstate_out,
                            const Tensor& dstate_in) {
  if (ctx.cuda()) {
    return Cuda(ctx).LightningStateGradient(ctx, q, dout, cu_seqlens, slopes, scale, carried_in,
                                            dstate_out, dstate_in);
  }
  const HeadLoop loop(ctx, q, cu_seqlens, slopes, scale, {q, dout}, {dstate_out, dstate_in});
  const std::vector<Chunk> chunks = CutInChunks(cu_seqlens, carried_in);
  // Nothing comes back through the first chunk that begins a document.
  const auto first = std::find_if(chunks.begin(), chunks.end(), BeginsDocument);
  const auto end = first == chunks.end() ? first : first + 1;
  loop.Run([&](const HeadChunks& head, int64_t h) {
    head.LoadState(dstate_out, h);
    for (auto c = end; c != chunks.begin();) {
      head.ReturnState(*--c, HeadRows(q, h), HeadRows(dout, h));
    }
    head.StoreState(dstate_in, h);
  });
}

void LightningDecode(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                     const ConstTensor& v, std::span<const float> slopes, float scale,
                     const Tensor& state, const Tensor& out) {
  const int64_t heads = q.dim(0);
  const int64_t d = q.dim(1);
  for (const ConstTensor& x : {q, k, v, ConstTensor(out)}) {
    SALA_CHECK(x.rank() == 2 && x.dim(0) == heads && x.dim(1) == d) << ShapeText(x);
  }
  SALA_CHECK(!state.empty() && static_cast<int64_t>(slopes.size()) == heads)
      << slopes.size() << " slopes for " << heads << " heads";
  CheckState(state, heads, d);
  ctx.pool->For(heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      RecurrentStep(d, DecayPower(slopes[static_cast<size_t>(h)], 1), scale, q.Row<float>(h),
                    k.Row<float>(h), v.Row<float>(h), state.Data<float>() + h * d * d,
                    out.Row<float>(h));
    }
  });
}

}  // namespace sala::kernels
