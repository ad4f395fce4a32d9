// The inverse index in five steps (all memory or latency bound, about a hundredth of the backward
// pass): count the choices of each block by segments of 1,024 queries; turn the counts of a block
// into places inside its list; turn the lengths of the lists into places of the lists; write each
// segment's tokens in order; cut the sequences of all blocks into pieces, longest first.
#include "kernels/sparse_attention/cuda_index.h"

namespace sala::kernels {
namespace {

using namespace tile;  // NOLINT(google-build-using-namespace)

constexpr int kSegment = 1024;  // tokens
constexpr int kPiece = 8192;    // tokens
constexpr int kLengths = 8;     // classes of pieces shorter than a whole one
constexpr int kScanThreads = 1024;

struct IndexDocument {
  int64_t begin = 0;   // first token
  int64_t counts = 0;  // counts [K, segments, blocks] start here
  int64_t block = 0;   // its first block among those of all documents
  int32_t n = 0;
  int32_t blocks = 0;
  int32_t segments = 0;
  int32_t first_query = 0;  // tokens first_query .. last_query - 1 are the queries
  int32_t last_query = 0;
  int32_t unused = 0;
};

// A segment or a block of a document.
struct IndexPart {
  int32_t document = 0;
  int32_t index = 0;
};

struct Index {
  const IndexDocument* documents = nullptr;
  const IndexPart* segments = nullptr;
  const IndexPart* blocks = nullptr;
  int64_t first_query = 0;  // of all documents
  int64_t queries = 0;      // Tq
  int64_t block_count = 0;
  int kv_heads = 1;
  SparseShape shape;
  ChosenBlocks chosen;
  int32_t* counts = nullptr;
  int32_t* totals = nullptr;  // [K, blocks of all documents]: length of the list
  int32_t* starts = nullptr;  // the same: place of the list among those of document and head
  int32_t* slots = nullptr;   // the same: first slot of a block in pieces, -1 for others
  int32_t* lists = nullptr;   // [K, Tq, width]
};

__device__ __forceinline__ int32_t* CountsOf(const Index& x, const IndexDocument& document,
                                             int64_t head, int64_t segment) {
  return x.counts + document.counts + (head * document.segments + segment) * document.blocks;
}

__device__ __forceinline__ int64_t ListsOf(const Index& x, const IndexDocument& document,
                                           int64_t head) {
  const int64_t row = document.begin + document.first_query - x.first_query;
  return (head * x.queries + row) * x.shape.width;
}

// The block in a slot of a token's list, -1 for none.
__device__ __forceinline__ int ChosenAt(const Index& x, const IndexDocument& document, int64_t head,
                                        int token, int slot) {
  const int b =
      x.chosen.data[(document.begin + token) * x.chosen.stride + head * x.shape.width + slot];
  const Candidates candidates = CandidatesOf(x.shape, token / x.shape.block);
  return candidates.first <= b && b < candidates.last ? b : -1;
}

// A block for each segment and head. Integer sums do not depend on the order.
__global__ void __launch_bounds__(kThreads) CountKernel(Index x) {
  const IndexPart part = x.segments[blockIdx.x / x.kv_heads];
  const int64_t head = blockIdx.x % x.kv_heads;
  const IndexDocument document = x.documents[part.document];
  int32_t* counts = CountsOf(x, document, head, part.index);
  const int first = document.first_query + part.index * kSegment;
  const int tokens = min(kSegment, document.last_query - first);
  for (int i = static_cast<int>(threadIdx.x); i < tokens * x.shape.width; i += kThreads) {
    const int b = ChosenAt(x, document, head, first + i / x.shape.width, i % x.shape.width);
    if (b >= 0) atomicAdd(&counts[b], 1);
  }
}

// A thread for each block and head: counts become sums over the segments before.
__global__ void __launch_bounds__(kThreads) SegmentSumKernel(Index x) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= x.block_count * x.kv_heads) return;
  const IndexPart part = x.blocks[i % x.block_count];
  const IndexDocument document = x.documents[part.document];
  int32_t* count = CountsOf(x, document, i / x.block_count, 0) + part.index;
  int32_t sum = 0;
  for (int segment = 0; segment < document.segments; ++segment, count += document.blocks) {
    const int32_t here = *count;
    *count = sum;
    sum += here;
  }
  x.totals[i] = sum;
}

// The sum of `value` over the threads before this one, and over all: total. All threads of the
// block call this together; `sums` takes a number for each warp.
__device__ __forceinline__ int32_t ScanBlock(int32_t value, int32_t* sums, int32_t& total) {
  const int lane = Lane();
  int32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t before = __shfl_up_sync(kFullMask, sum, offset);
    if (lane >= offset) sum += before;
  }
  __syncthreads();  // sums may still be read from the call before
  if (lane == kWarp - 1) sums[WarpIndex()] = sum;
  __syncthreads();
  int32_t place = sum - value;
  total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w < WarpIndex()) place += sums[w];
    total += sums[w];
  }
  return place;
}

// A block for each document and head: where the lists start.
__global__ void __launch_bounds__(kThreads) ListStartKernel(Index x) {
  SharedMemory shared;
  auto* sums = shared.Take<int32_t>(kThreads / kWarp);
  const IndexDocument document = x.documents[blockIdx.x / x.kv_heads];
  const int64_t first = blockIdx.x % x.kv_heads * x.block_count + document.block;
  int32_t start = 0;
  for (int b = 0; b < document.blocks; b += kThreads) {  // the same on all threads
    const int mine = b + static_cast<int>(threadIdx.x);
    const int32_t length = mine < document.blocks ? x.totals[first + mine] : 0;
    int32_t total = 0;
    const int32_t place = ScanBlock(length, sums, total);
    if (mine < document.blocks) x.starts[first + mine] = start + place;
    start += total;
  }
}

// A warp for each segment and head writes the segment's tokens one after the other; the blocks of
// one token differ, so its lanes never meet.
__global__ void __launch_bounds__(kWarp) FillKernel(Index x) {
  const IndexPart part = x.segments[blockIdx.x / x.kv_heads];
  const int64_t head = blockIdx.x % x.kv_heads;
  const IndexDocument document = x.documents[part.document];
  int32_t* places = CountsOf(x, document, head, part.index);
  const int32_t* starts = x.starts + head * x.block_count + document.block;
  int32_t* lists = x.lists + ListsOf(x, document, head);
  const int first = document.first_query + part.index * kSegment;
  const int last = min(first + kSegment, document.last_query);
  for (int token = first; token < last; ++token) {
    for (int slot = Lane(); slot < x.shape.width; slot += kWarp) {
      const int b = ChosenAt(x, document, head, token, slot);
      if (b >= 0) lists[starts[b] + places[b]++] = token;
    }
    __syncwarp();
  }
}

// The queries that attend to a block: a run, then the list. Counted from the block's first token,
// the run is [begin, run).
struct Sequence {
  int32_t begin;
  int32_t run;
  int32_t length;  // with the list
};
__device__ __forceinline__ Sequence SequenceOf(const Index& x, const IndexDocument& document,
                                               int block, int32_t listed) {
  const int key = block * x.shape.block;
  int64_t end = document.last_query;
  if (block >= x.shape.init) end = min(end, (int64_t{block} + x.shape.local) * x.shape.block);
  const int run = max(0, static_cast<int>(end - key));
  const int begin = min(max(0, document.first_query - key), run);
  return {begin, run, run - begin + listed};
}
// An empty sequence is one piece: its zeros must be written.
__device__ __forceinline__ int PiecesOf(const Sequence& sequence) {
  return max(1, (sequence.length + kPiece - 1) / kPiece);
}

// One block of threads: the list of pieces of all blocks and heads, whole ones first, then by
// length, and the sums of those in pieces.
__global__ void __launch_bounds__(kScanThreads)
    PieceKernel(Index x, KeyTile* tiles, KeySum* key_sums, int32_t* counts) {
  SharedMemory shared;
  auto* sums = shared.Take<int32_t>(kScanThreads / kWarp);
  const int64_t items = x.block_count * x.kv_heads;
  const auto item_of = [&x](int64_t i, int64_t& entry) {
    entry = i % x.kv_heads * x.block_count + i / x.kv_heads;  // heads of a block together
    return x.blocks[i / x.kv_heads];
  };
  int32_t slots = 0;
  int32_t sum_count = 0;
  for (int64_t base = 0; base < items; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    int64_t entry = 0;
    IndexPart part;
    int32_t pieces = 0;
    if (i < items) {
      part = item_of(i, entry);
      pieces = PiecesOf(SequenceOf(x, x.documents[part.document], part.index, x.totals[entry]));
    }
    int32_t slot_total = 0;
    int32_t sum_total = 0;
    const int32_t slot = slots + ScanBlock(pieces > 1 ? pieces : 0, sums, slot_total);
    const int32_t place = sum_count + ScanBlock(pieces > 1 ? 1 : 0, sums, sum_total);
    if (i < items) x.slots[entry] = pieces > 1 ? slot : -1;
    if (pieces > 1) {
      const IndexDocument& document = x.documents[part.document];
      KeySum sum;
      sum.document = document.begin;
      sum.n = document.n;
      sum.key = part.index * x.shape.block;
      sum.head = static_cast<int32_t>(i % x.kv_heads);
      sum.slot = slot;
      sum.count = pieces;
      key_sums[place] = sum;
    }
    slots += slot_total;
    sum_count += sum_total;
  }
  __syncthreads();  // the slots are read by other threads
  int32_t tile_count = 0;
  for (int length_class = kLengths; length_class >= 0; --length_class) {
    for (int64_t base = 0; base < items; base += blockDim.x) {
      const int64_t i = base + threadIdx.x;
      int64_t entry = 0;
      IndexPart part;
      Sequence sequence = {0, 0, 0};
      int32_t pieces = 0;
      if (i < items) {
        part = item_of(i, entry);
        sequence = SequenceOf(x, x.documents[part.document], part.index, x.totals[entry]);
        pieces = PiecesOf(sequence);
      }
      const int32_t whole = sequence.length / kPiece;
      const int32_t rest = sequence.length % kPiece;
      const bool rest_here = pieces > whole && rest / (kPiece / kLengths) == length_class;
      const int32_t mine = length_class == kLengths ? whole : rest_here ? 1 : 0;
      int32_t total = 0;
      int32_t place = tile_count + ScanBlock(mine, sums, total);
      tile_count += total;
      if (mine == 0) continue;  // of this thread; the next barrier is in the next round
      const IndexDocument& document = x.documents[part.document];
      KeyTile tile;
      tile.document = document.begin;
      tile.n = document.n;
      tile.key = part.index * x.shape.block;
      tile.head = static_cast<int32_t>(i % x.kv_heads);
      tile.list = ListsOf(x, document, tile.head) + x.starts[entry];
      tile.run = sequence.run;
      const int32_t last = sequence.begin + sequence.length;
      const int32_t slot = x.slots[entry];
      for (int32_t piece = length_class == kLengths ? 0 : whole, end = piece + mine; piece < end;
           ++piece) {
        tile.first = sequence.begin + piece * kPiece;
        tile.last = min(tile.first + kPiece, last);
        tile.slot = slot < 0 ? -1 : slot + piece;
        tiles[place++] = tile;
      }
    }
  }
  if (threadIdx.x == 0) {
    counts[0] = tile_count;
    counts[1] = sum_count;
  }
}

// At most how many pieces the blocks of a document with n tokens make, per head: all of them, and
// those of blocks in more than one. Every query attends to at most `total` blocks.
struct Bounds {
  int64_t pieces = 0;
  int64_t slots = 0;
};
Bounds BoundsOf(int64_t n, int64_t queries, int64_t block, int64_t total) {
  Bounds all;  // by what could attend to each block
  for (int64_t key = 0; key < n; key += block) {
    const int64_t pieces = std::max<int64_t>(1, CeilDiv(std::min(queries, n - key), kPiece));
    all.pieces += pieces;
    if (pieces > 1) all.slots += pieces;
  }
  // By what all queries attend to together: ceil(x) <= floor(x) + 1, and <= 2 x for x > 1.
  const int64_t seen = queries * total;
  return {std::min(all.pieces, CeilDiv(n, block) + seen / kPiece),
          std::min(all.slots, 2 * seen / kPiece)};
}

}  // namespace

KeyWork tile::BuildKeyWork(const Context& ctx, const Op& op,
                           std::span<const DocumentRange> documents,
                           const SparseAttentionConfig& config, const SparseShape& shape,
                           int kv_heads, const ConstTensor& blocks, int64_t first_query) {
  std::vector<IndexDocument> all;
  std::vector<IndexPart> segments;
  std::vector<IndexPart> parts;
  int64_t counts = 0;
  KeyWork work;
  for (const DocumentRange& range : documents) {
    const auto index = static_cast<int32_t>(all.size());
    const DocumentRange queries = PartOf(range, first_query, blocks.dim(0));
    IndexDocument document;
    document.begin = range.begin;
    document.n = static_cast<int32_t>(range.length());
    document.blocks = static_cast<int32_t>(CeilDiv(range.length(), shape.block));
    document.segments = static_cast<int32_t>(CeilDiv(queries.length(), kSegment));
    document.first_query = static_cast<int32_t>(queries.begin);
    document.last_query = static_cast<int32_t>(queries.end);
    document.counts = counts;
    document.block = static_cast<int64_t>(parts.size());
    SALA_CHECK(queries.length() * shape.width < int64_t{1} << 31)
        << "a document of " << queries.length() << " queries with " << shape.width
        << " free blocks each, expected fewer than 2^31 choices";
    all.push_back(document);
    for (int32_t i = 0; i < document.segments; ++i) segments.push_back({index, i});
    for (int32_t i = 0; i < document.blocks; ++i) parts.push_back({index, i});
    counts += int64_t{kv_heads} * document.segments * document.blocks;
    const Bounds bounds =
        BoundsOf(range.length(), queries.length(), shape.block, config.total_blocks());
    work.most_tiles += bounds.pieces * kv_heads;
    work.slots += bounds.slots * kv_heads;
  }
  work.most_sums = work.slots / 2;

  const auto integers = [&ctx](int64_t n) {
    return ctx.scratch->New(DType::kI32, {std::max<int64_t>(1, n)}).Data<int32_t>();
  };
  Index x;
  x.documents = UploadScratch(ctx, all.data(), static_cast<int64_t>(all.size()));
  x.segments = UploadScratch(ctx, segments.data(), static_cast<int64_t>(segments.size()));
  x.blocks = UploadScratch(ctx, parts.data(), static_cast<int64_t>(parts.size()));
  x.first_query = first_query;
  x.queries = blocks.dim(0);
  x.block_count = static_cast<int64_t>(parts.size());
  x.kv_heads = kv_heads;
  x.shape = shape;
  x.chosen = ChosenBlocksOf(op, blocks, first_query);
  const int64_t entries = x.block_count * kv_heads;
  x.counts = integers(counts);
  x.totals = integers(entries);
  x.starts = integers(entries);
  x.slots = integers(entries);
  x.lists = integers(x.queries * kv_heads * shape.width);
  auto* tiles = static_cast<KeyTile*>(
      ctx.scratch->Allocate(static_cast<size_t>(work.most_tiles + 1) * sizeof(KeyTile)));
  auto* key_sums = static_cast<KeySum*>(
      ctx.scratch->Allocate(static_cast<size_t>(work.most_sums + 1) * sizeof(KeySum)));
  int32_t* work_counts = integers(2);
  work.tiles = tiles;
  work.sums = key_sums;
  work.counts = work_counts;
  work.lists = x.lists;
  work.block_size = shape.block;
  if (entries == 0) return work;

  ctx.gpu->Zero(x.counts, static_cast<size_t>(counts) * sizeof(int32_t));
  const auto segment_blocks = static_cast<int64_t>(segments.size()) * kv_heads;
  op.Launch(CountKernel, dim3(Blocks(segment_blocks)), dim3(kThreads), 0, x);
  op.Launch(SegmentSumKernel, dim3(Blocks(CeilDiv(entries, kThreads))), dim3(kThreads), 0, x);
  op.Launch(ListStartKernel, dim3(Blocks(static_cast<int64_t>(all.size()) * kv_heads)),
            dim3(kThreads), SharedBytes<int32_t>(kThreads / kWarp), x);
  op.Launch(FillKernel, dim3(Blocks(segment_blocks)), dim3(kWarp), 0, x);
  const int64_t scan_threads = std::min<int64_t>(kScanThreads, CeilDiv(entries, kWarp) * kWarp);
  op.Launch(PieceKernel, dim3(1), dim3(static_cast<unsigned>(scan_threads)),
            SharedBytes<int32_t>(kScanThreads / kWarp), x, tiles, key_sums, work_counts);
  return work;
}

}  // namespace sala::kernels
