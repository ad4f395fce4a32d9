// Compressed keys: means of full windows inside each document, two layers of resolution.
#include <algorithm>
#include <vector>

#include "kernels/attention/block_attention.h"
#include "kernels/cuda_kernels.h"
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::kernels {
namespace {

int64_t WindowCount(int64_t n, int64_t size, int64_t stride) {
  return n < size ? 0 : (n - size) / stride + 1;
}

struct Windows {
  int64_t size;
  int64_t stride;
};

void WindowMeans(const Context& ctx, const ConstTensor& k, std::span<const DocumentRange> documents,
                 const Windows& windows, const Tensor& means) {
  const int64_t width = k.dim(1) * k.dim(2);
  std::vector<int64_t> starts;  // first token of every window
  for (const DocumentRange& document : documents) {
    const int64_t count = WindowCount(document.length(), windows.size, windows.stride);
    for (int64_t i = 0; i < count; ++i) starts.push_back(document.begin + i * windows.stride);
  }
  SALA_CHECK(means.dim(0) == static_cast<int64_t>(starts.size()))
      << ShapeText(means) << " for " << starts.size() << " windows";
  CheckHeads(means, means.dim(0), k.dim(1), k.dim(2));
  ctx.pool->For(means.dim(0), 64, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(static_cast<size_t>(width));
    for (int64_t w = begin; w < end; ++w) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t t = 0; t < windows.size; ++t) {
        const float* from = k.Row<float>(starts[static_cast<size_t>(w)] + t);
        for (int64_t c = 0; c < width; ++c) sum[static_cast<size_t>(c)] += from[c];
      }
      float* to = means.Row<float>(w);
      for (int64_t c = 0; c < width; ++c) {
        to[c] = static_cast<float>(sum[static_cast<size_t>(c)] / static_cast<double>(windows.size));
      }
    }
  });
}

}  // namespace

int64_t FineCount(const SparseAttentionConfig& config, int64_t n) {
  return WindowCount(n, config.kernel_size, config.kernel_stride);
}

int64_t CoarseCount(const SparseAttentionConfig& config, int64_t n) {
  return WindowCount(n, config.coarse_size(), config.coarse_stride());
}

std::string SparseConfigProblem(const SparseAttentionConfig& c) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  if (c.kernel_stride < 1) {
    return "kernel_stride is " + text(c.kernel_stride) + ", must be at least 1";
  }
  if (c.kernel_size != 2 * c.kernel_stride) {
    return "kernel_size is " + text(c.kernel_size) + ", must be twice kernel_stride (" +
           text(c.kernel_stride) + ")";
  }
  if (c.block_size < 1 || c.block_size % c.kernel_stride != 0) {
    return "block_size is " + text(c.block_size) +
           ", must be a positive multiple of kernel_stride (" + text(c.kernel_stride) + ")";
  }
  if (c.window_size < 0 || c.window_size % c.block_size != 0) {
    return "window_size is " + text(c.window_size) + ", must be a multiple of block_size (" +
           text(c.block_size) + ")";
  }
  if (c.init_blocks < 0) {
    return "init_blocks is " + text(c.init_blocks) + ", must not be negative";
  }
  if (c.dense_len < 0) {
    return "dense_len is " + text(c.dense_len) + ", must not be negative";
  }
  if (c.free_blocks() < 0) {
    return "topk is " + text(c.topk) + ", must be at least init_blocks + 1 (" +
           text(c.init_blocks + 1) +
           "): topk + window_size / block_size blocks must hold the initial blocks and the "
           "window_size / block_size + 1 local ones";
  }
  return "";
}

void CompressKeys(const Context& ctx, const ConstTensor& k,
                  std::span<const DocumentRange> documents, const SparseAttentionConfig& config,
                  const Tensor& fine, const Tensor& coarse) {
  if (ctx.cuda()) return Cuda(ctx).CompressKeys(ctx, k, documents, config, fine, coarse);
  SALA_CHECK(ctx.device == DeviceKind::kCpu) << "this form runs on the CPU";
  CheckHeads(k, k.dim(0), k.dim(1), k.dim(2));
  CheckDocuments(documents, k.dim(0));
  WindowMeans(ctx, k, documents, {config.kernel_size, config.kernel_stride}, fine);
  WindowMeans(ctx, k, documents, {config.coarse_size(), config.coarse_stride()}, coarse);
}

}  // namespace sala::kernels
