// Lightning attention on the GPU.
//
// Heads are independent, and so are segments of a head once the state at each border is known:
//   1. per segment, the state it leaves when nothing enters (from k and v alone, or q and dO);
//   2. a scan over the segments: what really enters each;
//   3. per segment, a march along its chunks of 64 tokens with the state in registers.
// Steps 1 and 2 fall away for a single segment. Forward marches once. Backward marches three times,
// in one launch: for dq in rising order with S, for dk and dv in falling order with R = dL/dS. All
// four outputs are one algorithm with other operands (cuda_lightning.h), so there is one kernel.
// Bound by memory: forward reads k, v, then q, k, v and writes out; backward reads the operands of
// both borders, then 9 and writes 3, most of the reads from L2 where sweeps share them.
//
// Where the last state alone is asked for, the march of the last segment is one of the state alone.
#include "kernels/cuda_kernels.h"
#include "kernels/lightning/cuda_lightning.h"

namespace sala::kernels {
namespace lightning {

// Segments are as long as leaves kBlocks of them over all heads, twice the multiprocessors of the
// largest cards, between 256 tokens (the state's way through memory then costs a quarter of the
// march) and 4096 (longer ones gain nothing).
constexpr int64_t kBlocks = 256;
constexpr int64_t kLeastSegment = 256;
constexpr int64_t kMostSegment = 4096;

Plan MakePlan(int64_t tokens, int64_t heads, int64_t d) {
  int64_t length = kLeastSegment;
  while (length < kMostSegment && 2 * length * kBlocks <= tokens * heads) length *= 2;
  return {static_cast<int>(tokens), static_cast<int>(heads),
          static_cast<int>(d),      static_cast<int>(CeilDiv(tokens, kChunk)),
          static_cast<int>(length), static_cast<int>(CeilDiv(tokens, length))};
}

}  // namespace lightning

namespace {

using lightning::BorderArguments;
using lightning::BorderStates;
using lightning::MarchArguments;
using lightning::Plan;
using lightning::Rows;
using lightning::Sweep;
using lightning::Tables;

constexpr int64_t kAlignment = 8;  // elements in a 16-byte access

void CheckRows(const ConstTensor& x, const ConstTensor& q) {
  SALA_CHECK(x.rank() == 3 && x.dim(0) == q.dim(0) && x.dim(1) == q.dim(1) && x.dim(2) == q.dim(2))
      << "found " << ShapeText(x) << ", expected the shape of q, " << ShapeText(q);
  SALA_CHECK(x.stride(2) == 1 && (x.stride(1) == x.dim(2) || x.dim(1) == 1))
      << ShapeText(x) << ": found heads " << x.stride(1) << " elements apart, expected "
      << x.dim(2);
  SALA_CHECK(x.stride(0) % kAlignment == 0 && reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0)
      << ShapeText(x) << ": found tokens " << x.stride(0)
      << " elements apart, expected a multiple of 8 and 16-byte alignment on a GPU";
}

void CheckState(const ConstTensor& state, const ConstTensor& q) {
  if (state.empty()) return;
  SALA_CHECK(state.rank() == 3 && state.dim(0) == q.dim(1) && state.dim(1) == q.dim(2) &&
             state.dim(2) == q.dim(2) && state.contiguous())
      << "found state " << ShapeText(state) << ", expected " << q.dim(1) << " x " << q.dim(2)
      << " x " << q.dim(2);
}

Plan CheckedPlan(const ConstTensor& q, std::span<const int32_t> cu_seqlens,
                 std::span<const float> slopes) {
  SALA_CHECK(q.rank() == 3) << "found q " << ShapeText(q) << ", expected tokens x heads x width";
  const int64_t d = q.dim(2);
  SALA_CHECK(d == 16 || d == 32 || d == 64 || d == 128)
      << "found heads of " << d << " on a GPU, expected 16, 32, 64 or 128";
  SALA_CHECK(!cu_seqlens.empty() && cu_seqlens.back() <= q.dim(0))
      << "documents end after the " << q.dim(0) << " tokens";
  SALA_CHECK(static_cast<int64_t>(slopes.size()) == q.dim(1))
      << "found " << slopes.size() << " slopes, expected " << q.dim(1);
  for (const float slope : slopes) {
    SALA_CHECK(slope >= 0) << "found slope " << slope << ", expected none below 0";
  }
  return lightning::MakePlan(cu_seqlens.back(), q.dim(1), d);
}

// Device copies of the arguments, and the tables made from them.
struct Inputs {
  Inputs(const Context& ctx, const Op& op, const Plan& plan, std::span<const int32_t> cu_seqlens,
         bool carries_in, std::span<const float> head_slopes) {
    const auto documents = static_cast<int64_t>(cu_seqlens.size()) - 1;
    const int32_t* ends = UploadScratch(ctx, cu_seqlens.data(), documents + 1);
    slopes = UploadScratch(ctx, head_slopes.data(), plan.heads);
    const auto allocate = [&ctx]<typename T>(T*& to, int64_t count) {
      to = static_cast<T*>(ctx.scratch->Allocate(static_cast<size_t>(count) * sizeof(T)));
    };
    allocate(tables.code, int64_t{plan.chunks} * 2 * lightning::kChunk);
    allocate(tables.power, int64_t{plan.heads} * (lightning::kChunk + 1));
    allocate(tables.through, int64_t{plan.heads} * plan.segments);
    allocate(tables.last_start, plan.segments);
    allocate(tables.carried_end, plan.segments);
    lightning::BuildTables(op, plan, ends, documents, carries_in, slopes, tables);
  }
  const float* slopes;
  Tables tables;
};

float* NewBorderStates(const Context& ctx, const Plan& plan) {
  const int64_t count = int64_t{plan.heads} * (plan.segments - 1) * plan.d * plan.d;
  if (count == 0) return nullptr;
  return static_cast<float*>(ctx.scratch->Allocate(static_cast<size_t>(count) * sizeof(float)));
}

// No tokens: what enters leaves.
void PassStates(const Op& op, const Context& ctx, const ConstTensor& from, const Tensor& to) {
  if (to.empty()) return;
  const auto bytes = static_cast<size_t>(to.numel()) * sizeof(float);
  float* leaves = op.Data<float>(to);
  if (from.empty()) {
    ctx.gpu->Zero(leaves, bytes);
  } else if (from.raw() != leaves) {
    ctx.gpu->Copy(leaves, op.Data<float>(from), bytes);
  }
}

// A state that the call both takes and gives in the same memory: segments run in any order, so what
// enters is set aside.
const float* Entering(const Op& op, const Context& ctx, const ConstTensor& from, const Tensor& to) {
  if (from.empty() || from.raw() != to.raw()) return op.Data<float>(from);
  const auto bytes = static_cast<size_t>(from.numel()) * sizeof(float);
  void* copy = ctx.scratch->Allocate(bytes);
  ctx.gpu->Copy(copy, from.raw(), bytes);
  return static_cast<const float*>(copy);
}

// The last state of a sweep, without its outputs: S with y = k and z = v, or R with q and dO.
void LastState(const Context& ctx, const char* name, const ConstTensor& y, const ConstTensor& z,
               std::span<const int32_t> cu_seqlens, std::span<const float> slopes, float scale,
               bool carries_in, const ConstTensor& from, const Tensor& to, bool falling) {
  const Op op(ctx, name, y);
  const Plan plan = CheckedPlan(y, cu_seqlens, slopes);
  for (const ConstTensor& x : {y, z}) CheckRows(x, y);
  for (const ConstTensor& x : {from, ConstTensor(to)}) CheckState(x, y);
  if (plan.tokens == 0) return PassStates(op, ctx, from, to);

  const ArenaScope scope(*ctx.scratch);
  const Inputs inputs(ctx, op, plan, cu_seqlens, carries_in, slopes);
  const BorderArguments border = {plan,
                                  inputs.tables,
                                  inputs.slopes,
                                  scale,
                                  1,
                                  {{{op.Data<Bf16>(y), y.stride(0)},
                                    {op.Data<Bf16>(z), z.stride(0)},
                                    op.Data<float>(from),
                                    NewBorderStates(ctx, plan),
                                    falling,
                                    op.Data<float>(to)}}};
  lightning::BuildBorderStates(op, border);
  lightning::BuildLastStates(op, border);
}

}  // namespace

void cuda::LightningForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                            const ConstTensor& v, std::span<const int32_t> cu_seqlens,
                            std::span<const float> slopes, float scale, const ConstTensor& state_in,
                            const Tensor& out, const Tensor& state_out) {
  const Op op(ctx, "LightningForward", q);
  const Plan plan = CheckedPlan(q, cu_seqlens, slopes);
  for (const ConstTensor& x : {q, k, v, ConstTensor(out)}) CheckRows(x, q);
  for (const ConstTensor& x : {state_in, ConstTensor(state_out)}) CheckState(x, q);
  if (plan.tokens == 0) return PassStates(op, ctx, state_in, state_out);

  const ArenaScope scope(*ctx.scratch);
  const Inputs inputs(ctx, op, plan, cu_seqlens, !state_in.empty(), slopes);
  const auto rows = [&op](const ConstTensor& x) { return Rows{op.Data<Bf16>(x), x.stride(0)}; };
  const float* entering = Entering(op, ctx, state_in, state_out);
  float* states = NewBorderStates(ctx, plan);
  lightning::BuildBorderStates(
      op, {plan, inputs.tables, inputs.slopes, scale, 1, {{rows(k), rows(v), entering, states}}});

  MarchArguments march = {plan, inputs.tables, scale, 1, {}};
  march.sweep[0] = {.x = rows(q),
                    .y = rows(k),
                    .z = rows(v),
                    .out = op.Data<Bf16>(out),
                    .out_stride = out.stride(0),
                    .first = entering,
                    .states = states,
                    .last = op.Data<float>(state_out),
                    .row_stride = plan.d,
                    .column_stride = 1};
  lightning::March(op, march);
}

void cuda::LightningStates(const Context& ctx, const ConstTensor& k, const ConstTensor& v,
                           std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                           const ConstTensor& state_in, const Tensor& state_out) {
  LastState(ctx, "LightningStates", k, v, cu_seqlens, slopes, /*scale=*/1.0F, !state_in.empty(),
            state_in, state_out, /*falling=*/false);
}

void cuda::LightningStateGradient(const Context& ctx, const ConstTensor& q, const ConstTensor& dout,
                                  std::span<const int32_t> cu_seqlens,
                                  std::span<const float> slopes, float scale, bool carried_in,
                                  const ConstTensor& dstate_out, const Tensor& dstate_in) {
  LastState(ctx, "LightningStateGradient", q, dout, cu_seqlens, slopes, scale, carried_in,
            dstate_out, dstate_in, /*falling=*/true);
}

void cuda::LightningBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                             const ConstTensor& v, const ConstTensor& dout,
                             std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                             float scale, const ConstTensor& state_in,
                             const ConstTensor& dstate_out, const Tensor& dq, const Tensor& dk,
                             const Tensor& dv, const Tensor& dstate_in) {
  const Op op(ctx, "LightningBackward", q);
  const Plan plan = CheckedPlan(q, cu_seqlens, slopes);
  for (const ConstTensor& x : {q, k, v, dout, ConstTensor(dq), ConstTensor(dk), ConstTensor(dv)}) {
    CheckRows(x, q);
  }
  for (const ConstTensor& x : {state_in, dstate_out, ConstTensor(dstate_in)}) CheckState(x, q);
  if (plan.tokens == 0) return PassStates(op, ctx, dstate_out, dstate_in);

  const ArenaScope scope(*ctx.scratch);
  const bool carries_in = !state_in.empty() || !dstate_in.empty();
  const Inputs inputs(ctx, op, plan, cu_seqlens, carries_in, slopes);
  const auto rows = [&op](const ConstTensor& x) { return Rows{op.Data<Bf16>(x), x.stride(0)}; };
  const auto* s_first = op.Data<float>(state_in);
  const float* r_first = Entering(op, ctx, dstate_out, dstate_in);
  float* s_states = NewBorderStates(ctx, plan);
  float* r_states = NewBorderStates(ctx, plan);
  lightning::BuildBorderStates(op, {plan,
                                    inputs.tables,
                                    inputs.slopes,
                                    scale,
                                    2,
                                    {{rows(k), rows(v), s_first, s_states, /*falling=*/false},
                                     {rows(q), rows(dout), r_first, r_states, /*falling=*/true}}});

  MarchArguments march = {plan, inputs.tables, scale, 3, {}};
  march.sweep[0] = {.x = rows(dout),
                    .y = rows(v),
                    .z = rows(k),
                    .out = op.Data<Bf16>(dq),
                    .out_stride = dq.stride(0),
                    .first = s_first,
                    .states = s_states,
                    .row_stride = 1,
                    .column_stride = plan.d};
  march.sweep[1] = {.x = rows(v),
                    .y = rows(dout),
                    .z = rows(q),
                    .out = op.Data<Bf16>(dk),
                    .out_stride = dk.stride(0),
                    .first = r_first,
                    .states = r_states,
                    .row_stride = 1,
                    .column_stride = plan.d,
                    .falling = true};
  march.sweep[2] = {.x = rows(k),
                    .y = rows(q),
                    .z = rows(dout),
                    .out = op.Data<Bf16>(dv),
                    .out_stride = dv.stride(0),
                    .first = r_first,
                    .states = r_states,
                    .last = op.Data<float>(dstate_in),
                    .row_stride = plan.d,
                    .column_stride = 1,
                    .falling = true};
  lightning::March(op, march);
}

}  // namespace sala::kernels
