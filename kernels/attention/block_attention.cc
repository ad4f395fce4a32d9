#include "kernels/attention/block_attention.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <vector>

#include "core/elementary.h"
#include "kernels/attention/tile_math.h"
#include "kernels/gemm/serial.h"

namespace sala::kernels {
namespace {

// Rows of a tile: enough for the matrix products to run at speed, few enough for the tile to stay
// in the L2 cache.
constexpr int64_t kTileRows = 256;

struct Sizes {
  explicit Sizes(const BlockAttention& problem)
      : heads(problem.k.dim(1)),
        group(problem.q.dim(1) / std::max<int64_t>(1, heads)),
        d(problem.q.dim(2)),
        block(problem.block_size),
        rows(TileTokens(block, group) * group) {}

  int64_t heads;
  int64_t group;
  int64_t d;
  int64_t block;
  int64_t rows;  // the most of a tile
};

void CheckProblem(const Context& ctx, const BlockAttention& problem) {
  SALA_CHECK(ctx.device == DeviceKind::kCpu) << "this form runs on the CPU";
  const int64_t tokens = problem.q.dim(0);
  const int64_t heads = problem.k.dim(1);
  SALA_CHECK(heads >= 1 && problem.q.dim(1) % heads == 0)
      << problem.q.dim(1) << " query heads, " << heads << " key/value heads";
  CheckHeads(problem.q, tokens, problem.q.dim(1), problem.q.dim(2));
  CheckHeads(problem.k, problem.k.dim(0), heads, problem.q.dim(2));
  CheckHeads(problem.v, problem.k.dim(0), heads, problem.q.dim(2));
}

// That, and the parts of a call over packed documents.
void CheckPacked(const Context& ctx, const BlockAttention& problem) {
  CheckProblem(ctx, problem);
  CheckDocuments(problem.documents, problem.k.dim(0));
  CheckQueries(problem.first_query, problem.q.dim(0), problem.k.dim(0));
}

// The queries of a document, counted from its first token.
DocumentRange QueriesOf(const BlockAttention& problem, const DocumentRange& document) {
  return PartOf(document, problem.first_query, problem.q.dim(0));
}

// The blocks that a document's queries can see: none without queries.
int64_t BlocksOf(const BlockAttention& problem, const DocumentRange& document) {
  const DocumentRange queries = QueriesOf(problem, document);
  return queries.length() == 0 ? 0 : (queries.end + problem.block_size - 1) / problem.block_size;
}

// Each block of K or V that is seen, transposed to [D, block], so that products with few rows can
// read it where it lies. Columns past the end of the document are never read.
class TransposedBlocks {
 public:
  TransposedBlocks(const Context& ctx, const BlockAttention& problem, const ConstTensor& x)
      : heads_(x.dim(1)), size_(problem.block_size * x.dim(2)) {
    struct Item {
      int64_t document;
      int64_t block;
    };
    const std::span<const DocumentRange> documents = problem.documents;
    const int64_t block = problem.block_size;
    std::vector<Item> items;
    for (size_t s = 0; s < documents.size(); ++s) {
      first_.push_back(static_cast<int64_t>(items.size()));
      for (int64_t b = 0; b < BlocksOf(problem, documents[s]); ++b) {
        items.push_back({static_cast<int64_t>(s), b});
      }
    }
    data_ = static_cast<float*>(
        ctx.scratch->Allocate(items.size() * static_cast<size_t>(heads_ * size_) * sizeof(float)));
    const int64_t d = x.dim(2);
    ctx.pool->For(static_cast<int64_t>(items.size()), 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items[static_cast<size_t>(i)];
        const DocumentRange& document = documents[static_cast<size_t>(item.document)];
        const int64_t token = document.begin + item.block * block;
        const int64_t keys = std::min(block, document.end - token);
        for (int64_t h = 0; h < heads_; ++h) {
          float* to = data_ + (i * heads_ + h) * size_;
          for (int64_t j = 0; j < keys; ++j) {
            const float* from = x.Row<float>(token + j) + h * d;
            for (int64_t c = 0; c < d; ++c) to[c * block + j] = from[c];
          }
        }
      }
    });
  }

  const float* At(int64_t document, int64_t head, int64_t block) const {
    return data_ + ((first_[static_cast<size_t>(document)] + block) * heads_ + head) * size_;
  }

 private:
  int64_t heads_;
  int64_t size_;
  float* data_ = nullptr;
  std::vector<int64_t> first_;  // per document
};

// One thread's buffers.
struct Work {
  float* q = nullptr;       // [rows, d]
  float* o = nullptr;       // [rows, d]; backward: dq
  float* dout = nullptr;    // [rows, d], backward only
  float* scores = nullptr;  // [rows, block]
  float* dp = nullptr;      // [rows, block], backward only
  float* max = nullptr;     // [rows]; backward: lse
  float* sum = nullptr;     // [rows]; backward: delta
  float* gemm = nullptr;
  std::span<uint64_t> members;
};

std::vector<Work> NewWork(const Context& ctx, const Sizes& z, int64_t blocks, bool backward) {
  const auto floats = [&ctx](int64_t n) {
    return static_cast<float*>(ctx.scratch->Allocate(static_cast<size_t>(n) * sizeof(float)));
  };
  const int64_t gemm = std::max({GemmSerialWorkspace(z.rows, z.block, z.d),
                                 GemmSerialWorkspace(z.rows, z.d, z.block),
                                 GemmSerialWorkspace(z.block, z.d, z.rows)});
  std::vector<Work> all(static_cast<size_t>(ctx.pool->threads()));
  for (Work& work : all) {
    work.q = floats(z.rows * z.d);
    work.o = floats(z.rows * z.d);
    work.scores = floats(z.rows * z.block);
    work.max = floats(z.rows);
    work.sum = floats(z.rows);
    work.gemm = floats(gemm);
    if (backward) {
      work.dout = floats(z.rows * z.d);
      work.dp = floats(z.rows * z.block);
    }
    auto* bits = static_cast<uint64_t*>(
        ctx.scratch->Allocate(static_cast<size_t>(blocks) * sizeof(uint64_t)));
    work.members = {bits, static_cast<size_t>(blocks)};
  }
  return all;
}

int64_t MostBlocks(const BlockAttention& problem) {
  int64_t most = 1;
  for (const DocumentRange& document : problem.documents) {
    most = std::max(most, BlocksOf(problem, document));
  }
  return most;
}

// The row of a tile's first token in q, out, lse and their kin.
int64_t FirstRow(const BlockAttention& problem, const QueryTile& tile) {
  return tile.document.begin + tile.begin - problem.first_query;
}

// Rows of the tile's heads, `width` elements a token, between a tensor of queries whose row of the
// tile's first token is `row` and a contiguous buffer.
void Gather(const ConstTensor& x, int64_t row, const QueryTile& tile, int64_t width, float* to) {
  for (int64_t i = 0; i < tile.count; ++i) {
    std::copy_n(x.Row<float>(row + i) + tile.head * width, width, to + i * width);
  }
}

void Scatter(const float* from, int64_t row, const QueryTile& tile, int64_t width,
             const Tensor& x) {
  for (int64_t i = 0; i < tile.count; ++i) {
    std::copy_n(from + i * width, width, x.Row<float>(row + i) + tile.head * width);
  }
}

// Rows of consecutive tokens of a tile that attend to one block.
struct Run {
  int64_t block = 0;
  int64_t row = 0;  // in the tile
  ScoreTile scores;
};

// Calls body(run) for every block of the tile in rising order and, inside a block, for its runs in
// rising order.
template <typename Body>
void ForEachRun(const BlockAttention& problem, const Sizes& z, const QueryTile& tile,
                const Work& work, const Body& body) {
  const int64_t own = tile.begin / z.block;
  const uint64_t all = ~uint64_t{0} >> (kMaxTileTokens - tile.count);
  const std::span<uint64_t> members = work.members.subspan(0, static_cast<size_t>(own + 1));
  if (problem.members) {
    problem.members(tile, members);
  } else {
    std::fill(members.begin(), members.end(), all);
  }
  for (int64_t b = 0; b <= own; ++b) {
    uint64_t bits = members[static_cast<size_t>(b)] & all;
    while (bits != 0) {
      const int first = std::countr_zero(bits);
      const int length = std::countr_one(bits >> first);
      bits &= ~((~uint64_t{0} >> (kMaxTileTokens - length)) << first);
      Run run;
      run.block = b;
      run.row = first * z.group;
      run.scores.scores = work.scores + run.row * z.block;
      run.scores.stride = z.block;
      run.scores.rows = length * z.group;
      run.scores.group = z.group;
      run.scores.keys = b < own ? z.block : tile.begin + tile.count - own * z.block;
      run.scores.first_visible = b < own ? z.block : tile.begin + first - own * z.block + 1;
      body(run);
    }
  }
}

// First row of a block of K or V (or their gradients).
template <typename AnyTensor>
auto BlockRow(const AnyTensor& x, const QueryTile& tile, const Sizes& z, int64_t block) {
  return x.template Row<float>(tile.document.begin + block * z.block) + tile.head * z.d;
}

// Takes the tile's queries from work.q; leaves the finished rows in work.o and their log-sum-exp in
// work.max. `keys_transposed(block)`: [D, block], or null where transposing would not pay.
template <typename KeysTransposed>
void ForwardTile(const BlockAttention& problem, const Sizes& z, const QueryTile& tile,
                 const Work& work, const KeysTransposed& keys_transposed) {
  const int64_t rows = tile.count * z.group;
  std::fill_n(work.o, rows * z.d, 0.0F);
  std::fill_n(work.max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(work.sum, rows, 0.0F);
  ForEachRun(problem, z, tile, work, [&](const Run& run) {
    const ScoreTile& s = run.scores;
    const float* q = work.q + run.row * z.d;
    float* o = work.o + run.row * z.d;
    if (const float* kt = keys_transposed(run.block); kt != nullptr) {
      GemmSerialNN(s.rows, s.keys, z.d, problem.scale, q, z.d, kt, z.block, s.scores, s.stride,
                   Write::kOverwrite, work.gemm);
    } else {
      GemmSerialNT(s.rows, s.keys, z.d, problem.scale, q, z.d,
                   BlockRow(problem.k, tile, z, run.block), problem.k.stride(0), s.scores, s.stride,
                   Write::kOverwrite, work.gemm);
    }
    OnlineSoftmax(s, work.max + run.row, work.sum + run.row, o, z.d);
    GemmSerialNN(s.rows, z.d, s.keys, 1.0F, s.scores, s.stride,
                 BlockRow(problem.v, tile, z, run.block), problem.v.stride(0), o, z.d,
                 Write::kAccumulate, work.gemm);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = 1.0F / work.sum[r];
    for (int64_t c = 0; c < z.d; ++c) work.o[r * z.d + c] *= inverse;
    work.max[r] += static_cast<float>(PortableLog(static_cast<double>(work.sum[r])));
  }
}

// Adds the tile's share to dk and dv of its document and leaves dq in work.o.
void BackwardTile(const BlockAttention& problem, const Sizes& z, const QueryTile& tile,
                  const Work& work, const TransposedBlocks& kt, const TransposedBlocks& vt,
                  int64_t document, const Tensor& dk, const Tensor& dv) {
  std::fill_n(work.o, tile.count * z.group * z.d, 0.0F);
  ForEachRun(problem, z, tile, work, [&](const Run& run) {
    const ScoreTile& s = run.scores;
    const float* q = work.q + run.row * z.d;
    const float* dout = work.dout + run.row * z.d;
    float* dp = work.dp + run.row * z.block;
    GemmSerialNN(s.rows, s.keys, z.d, problem.scale, q, z.d, kt.At(document, tile.head, run.block),
                 z.block, s.scores, s.stride, Write::kOverwrite, work.gemm);
    GemmSerialNN(s.rows, s.keys, z.d, 1.0F, dout, z.d, vt.At(document, tile.head, run.block),
                 z.block, dp, z.block, Write::kOverwrite, work.gemm);
    SoftmaxBackward(s, work.max + run.row, work.sum + run.row, dp);
    GemmSerialTN(s.keys, z.d, s.rows, 1.0F, s.scores, s.stride, dout, z.d,
                 BlockRow(dv, tile, z, run.block), dv.stride(0), Write::kAccumulate, work.gemm);
    GemmSerialTN(s.keys, z.d, s.rows, problem.scale, dp, z.block, q, z.d,
                 BlockRow(dk, tile, z, run.block), dk.stride(0), Write::kAccumulate, work.gemm);
    GemmSerialNN(s.rows, z.d, s.keys, problem.scale, dp, z.block,
                 BlockRow(problem.k, tile, z, run.block), problem.k.stride(0),
                 work.o + run.row * z.d, z.d, Write::kAccumulate, work.gemm);
  });
}

void ZeroRows(const Tensor& x, const DocumentRange& document, int64_t head, int64_t d) {
  for (int64_t t = document.begin; t < document.end; ++t) {
    std::fill_n(x.Row<float>(t) + head * d, d, 0.0F);
  }
}

}  // namespace

int64_t TileTokens(int64_t block_size, int64_t group) {
  const auto tokens = static_cast<uint64_t>(std::max<int64_t>(1, kTileRows / group));
  return std::min({block_size, kMaxTileTokens, static_cast<int64_t>(std::bit_floor(tokens))});
}

void ForEachTile(const DocumentRange& part, int64_t block_size, int64_t group,
                 const std::function<void(int64_t begin, int64_t count)>& tile) {
  const int64_t tokens = TileTokens(block_size, group);
  for (int64_t begin = part.begin; begin < part.end;) {
    const int64_t in_block = begin % block_size;
    const int64_t left = std::min(tokens - in_block % tokens, block_size - in_block);
    const int64_t count = std::min(left, part.end - begin);
    tile(begin, count);
    begin += count;
  }
}

void ForEachItem(const Context& ctx, int64_t n,
                 const std::function<void(int64_t worker, int64_t item)>& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(ctx.pool->threads(), n);
  ctx.pool->For(workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t item = next++; item < n; item = next++) body(worker, item);
  });
}

void CheckHeads(const ConstTensor& x, int64_t tokens, int64_t heads, int64_t d) {
  SALA_CHECK(x.rank() == 3 && x.dim(0) == tokens && x.dim(1) == heads && x.dim(2) == d &&
             x.dtype() == DType::kF32)
      << "expected [" << tokens << ", " << heads << ", " << d << "] f32, found " << ShapeText(x);
  SALA_CHECK(heads == 1 || x.stride(1) == d) << "heads must be contiguous";
  SALA_CHECK(tokens <= 1 || x.stride(0) >= heads * d) << "tokens overlap: stride " << x.stride(0);
}

void CheckDocuments(std::span<const DocumentRange> documents, int64_t tokens) {
  int64_t end = 0;
  for (const DocumentRange& document : documents) {
    SALA_CHECK(end <= document.begin && document.begin <= document.end && document.end <= tokens)
        << "document [" << document.begin << ", " << document.end << ") of " << tokens
        << " tokens after one that ends at " << end;
    end = document.end;
  }
}

void CheckQueries(int64_t first_query, int64_t queries, int64_t tokens) {
  SALA_CHECK(0 <= first_query && first_query + queries <= tokens)
      << queries << " queries from token " << first_query << " on, of " << tokens << " tokens";
}

void BlockAttentionForward(const Context& ctx, const BlockAttention& problem, const Tensor& out,
                           const Tensor& lse) {
  CheckPacked(ctx, problem);
  const Sizes z(problem);
  CheckHeads(out, problem.q.dim(0), problem.q.dim(1), z.d);
  const ArenaScope scope(*ctx.scratch);
  const TransposedBlocks kt(ctx, problem, problem.k);
  const std::vector<Work> work = NewWork(ctx, z, MostBlocks(problem), /*backward=*/false);

  struct Item {
    int64_t document;
    QueryTile tile;
  };
  std::vector<Item> items;
  for (size_t s = 0; s < problem.documents.size(); ++s) {
    const DocumentRange& document = problem.documents[s];
    for (int64_t head = 0; head < z.heads; ++head) {
      ForEachTile(QueriesOf(problem, document), z.block, z.group,
                  [&](int64_t begin, int64_t count) {
                    items.push_back({static_cast<int64_t>(s), {document, head, begin, count}});
                  });
    }
  }
  ForEachItem(ctx, static_cast<int64_t>(items.size()), [&](int64_t worker, int64_t i) {
    const Item& item = items[static_cast<size_t>(i)];
    const Work& mine = work[static_cast<size_t>(worker)];
    const int64_t row = FirstRow(problem, item.tile);
    Gather(problem.q, row, item.tile, z.group * z.d, mine.q);
    ForwardTile(problem, z, item.tile, mine,
                [&](int64_t block) { return kt.At(item.document, item.tile.head, block); });
    Scatter(mine.o, row, item.tile, z.group * z.d, out);
    Scatter(mine.max, row, item.tile, z.group, lse);
  });
}

void BlockAttentionBackward(const Context& ctx, const BlockAttention& problem,
                            const ConstTensor& out, const ConstTensor& lse, const ConstTensor& dout,
                            const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  CheckPacked(ctx, problem);
  const Sizes z(problem);
  for (const ConstTensor& x : {out, dout, ConstTensor(dq)}) {
    CheckHeads(x, problem.q.dim(0), problem.q.dim(1), z.d);
  }
  for (const Tensor& x : {dk, dv}) CheckHeads(x, problem.k.dim(0), z.heads, z.d);
  const ArenaScope scope(*ctx.scratch);
  const TransposedBlocks kt(ctx, problem, problem.k);
  const TransposedBlocks vt(ctx, problem, problem.v);
  const std::vector<Work> work = NewWork(ctx, z, MostBlocks(problem), /*backward=*/true);

  const int64_t pairs = static_cast<int64_t>(problem.documents.size()) * z.heads;
  ForEachItem(ctx, pairs, [&](int64_t worker, int64_t pair) {
    const int64_t s = pair / z.heads;
    const int64_t head = pair % z.heads;
    const DocumentRange& document = problem.documents[static_cast<size_t>(s)];
    const Work& mine = work[static_cast<size_t>(worker)];
    ZeroRows(dk, document, head, z.d);
    ZeroRows(dv, document, head, z.d);
    const DocumentRange queries = QueriesOf(problem, document);
    ForEachTile(queries, z.block, z.group, [&](int64_t begin, int64_t count) {
      const QueryTile tile = {document, head, begin, count};
      const int64_t row = FirstRow(problem, tile);
      const int64_t width = z.group * z.d;
      Gather(out, row, tile, width, mine.o);
      Gather(dout, row, tile, width, mine.dout);
      Gather(problem.q, row, tile, width, mine.q);
      RowDots(count * z.group, z.d, mine.dout, mine.o, mine.sum);
      Gather(lse, row, tile, z.group, mine.max);
      BackwardTile(problem, z, tile, mine, kt, vt, s, dk, dv);
      Scatter(mine.o, row, tile, width, dq);
    });
  });
}

void BlockAttentionDecode(const Context& ctx, const BlockAttention& problem, const Tensor& out) {
  CheckProblem(ctx, problem);
  const Sizes z(problem);
  const int64_t n = problem.k.dim(0);
  SALA_CHECK(n >= 1 && problem.q.dim(0) == 1) << n << " keys, " << problem.q.dim(0) << " queries";
  SALA_CHECK(out.numel() == problem.q.numel() && out.contiguous()) << ShapeText(out);
  const ArenaScope scope(*ctx.scratch);
  const int64_t blocks = (n + z.block - 1) / z.block;
  const std::vector<Work> work = NewWork(ctx, z, blocks, /*backward=*/false);
  ForEachItem(ctx, z.heads, [&](int64_t worker, int64_t head) {
    const Work& mine = work[static_cast<size_t>(worker)];
    const QueryTile tile = {{0, n}, head, n - 1, 1};
    const int64_t width = z.group * z.d;
    std::copy_n(problem.q.Data<float>() + head * width, width, mine.q);
    ForwardTile(problem, z, tile, mine, [](int64_t) -> const float* { return nullptr; });
    std::copy_n(mine.o, width, out.Data<float>() + head * width);
  });
}

}  // namespace sala::kernels
