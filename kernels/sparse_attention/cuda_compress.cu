// Compressed keys on the GPU.
//
// A fine key is the mean of two groups of kernel_stride tokens, a coarse key that of eight: the
// groups are summed once, in float32 and in the order of their tokens, and the windows are sums of
// group sums. One thread block has kFine windows of one document and kColumns channels; it sums the
// groups of its windows and the seven after them that its last coarse window reaches into.
//
// Bound by memory: k is read once from memory (and another 7 / 16 of it from the L2 cache, for the
// groups that neighbours share), and 1 / kernel_stride + 1 / (4 kernel_stride) of it is written. A
// row of kColumns channels is one line of 128 bytes.
#include <vector>

#include "kernels/attention/block_attention.h"
#include "kernels/common/cuda_math.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int kFine = 16;                         // fine windows of a thread block
constexpr int kCoarse = kFine / 4;                // and coarse ones
constexpr int kGroups = kFine + 7;                // groups that they reach into
constexpr int kColumns = 64;                      // channels of a thread block
constexpr int kPacks = kColumns / 8;              // eight channels a thread
constexpr int kThreads = kPacks * (kGroups + 1);  // whole warps
static_assert(kThreads % kWarp == 0 && kPacks * (kFine + kCoarse) <= kThreads);

// A document that has compressed keys.
struct Pieces {
  int64_t begin;       // first token
  int64_t groups;      // whole groups
  int64_t first_fine;  // rows of the outputs
  int64_t first_coarse;
  int64_t first_block;  // its thread blocks begin here
};

struct CompressProblem {
  const Bf16* k;
  int64_t k_stride;
  int64_t width;  // key/value heads times channels
  Bf16* fine;
  int64_t fine_stride;
  Bf16* coarse;
  int64_t coarse_stride;
  const Pieces* documents;
  int64_t document_count;
  int64_t stride;  // kernel_stride
};

// The sum of `count` group sums, eight channels of each, as a mean of `tokens` tokens.
__device__ __forceinline__ void StoreMean(const float* groups, int count, float tokens, Bf16* to) {
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = groups[i];
  for (int g = 1; g < count; ++g) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += groups[g * kColumns + i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] /= tokens;
  Store8(to, sum);
}

__global__ void __launch_bounds__(kThreads) CompressKernel(CompressProblem p) {
  SharedMemory shared;
  float* sums = shared.Take<float>(kGroups * kColumns);
  // The last document that begins at or before this block.
  int64_t low = 0;
  int64_t high = p.document_count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.documents[middle].first_block <= int64_t{blockIdx.x}) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Pieces document = p.documents[low];
  const int64_t first = (int64_t{blockIdx.x} - document.first_block) * kFine;
  const int row = static_cast<int>(threadIdx.x) / kPacks;
  const int local = static_cast<int>(threadIdx.x) % kPacks * 8;
  const int64_t column = int64_t{blockIdx.y} * kColumns + local;
  const bool inside = column < p.width;

  if (inside && row < kGroups && first + row < document.groups) {
    const Bf16* from = p.k + (document.begin + (first + row) * p.stride) * p.k_stride + column;
    float sum[8] = {};
#pragma unroll 4
    for (int64_t t = 0; t < p.stride; ++t) {
      float x[8];
      Load8(from + t * p.k_stride, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += x[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[row * kColumns + local + i] = sum[i];
  }
  __syncthreads();
  if (!inside) return;
  if (row < kFine) {
    const int64_t j = first + row;
    if (j + 2 <= document.groups) {
      StoreMean(sums + row * kColumns + local, 2, static_cast<float>(2 * p.stride),
                p.fine + (document.first_fine + j) * p.fine_stride + column);
    }
  } else if (row < kFine + kCoarse) {
    const int c = row - kFine;
    const int64_t j = first / 4 + c;
    if (4 * j + 8 <= document.groups) {
      StoreMean(sums + 4 * c * kColumns + local, 8, static_cast<float>(8 * p.stride),
                p.coarse + (document.first_coarse + j) * p.coarse_stride + column);
    }
  }
}

void CheckRows(const ConstTensor& x, const char* name, int64_t rows, int64_t heads, int64_t d) {
  SALA_CHECK(x.rank() == 3 && x.dim(0) == rows && x.dim(1) == heads && x.dim(2) == d)
      << name << ": found " << ShapeText(x) << ", expected [" << rows << ", " << heads << ", " << d
      << "]";
  SALA_CHECK(d % 8 == 0 && x.stride(0) % 8 == 0 && (heads == 1 || x.stride(1) == d))
      << name << ": found " << ShapeText(x) << " with rows " << x.stride(0)
      << " elements apart, expected contiguous heads and multiples of 8 elements on a GPU";
}

}  // namespace

void cuda::CompressKeys(const Context& ctx, const ConstTensor& k,
                        std::span<const DocumentRange> documents,
                        const SparseAttentionConfig& config, const Tensor& fine,
                        const Tensor& coarse) {
  const Op op(ctx, "CompressKeys", k);
  const std::string problem = SparseConfigProblem(config);
  SALA_CHECK(problem.empty()) << problem;
  CheckDocuments(documents, k.dim(0));
  int64_t fine_count = 0;
  int64_t coarse_count = 0;
  int64_t blocks = 0;
  std::vector<Pieces> pieces;
  for (const DocumentRange& document : documents) {
    const int64_t count = FineCount(config, document.length());
    if (count == 0) continue;
    pieces.push_back({document.begin, document.length() / config.kernel_stride, fine_count,
                      coarse_count, blocks});
    fine_count += count;
    coarse_count += CoarseCount(config, document.length());
    blocks += CeilDiv(count, kFine);
  }
  CheckRows(k, "k", k.dim(0), k.dim(1), k.dim(2));
  CheckRows(fine, "fine", fine_count, k.dim(1), k.dim(2));
  CheckRows(coarse, "coarse", coarse_count, k.dim(1), k.dim(2));

  const ArenaScope scope(*ctx.scratch);
  CompressProblem p = {};
  p.k = op.Data<Bf16>(k);
  p.k_stride = k.stride(0);
  p.width = k.dim(1) * k.dim(2);
  p.fine = op.Data<Bf16>(fine);
  p.fine_stride = fine.stride(0);
  p.coarse = op.Data<Bf16>(coarse);
  p.coarse_stride = coarse.stride(0);
  p.document_count = static_cast<int64_t>(pieces.size());
  p.documents = UploadScratch(ctx, pieces.data(), p.document_count);
  p.stride = config.kernel_stride;
  op.Launch(CompressKernel,
            dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(CeilDiv(p.width, kColumns))),
            dim3(kThreads), SharedBytes<float>(kGroups * kColumns), p);
}

}  // namespace sala::kernels
