// InfLLM-V2 block-sparse attention: key compression, block selection, attention over the selected
// blocks. Rules: docs/math/attention.md (arXiv 2509.24663; the released kernels where they
// differ). Selection carries no gradient; the blocks chosen by the forward pass are kept and used
// by the backward pass.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/context.h"
#include "kernels/common/documents.h"

namespace sala::kernels {

struct SparseAttentionConfig {
  int64_t kernel_size = 32;  // tokens in a fine window; must be 2 * kernel_stride
  int64_t kernel_stride = 16;
  int64_t block_size = 64;  // a multiple of kernel_stride
  int64_t init_blocks = 1;
  int64_t window_size = 2048;  // a multiple of block_size
  int64_t topk =
      64;  // blocks beside the window, so that total_blocks = topk + window_size / block_size
  int64_t dense_len = 8192;  // documents shorter than this use dense attention
  // Blocks that selection on a GPU scores before it keeps the best of them, rounded up to what its
  // tiles allow; 0: as many as shared memory holds. The result does not depend on it.
  int64_t selection_slice = 0;

  int64_t coarse_size() const { return 4 * kernel_size; }
  int64_t coarse_stride() const { return 4 * kernel_stride; }
  int64_t total_blocks() const { return topk + window_size / block_size; }
  int64_t local_blocks() const { return window_size / block_size + 1; }  // own block included
  // Free blocks a token may choose besides the forced ones.
  int64_t free_blocks() const { return total_blocks() - init_blocks - local_blocks(); }
};

// "" when the kernels can work with `config`, otherwise one sentence: key, value found, value
// expected. The kernels below abort on a config with a problem; whoever reads the config reports it
// first.
std::string SparseConfigProblem(const SparseAttentionConfig& config);

// Compressed keys: k f32 [T, K, D] -> fine and coarse means of full windows inside each document.
// Document s has FineCount(n_s) fine keys; they are stored one document after the other.
int64_t FineCount(const SparseAttentionConfig& config, int64_t n);
int64_t CoarseCount(const SparseAttentionConfig& config, int64_t n);
// fine f32 [sum FineCount, K, D], coarse f32 [sum CoarseCount, K, D], overwritten; sums in float64,
// rounded once. On a GPU k, fine and coarse are of the context's activation type, sums are float32,
// and D and the row strides are multiples of 8.
void CompressKeys(const Context& ctx, const ConstTensor& k,
                  std::span<const DocumentRange> documents, const SparseAttentionConfig& config,
                  const Tensor& fine, const Tensor& coarse);

constexpr int32_t kNoBlock = -1;

// blocks i32 [Tq, K, max(1, free_blocks)]: the free blocks (document-relative index) chosen by each
// token and key/value head, ascending, then kNoBlock. Forced blocks (initial and local) are implied
// and not stored. Where all past blocks fit the budget the list holds all of them that are not
// forced. Ties go to the lower block index. q, k and first_query as for AttentionForward; a token's
// list does not depend on the range it is in. On a GPU q and k are of the context's activation
// type, and so are the compressed keys that scores are computed from; N / K is at most 16, D is 16,
// 32, 64 or 128 and row strides are multiples of 8. Scores are float32 on both. Work space: the
// compressed keys.
void SelectBlocks(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                  std::span<const DocumentRange> documents, const SparseAttentionConfig& config,
                  float scale, const Tensor& blocks, int64_t first_query = 0);

// Shapes and ranges of queries as AttentionForward; every document is treated as sparse, whatever
// its length. On a GPU also the number types and strides of AttentionForward, at most 16 query
// heads to a key/value head and blocks of a multiple of 16 tokens; numbers in `blocks` that are no
// free block of their token are passed over (the CPU aborts). The bits of a row depend on its
// document alone, but are not those of dense attention where the budget covers the past: blocks
// come in another order. Scratch of the backward pass on a GPU: Tq * N floats; Tq * K * free_blocks
// integers and an integer for each block and 1,024 queries of its document (the inverse of
// `blocks`); 512 * D bytes for each piece of a block that more than 8,192 queries attend to.
void SparseAttentionForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                            const ConstTensor& v, std::span<const DocumentRange> documents,
                            const SparseAttentionConfig& config, float scale,
                            const ConstTensor& blocks, const Tensor& out, const Tensor& lse,
                            int64_t first_query = 0);

void SparseAttentionBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                             const ConstTensor& v, const ConstTensor& out, const ConstTensor& lse,
                             const ConstTensor& dout, std::span<const DocumentRange> documents,
                             const SparseAttentionConfig& config, float scale,
                             const ConstTensor& blocks, const Tensor& dq, const Tensor& dk,
                             const Tensor& dv, int64_t first_query = 0);

// One new token (generation) at position n - 1: q [N, D], k and v [n, K, D] of all tokens so far;
// selects and attends.
void SparseAttentionDecode(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                           const ConstTensor& v, const SparseAttentionConfig& config, float scale,
                           const Tensor& out);

}  // namespace sala::kernels
