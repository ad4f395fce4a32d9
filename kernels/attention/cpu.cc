// Dense attention is block attention that leaves no block out.
#include "kernels/attention/attention.h"
#include "kernels/attention/block_attention.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int64_t kKeyBlock =
    64;  // that of the sparse form by default, so that the two agree bit for bit

BlockAttention Dense(const ConstTensor& q, const ConstTensor& k, const ConstTensor& v,
                     std::span<const DocumentRange> documents, float scale) {
  return {q, k, v, documents, scale, kKeyBlock, {}};
}

}  // namespace

void AttentionForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                      const ConstTensor& v, std::span<const DocumentRange> documents, float scale,
                      const Tensor& out, const Tensor& lse) {
  if (ctx.cuda()) return Cuda(ctx).AttentionForward(ctx, q, k, v, documents, scale, out, lse);
  BlockAttentionForward(ctx, Dense(q, k, v, documents, scale), out, lse);
}

void AttentionBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                       const ConstTensor& v, const ConstTensor& out, const ConstTensor& lse,
                       const ConstTensor& dout, std::span<const DocumentRange> documents,
                       float scale, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  if (ctx.cuda()) {
    return Cuda(ctx).AttentionBackward(ctx, q, k, v, out, lse, dout, documents, scale, dq, dk, dv);
  }
  BlockAttentionBackward(ctx, Dense(q, k, v, documents, scale), out, lse, dout, dq, dk, dv);
}

void AttentionDecode(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                     const ConstTensor& v, float scale, const Tensor& out) {
  const ConstTensor one(q.Data<float>(), {1, q.dim(0), q.dim(1)});
  BlockAttentionDecode(ctx, Dense(one, k, v, {}, scale), out);
}

}  // namespace sala::kernels
