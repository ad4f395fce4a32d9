// Dense attention is block attention that leaves no block out.
#include "kernels/attention/attention.h"
#include "kernels/attention/block_attention.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int64_t kKeyBlock =
    64;  // that of the sparse form by default, so that the two agree bit for bit

BlockAttention Dense(const ConstTensor& q, const ConstTensor& k, const ConstTensor& v,
                     std::span<const DocumentRange> documents, float scale, int64_t first_query) {
  return {q, k, v, documents, scale, kKeyBlock, {}, first_query};
}

}  // namespace

void AttentionForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                      const ConstTensor& v, std::span<const DocumentRange> documents, float scale,
                      const Tensor& out, const Tensor& lse, int64_t first_query) {
  if (ctx.cuda()) {
    return Cuda(ctx).AttentionForward(ctx, q, k, v, documents, scale, out, lse, first_query);
  }
  BlockAttentionForward(ctx, Dense(q, k, v, documents, scale, first_query), out, lse);
}

void AttentionBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                       const ConstTensor& v, const ConstTensor& out, const ConstTensor& lse,
                       const ConstTensor& dout, std::span<const DocumentRange> documents,
                       float scale, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                       int64_t first_query) {
  if (ctx.cuda()) {
    return Cuda(ctx).AttentionBackward(ctx, q, k, v, out, lse, dout, documents, scale, dq, dk, dv,
                                       first_query);
  }
  BlockAttentionBackward(ctx, Dense(q, k, v, documents, scale, first_query), out, lse, dout, dq, dk,
                         dv);
}

void AttentionDecode(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                     const ConstTensor& v, float scale, const Tensor& out) {
  const ConstTensor one(q.Data<float>(), {1, q.dim(0), q.dim(1)});
  BlockAttentionDecode(ctx, Dense(one, k, v, {}, scale, k.dim(0) - 1), out);
}

}  // namespace sala::kernels
