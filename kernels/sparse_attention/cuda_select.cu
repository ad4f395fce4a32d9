// Block selection on the GPU: compressed keys, then one kernel that never writes a score to memory.
//
// A thread block has 16 consecutive tokens of one document under one key/value head, a warp two of
// them: 32 rows of query heads (16 a token, the last ones empty where the group is smaller), whose
// fragments stay in registers. All warps go over the same tiles of 64 compressed keys, which come
// through a ring of three stages in shared memory.
//   Coarse keys   maximum and sum of exponentials of every row -> log-sum-exp (base 2).
//   Fine keys     exp2(score - log-sum-exp), limited to e^80, summed over the rows of a token in a
//                 fixed tree, 0 where the token does not see the key. A block's score is the
//                 largest of the keys that touch it; it stays in shared memory as the bits of the
//                 float32, which order as the numbers do because none is negative.
//   Best blocks   each time a slice of blocks is scored, a warp finds the free-th largest key of
//                 (best so far, slice) two bits at a time from the top, and keeps what lies above
//                 it and the first of those equal to it. The best so far come first and all lists
//                 ascend, so a tie goes to the lower block and slices of any size give the same
//                 blocks. As many blocks as the shared memory holds make a slice.
// A row's bits depend on its own document up to its token only: tiles of keys follow
// document-relative positions, and nothing is added up over the tokens of a tile.
//
// Bound by the tensor cores: per token and key/value head at position t, 16 rows times
// 1.25 t / kernel_stride keys times 2 D operations. At D = 128 a tile of keys costs a warp 128 mma
// (205 clocks of a multiprocessor at an estimated 1280 multiply-adds a clock), 32 ldmatrix.x4 (128
// clocks; a fragment of keys serves two tokens), 64 ex2 a lane (128 clocks) and 28 shuffles.
// Smaller head sizes are bound by the exponentials, smaller groups compute rows for nothing. Keys
// come from the L2 cache at 16 operations a byte and token: 16 tokens and 600 TFLOP/s are 2.4 TB/s.
// Two thread blocks of 8 warps share a multiprocessor: one scores while the other waits at a
// barrier or keeps its best, which costs as much as a dozen tiles for a slice of a thousand blocks.
// Work grows with the position, so tiles at the highest positions of all documents start first;
// tokens whose past fits the budget only write their list.
#include <numeric>
#include <vector>

#include "kernels/attention/block_attention.h"
#include "kernels/cuda_kernels.h"
#include "kernels/sparse_attention/cuda_select_scores.h"

namespace sala::kernels {
namespace {

using namespace selection;  // NOLINT(google-build-using-namespace)

// The best blocks of a token so far, in shared memory: their keys, and the blocks in rising order.
struct List {
  uint32_t* keys;
  int32_t* ids;
};

// Brings a list of `kept` blocks to include [first, first + count), whose keys are slice[0, count);
// returns the new length. A warp calls this together, between barriers of the warp.
__device__ __forceinline__ int KeepBest(const SelectProblem& p, const List& list, int kept,
                                        const uint32_t* slice, int first, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int total = kept + count;
  const auto key_at = [&](int i) { return i < kept ? list.keys[i] : slice[i - kept]; };

  // All keys from `threshold` on are kept; of those equal to it only the first `ties`.
  uint32_t threshold = 0;
  int ties = total;
  if (total > p.free) {
    uint32_t smallest = ~0U;
    uint32_t largest = 0;
#pragma unroll 1
    for (int i = lane; i < total; i += kWarp) {
      const uint32_t key = key_at(i);
      smallest = min(smallest, key);
      largest = max(largest, key);
    }
    smallest = __reduce_min_sync(kFullMask, smallest);
    largest = __reduce_max_sync(kFullMask, largest);
    // The threshold has the bits that all keys share; the others are found two at a time: the
    // largest number that at least `free` keys reach.
    threshold = smallest;
    bool exact = false;
    if (smallest != largest) {
      int shift = (31 - __clz(static_cast<int>(smallest ^ largest))) / 2 * 2;
      threshold = shift == 30 ? 0U : largest & ~((4U << shift) - 1U);
      for (; shift >= 0 && !exact; shift -= 2) {
        const uint32_t step = 1U << shift;
        unsigned reach[3] = {};
#pragma unroll 2
        for (int i = lane; i < total; i += kWarp) {
          const uint32_t key = key_at(i);
#pragma unroll
          for (int d = 0; d < 3; ++d) {
            reach[d] += key >= threshold + static_cast<uint32_t>(d + 1) * step ? 1U : 0U;
          }
        }
        uint32_t digit = 0;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
          const auto all = static_cast<int>(__reduce_add_sync(kFullMask, reach[d]));
          if (all >= p.free) digit = static_cast<uint32_t>(d + 1);
          exact = exact || all == p.free;
        }
        threshold += digit * step;
      }
    }
    if (!exact) {
      unsigned above = 0;
#pragma unroll 1
      for (int i = lane; i < total; i += kWarp) above += key_at(i) > threshold ? 1U : 0U;
      ties = p.free - static_cast<int>(__reduce_add_sync(kFullMask, above));
    }
  }

  // In order; what is written lies at or before what has been read.
  const unsigned below = (1U << lane) - 1U;
  int written = 0;
  int equals = 0;
  for (int begin = 0; begin < total; begin += kWarp) {
    const int i = begin + lane;
    const uint32_t key = i < total ? key_at(i) : 0U;
    const int32_t id = i < kept ? list.ids[i] : first + i - kept;
    const bool equal = i < total && key == threshold;
    const unsigned equal_lanes = __ballot_sync(kFullMask, equal ? 1 : 0);
    const bool take =
        i < total && (key > threshold || (equal && equals + __popc(equal_lanes & below) < ties));
    const unsigned taken = __ballot_sync(kFullMask, take ? 1 : 0);
    __syncwarp();
    if (take) {
      const int to = written + __popc(taken & below);
      list.keys[to] = key;
      list.ids[to] = id;
    }
    equals += __popc(equal_lanes);
    written += __popc(taken);
  }
  __syncwarp();
  return written;
}

// All candidates of a token fit: they are its list.
__device__ __forceinline__ void TakeAll(const SelectProblem& p, int t, int32_t* chosen) {
  const int last = LastCandidate(p, t);
  const int first = FirstCandidate(p, last);
  for (int f = static_cast<int>(threadIdx.x) % kWarp; f < p.width; f += kWarp) {
    chosen[f] = first + f < last && f < p.free ? first + f : kNoBlock;
  }
}

template <int kD>
__global__ void __launch_bounds__(kThreads, 2) SelectKernel(SelectProblem p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int token = static_cast<int>(threadIdx.x) / kWarp * 2;  // the warp's first in the tile
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.heads));
  const Tile tile = FindTile(p, blockIdx.x / static_cast<unsigned>(p.heads));
  const auto list_of = [&](int i) {
    return p.blocks + (tile.document->begin + tile.first + token + i) * p.blocks_stride +
           int64_t{head} * p.width;
  };

  const int last_token = tile.first + tile.count - 1;
  const int candidates = LastCandidate(p, last_token);  // of the last token: no other has more
  if (candidates - FirstCandidate(p, candidates) <= p.free || p.free == 0) {
    for (int i = 0; i < 2 && token + i < tile.count; ++i) {
      TakeAll(p, tile.first + token + i, list_of(i));
    }
    return;
  }

  SharedMemory shared;
  Bf16* ring = shared.Take<Bf16>(kStages * kKeys * kD);
  float* strips = shared.Take<float>(kTokens * kStrip);
  uint32_t* best = shared.Take<uint32_t>(kTokens * p.width);
  int32_t* best_ids = shared.Take<int32_t>(kTokens * p.width);
  uint32_t* slices = shared.Take<uint32_t>(kTokens * p.slice);

  const Queries<kD> queries = LoadQueries<kD>(p, tile, head, token);
  float normaliser[2][2];
  Normalisers<kD>(p, tile, head, token, queries, ring, normaliser);

  float* strip = strips + token * kStrip;
  uint32_t* slice = slices + token * p.slice;
  // Where this lane's relevance goes, and where its token's visible keys end, seen from its key.
  const int lane_key = lane / 8 % 2 * 8 + lane % 4 * 2 + lane / 4 % 2;
  float* lane_strip = strip + lane / 16 * kStrip + 1 + lane_key;
  const int lane_limit = (token + lane / 16 < tile.count
                              ? VisibleWindows(tile.first + token + lane / 16, p.kernel_stride)
                              : 0) -
                         lane_key;
  if (lane < 2) strip[lane * kStrip] = 0.0F;  // there is no key before the first

  int kept_first = 0;  // lengths of the lists of the warp's two tokens
  int kept_second = 0;
  int slice_begin = 0;  // its first block
  const int end = candidates * p.per_block;
  const int rows = min(end, VisibleWindows(last_token, p.kernel_stride));
  const Bf16* keys = p.fine + tile.document->first_fine * p.key_stride + int64_t{head} * kD;
  ForEachKeyTile<kD>(keys, p.key_stride, end, rows, ring, [&](int first, Bf16* shared_keys) {
#pragma unroll 1
    for (int chunk = 0; chunk < kKeys; chunk += kChunk) {
      float s[2][2][4];
      Products<kD>(queries, shared_keys, chunk, s);
      const float relevance = SumOfRows(p, s, normaliser);
      lane_strip[chunk] = first + chunk < lane_limit ? relevance : 0.0F;
    }
    __syncwarp();
    // Blocks that have keys of this tile. Block b is touched by the keys from per_block * b - 1 on.
    const int tile_end = min(first + kKeys, end);
    const int first_block = first / p.per_block;
    const int count = (tile_end - 1) / p.per_block + 1 - first_block;
    for (int i = lane; i < 2 * count; i += kWarp) {
      const int which = i >= count ? 1 : 0;
      const int block = first_block + i - which * count;
      const int begin = block * p.per_block;
      const float* relevance = strip + which * kStrip + 1 - first;
      uint32_t* score = slice + which * p.slice + block - slice_begin;
      float largest = begin < first ? __uint_as_float(*score) : 0.0F;
      for (int j = max(begin - 1, first - 1); j < min(begin + p.per_block, tile_end); ++j) {
        largest = fmaxf(largest, relevance[j]);
      }
      *score = __float_as_uint(largest);
    }
    const float carry = lane < 2 ? strip[lane * kStrip + kKeys] : 0.0F;
    __syncwarp();
    if (lane < 2) strip[lane * kStrip] = carry;

    const int slice_end = slice_begin + p.slice;
    if (tile_end == end || tile_end == slice_end * p.per_block) {
#pragma unroll 1
      for (int i = 0; i < 2 && token + i < tile.count; ++i) {
        const int last = LastCandidate(p, tile.first + token + i);
        const int from = max(slice_begin, FirstCandidate(p, last));
        const int to = min(slice_end, last);
        if (from >= to) continue;
        const List list = {best + (token + i) * p.width, best_ids + (token + i) * p.width};
        const int now = KeepBest(p, list, i == 0 ? kept_first : kept_second,
                                 slice + i * p.slice + from - slice_begin, from, to - from);
        if (i == 0) {
          kept_first = now;
        } else {
          kept_second = now;
        }
      }
      slice_begin = slice_end;
    }
  });

  for (int i = 0; i < 2 && token + i < tile.count; ++i) {
    int32_t* chosen = list_of(i);
    for (int f = lane; f < p.width; f += kWarp) {
      chosen[f] =
          f < (i == 0 ? kept_first : kept_second) ? best_ids[(token + i) * p.width + f] : kNoBlock;
    }
  }
}

void CheckHeadRows(const ConstTensor& x, const char* name) {
  SALA_CHECK(x.rank() == 3 && x.stride(0) % 8 == 0 && (x.dim(1) == 1 || x.stride(1) == x.dim(2)))
      << name << ": found " << ShapeText(x) << " with rows " << x.stride(0)
      << " elements apart, expected contiguous heads and multiples of 8 elements on a GPU";
}

// The documents, that with the most queries first, and where their tiles begin. F(i) = sum over
// documents of max(0, tiles - i) tiles have index i or more. Between the lengths of two neighbours
// in the order F is linear, so the tile of a number follows from the last document with F(tiles) <=
// number.
std::vector<Document> SortDocuments(std::span<const DocumentRange> documents, int64_t first_query,
                                    const SparseAttentionConfig& config, int64_t* tiles) {
  std::vector<Document> sorted;
  int64_t fine = 0;
  int64_t coarse = 0;
  for (const DocumentRange& document : documents) {
    const int64_t n = document.length();
    sorted.push_back(
        {document.begin, n, fine, coarse, 0, std::max<int64_t>(0, first_query - document.begin)});
    fine += FineCount(config, n);
    coarse += CoarseCount(config, n);
  }
  const auto queries = [](const Document& x) { return x.length - x.first_query; };
  std::stable_sort(sorted.begin(), sorted.end(), [&queries](const Document& a, const Document& b) {
    return queries(a) > queries(b);
  });
  *tiles = 0;
  int64_t count = 0;
  for (Document& document : sorted) {
    const int64_t own = CeilDiv(queries(document), kTokens);
    *tiles += own;
    document.before = *tiles - ++count * own;
  }
  return sorted;
}

// Shared memory of the kernel with slices of `slice` blocks.
size_t SelectSharedBytes(int64_t d, int64_t width, int64_t slice) {
  return SharedBytes<Bf16>(kStages * kKeys * d) + SharedBytes<float>(kTokens * kStrip) +
         SharedBytes<uint32_t>(kTokens * width) + SharedBytes<int32_t>(kTokens * width) +
         SharedBytes<uint32_t>(kTokens * slice);
}

// Blocks of a slice: all `candidates`, or what fits. Where the device has shared memory for it, two
// thread blocks of this size run side by side (each costs another KiB).
int64_t SliceBlocks(const Op& op, const SparseAttentionConfig& config, int64_t d, int64_t width,
                    int64_t candidates) {
  // Slices end where tiles of keys end.
  const int64_t unit = kKeys / std::gcd(int64_t{kKeys}, config.block_size / config.kernel_stride);
  const size_t most = op.device().info().shared_bytes_per_block;
  const size_t half = (most + 1024) / 2 - 1024;
  const size_t least = SelectSharedBytes(d, width, unit);
  SALA_CHECK(least <= most) << "selecting " << width << " free blocks with head_dim " << d
                            << " needs " << least << " bytes of shared memory, the device has "
                            << most;
  // Slices much smaller than this would spend more time on keeping the best than on scoring.
  const size_t comfortable = SelectSharedBytes(d, width, std::max<int64_t>(unit, 256));
  const size_t room = comfortable <= half ? half : most;
  int64_t slice = CeilDiv(std::max<int64_t>(candidates, 1), unit) * unit;
  if (config.selection_slice > 0) {
    slice = std::min(slice, CeilDiv(config.selection_slice, unit) * unit);
  }
  while (SelectSharedBytes(d, width, slice) > room) slice -= unit;
  return slice;
}

using SelectFunction = void (*)(SelectProblem);

SelectFunction SelectKernelOf(int64_t d) {
  switch (d) {
    case 16:
      return SelectKernel<16>;
    case 32:
      return SelectKernel<32>;
    case 64:
      return SelectKernel<64>;
    case 128:
      return SelectKernel<128>;
    default:
      SALA_CHECK(false) << "head_dim is " << d << ", must be 16, 32, 64 or 128 on a GPU";
      return nullptr;
  }
}

}  // namespace

void cuda::SelectBlocks(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                        std::span<const DocumentRange> documents,
                        const SparseAttentionConfig& config, float scale, const Tensor& blocks,
                        int64_t first_query) {
  const Op op(ctx, "SelectBlocks", q);
  const std::string problem = SparseConfigProblem(config);
  SALA_CHECK(problem.empty()) << problem;
  CheckHeadRows(q, "q");
  CheckHeadRows(k, "k");
  CheckDocuments(documents, k.dim(0));
  const int64_t heads = k.dim(1);
  const int64_t d = k.dim(2);
  const int64_t group = q.dim(1) / heads;
  const int64_t width = std::max<int64_t>(1, config.free_blocks());
  CheckQueries(first_query, q.dim(0), k.dim(0));
  SALA_CHECK(q.dim(2) == d && q.dim(1) == heads * group)
      << "q " << ShapeText(q) << " does not go with k " << ShapeText(k);
  SALA_CHECK(group <= kRows) << "found " << group
                             << " query heads per key/value head, expected at most " << kRows;
  SALA_CHECK(blocks.rank() == 3 && blocks.dim(0) == q.dim(0) && blocks.dim(1) == heads &&
             blocks.dim(2) == width && blocks.stride(1) == width)
      << "blocks: found " << ShapeText(blocks) << ", expected [" << q.dim(0) << ", " << heads
      << ", " << width << "]";

  const ArenaScope scope(*ctx.scratch);
  // The documents that have queries, up to the last of these: no query sees a key behind it.
  std::vector<DocumentRange> seen;
  int64_t fine_count = 0;
  int64_t coarse_count = 0;
  int64_t longest = 0;
  for (const DocumentRange& whole : documents) {
    const DocumentRange queries = PartOf(whole, first_query, q.dim(0));
    if (queries.length() == 0) continue;
    const DocumentRange document = {whole.begin, whole.begin + queries.end};
    seen.push_back(document);
    fine_count += FineCount(config, document.length());
    coarse_count += CoarseCount(config, document.length());
    longest = std::max(longest, document.length());
  }
  SALA_CHECK(longest < int64_t{1} << 31) << "a document of " << longest << " tokens is too long";
  const int64_t own = (std::max<int64_t>(1, longest) - 1) / config.block_size;
  const int64_t candidates = own - config.window_size / config.block_size;
  int64_t tiles = 0;
  const std::vector<Document> sorted = SortDocuments(seen, first_query, config, &tiles);

  SelectProblem p = {};
  // Where every past fits the budget nothing is scored.
  if (candidates - config.init_blocks > config.free_blocks() && config.free_blocks() > 0) {
    const Tensor fine = ctx.scratch->New(DType::kBF16, {fine_count, heads, d});
    const Tensor coarse = ctx.scratch->New(DType::kBF16, {coarse_count, heads, d});
    cuda::CompressKeys(ctx, k, seen, config, fine, coarse);
    p.fine = op.Data<Bf16>(fine);
    p.coarse = op.Data<Bf16>(coarse);
    p.slice = static_cast<int>(SliceBlocks(op, config, d, width, candidates));
  }
  p.q = DataFromToken<Bf16>(op, q, first_query);
  p.q_stride = q.stride(0);
  p.key_stride = heads * d;
  p.document_count = static_cast<int64_t>(sorted.size());
  p.documents = UploadScratch(ctx, sorted.data(), p.document_count);
  p.blocks = DataFromToken<int32_t>(op, blocks, first_query);
  p.blocks_stride = blocks.stride(0);
  p.heads = static_cast<int>(heads);
  p.group = static_cast<int>(group);
  p.scale = scale * kLog2E;
  p.kernel_stride = static_cast<int>(config.kernel_stride);
  p.block_size = static_cast<int>(config.block_size);
  p.per_block = static_cast<int>(config.block_size / config.kernel_stride);
  p.init_blocks = static_cast<int>(config.init_blocks);
  p.window_blocks = static_cast<int>(config.window_size / config.block_size);
  p.free = static_cast<int>(config.free_blocks());
  p.width = static_cast<int>(width);
  op.Launch(SelectKernelOf(d), dim3(static_cast<unsigned>(tiles * heads)), dim3(kThreads),
            p.slice > 0 ? SelectSharedBytes(d, width, p.slice) : 0, p);
}

}  // namespace sala::kernels
