#include <functional>

#include "tests/kernels/common/cuda_test.h"
#include "tests/kernels/sparse_attention/sparse_case.h"

namespace sala::kernels {
namespace {

using CompressKeysCuda = CudaKernelTest;
using SelectBlocksCuda = CudaKernelTest;

// The numbers of configs/tiny.
SparseAttentionConfig TinyConfig() {
  SparseAttentionConfig config = SmallConfig();
  config.window_size = 48;
  return config;
}

// Multiples of 1/16 below 8: bfloat16 holds them, and float32 every sum of 128 of them, so that a
// mean is exact before its one rounding.
void RoundToGrid(Matrix& x) {
  for (int64_t r = 0; r < x.rows(); ++r) {
    for (int64_t c = 0; c < x.columns(); ++c) {
      x.at(r, c) = std::clamp(std::round(x.at(r, c) * 16.0F) / 16.0F, -7.9375F, 7.9375F);
    }
  }
}

double RoundedToBf16(double x) { return static_cast<float>(BF16(static_cast<float>(x))); }

// The means of all documents, exact, one after the other: fine and coarse.
std::pair<std::vector<double>, std::vector<double>> Means(
    const SparseCase& c, const std::vector<DocumentRange>& documents) {
  std::pair<std::vector<double>, std::vector<double>> all;
  for (const DocumentRange& document : documents) {
    const AttentionCase piece = c.Piece(document);
    const auto means = reference::CompressKeys(piece.Shape(), piece.k.values(), c.config);
    for (const auto& row : means.fine) all.first.insert(all.first.end(), row.begin(), row.end());
    for (const auto& row : means.coarse) {
      all.second.insert(all.second.end(), row.begin(), row.end());
    }
  }
  return all;
}

// Keys k of `c` compressed on the device, against the exact means. A mean is rounded once to
// bfloat16; before that a float32 sum of 128 terms at most has 22 roundings on its longest path
// (16 tokens of a group, 8 groups, the division; less for smaller strides), each relative to a
// partial sum of at most `largest` times its terms. `Rows`: DeviceMatrix or FarMatrix.
template <typename Rows = DeviceMatrix>
void CheckCompression(const Context& ctx, const SparseCase& c,
                      const std::vector<DocumentRange>& documents, bool exact) {
  const auto [fine_means, coarse_means] = Means(c, documents);
  const int64_t width = c.heads.kv * c.heads.d;
  const Rows k(DType::kBF16, c.k, 8);
  const Rows fine(DType::kBF16, static_cast<int64_t>(fine_means.size()) / width, width, 16);
  const Rows coarse(DType::kBF16, static_cast<int64_t>(coarse_means.size()) / width, width, 8);
  CompressKeys(ctx, k.heads(c.heads.kv, c.heads.d), documents, c.config,
               fine.heads(c.heads.kv, c.heads.d), coarse.heads(c.heads.kv, c.heads.d));
  const std::pair<const Rows*, const std::vector<double>*> results[] = {{&fine, &fine_means},
                                                                        {&coarse, &coarse_means}};
  for (const auto& [found, means] : results) {
    ExpectClose(found->Download(), *means, [&, m = means](size_t i) {
      if (exact) return std::abs(RoundedToBf16((*m)[i]) - (*m)[i]);
      constexpr double kLargest = 6.0;  // of a few million normal numbers
      return 1.01 * kBf16Round * std::abs((*m)[i]) + 24 * kF32Round * kLargest;
    });
    EXPECT_TRUE(found->GapsUntouched());
  }
}

TEST_F(CompressKeysCuda, MeansOfEveryEdgeLength) {
  const SparseAttentionConfig released;
  for (int64_t d : {16, 32, 64, 128}) {
    if (kSlowBuild && (d == 32 || d == 64)) continue;
    for (int64_t n : {0, 1, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 191, 192, 800}) {
      SparseCase c(n, {1, d < 64 ? 2 : 1, d}, released);
      RoundToGrid(c.k);
      CheckCompression(ctx(), c, {{0, n}}, /*exact=*/true);
      SparseCase small(n, {3, 3, d}, SmallConfig());
      small.k = RandomBf16(n, 3 * d, small.rng);
      CheckCompression(ctx(), small, {{0, n}}, /*exact=*/false);
    }
  }
}

TEST_F(CompressKeysCuda, WindowsRestartAtEachDocument) {
  const auto documents = DocumentsOf({7, 100, 1, 8, 33, 1, 1, 32, 400, 31}, /*gap=*/2);
  for (const SparseAttentionConfig& config : {SmallConfig(), SparseAttentionConfig{}}) {
    SparseCase c(documents.back().end + 3, {2, 2, 32}, config);
    RoundToGrid(c.k);
    PoisonUnused(c, Used(c.t, documents));
    CheckCompression(ctx(), c, documents, /*exact=*/true);
  }
  SparseCase none(5, {1, 1, 16}, SmallConfig());
  CheckCompression(ctx(), none, {}, /*exact=*/true);
}

TEST_F(CompressKeysCuda, TokensMayLieFarApart) {
  if (!FarMatrix::Possible()) GTEST_SKIP() << "no such memory here";
  SparseCase c(100, {1, 2, 16}, SmallConfig());
  RoundToGrid(c.k);
  CheckCompression<FarMatrix>(ctx(), c, {{0, 60}, {60, 100}}, /*exact=*/true);
}

// A case whose selection runs on the device. Queries are rounded to bfloat16, keys to the grid, so
// that the reference may round the exact means as the kernel does.
struct CudaCase : SparseCase {
  CudaCase(int64_t tokens, const HeadCounts& h, const SparseAttentionConfig& c, unsigned seed = 1)
      : SparseCase(tokens, h, c, seed) {
    q = RandomBf16(tokens, h.query * h.d, rng);
    RoundToGrid(k);
  }

  template <typename Rows = DeviceMatrix>
  void SelectOnDevice(const Context& ctx, const std::vector<DocumentRange>& documents) {
    constexpr int64_t kGap = 3;
    const Rows device_q(DType::kBF16, q, 8);
    const Rows device_k(DType::kBF16, k, 24);
    const int64_t row = heads.kv * width() + kGap;
    std::vector<int32_t> host(static_cast<size_t>(t * row), kPoison);
    const size_t bytes = host.size() * sizeof(int32_t);
    void* device = TestDevice().Allocate(std::max<size_t>(bytes, 4));
    TestDevice().Upload(device, host.data(), bytes);
    SelectBlocks(ctx, device_q.heads(heads.query, heads.d), device_k.heads(heads.kv, heads.d),
                 documents, config, scale(),
                 Tensor(device, DType::kI32, {t, row}, DeviceKind::kCuda)
                     .Columns(0, row - kGap)
                     .AsHeads(heads.kv, width()));
    TestDevice().Download(host.data(), device, bytes);
    TestDevice().Free(device);
    for (int64_t i = 0; i < t; ++i) {
      std::copy_n(host.begin() + i * row, row - kGap, chosen.begin() + i * (row - kGap));
      for (int64_t g = row - kGap; g < row; ++g) {
        ASSERT_EQ(host[static_cast<size_t>(i * row + g)], kPoison) << "gap behind token " << i;
      }
    }
  }

  CudaCase CudaPiece(const DocumentRange& range) const {
    CudaCase piece(range.length(), heads, config);
    static_cast<AttentionCase&>(piece) = Piece(range);
    return piece;
  }

  // The compressed keys as bfloat16 holds them.
  reference::Compressed RoundedKeys() const {
    reference::Compressed keys = reference::CompressKeys(Shape(), k.values(), config);
    for (auto* rows : {&keys.fine, &keys.coarse}) {
      for (auto& row : *rows) {
        for (double& x : row) x = RoundedToBf16(x);
      }
    }
    return keys;
  }
};

// Every `step`-th token of the one document of `c`, from `first` on. ExpectChoice allows scores
// that lie within 1e-5 of each other to change places. On the device a score's exponent is a sum of
// exact products, at most 8 tensor core steps of 16 with partial sums below 4 in these cases, each
// good to 2^-22 (hardware truncates where it aligns), then one fused rounding at most 2^-24 * 16
// and the normaliser's; exp2 adds 2^-22 and the sum over 16 heads 5 roundings: 8e-6 if all were at
// their worst, a tenth of that as found.
void ExpectTheRule(const CudaCase& c, int64_t first = 0, int64_t step = 1) {
  ExpectWellFormed(c);
  const auto q = c.q.values();
  const reference::Compressed keys = c.RoundedKeys();
  for (int64_t t = first; t < c.t; t += step) {
    for (int64_t g = 0; g < c.heads.kv; ++g) {
      ExpectChoice(c, reference::Select(c.Shape(), q, keys, c.config, t, g), t, g);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

// The hand-computed cases of selection_test.cc, which explains them, with 15 channels of zeros
// behind the one that counts and scale 1.
struct HandCase : CudaCase {
  explicit HandCase(const std::vector<float>& keys, int64_t query_heads = 1)
      : CudaCase(static_cast<int64_t>(keys.size()), {query_heads, 1, 16}, Config()) {
    for (Matrix* x : {&q, &k}) {
      for (int64_t r = 0; r < t; ++r) std::fill_n(&x->at(r, 0), x->columns(), 0.0F);
    }
    for (int64_t i = 0; i < t; ++i) {
      // scale() is 1 / 4 here.
      q.at(i, 0) = 4.0F;
      k.at(i, 0) = keys[static_cast<size_t>(i)];
    }
  }
  static SparseAttentionConfig Config() {
    SparseAttentionConfig config;
    config.kernel_size = 2;
    config.kernel_stride = 1;
    config.block_size = 2;
    config.window_size = 2;
    config.topk = 3;
    return config;
  }
  int32_t FreeBlock(int64_t token) const { return chosen[static_cast<size_t>(token)]; }
};

TEST_F(SelectBlocksCuda, HandComputedScores) {
  HandCase c({0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 0, 0, 0, 0});
  c.SelectOnDevice(ctx(), {{0, c.t}});
  EXPECT_EQ(c.FreeBlock(13), 4);
  EXPECT_EQ(c.FreeBlock(11), 3);
  EXPECT_EQ(c.FreeBlock(9), 1);
  EXPECT_EQ(c.FreeBlock(7), 1);
  EXPECT_EQ(c.FreeBlock(5), kNoBlock);
  EXPECT_EQ(c.FreeBlock(0), kNoBlock);
}

TEST_F(SelectBlocksCuda, TiesGoToTheLowerBlock) {
  HandCase c({0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0});
  c.SelectOnDevice(ctx(), {{0, c.t}});
  EXPECT_EQ(c.FreeBlock(13), 2);
  HandCase d({0, 0, 0, 0, 0, 4, 0, 6, 0, 0, 0, 0, 0, 0});
  d.SelectOnDevice(ctx(), {{0, d.t}});
  EXPECT_EQ(d.FreeBlock(13), 3);
  HandCase e(std::vector<float>(14, 1.0F));
  e.SelectOnDevice(ctx(), {{0, e.t}});
  EXPECT_EQ(e.FreeBlock(13), 1);
}

TEST_F(SelectBlocksCuda, HeadsAreNormalisedBeforeTheyAreAdded) {
  HandCase c({0, 0, 0, 0, 5, 5, -8, -8, 0, 0, 0, 0, 0, 0}, /*query_heads=*/2);
  const auto free_block = [&](float s) {
    for (int64_t t = 0; t < c.t; ++t) c.q.at(t, 16) = -4.0F * s;
    c.SelectOnDevice(ctx(), {{0, c.t}});
    return c.chosen[13];
  };
  EXPECT_EQ(free_block(1.0F), 3);
  EXPECT_EQ(free_block(0.65F), 2);
}

TEST_F(SelectBlocksCuda, ScoresBeyondTheFloatRangeKeepTheirForm) {
  HandCase c({0, 0, 0, 0, 0, 0, 0, 0, 900, 0, 0, 0, 0, 0});
  c.SelectOnDevice(ctx(), {{0, c.t}});
  ExpectWellFormed(c);
  EXPECT_EQ(c.FreeBlock(13), 3);
  // Z = log(e^0 + e^-21.75). Block 2 has f_4 = 85, block 4 has f_8 = 87: both above the limit, so
  // they tie.
  HandCase d({0, 0, 0, 0, 0, 170, 0, -344, 0, 174, 0, 0, 0, 0});
  d.SelectOnDevice(ctx(), {{0, d.t}});
  EXPECT_EQ(d.FreeBlock(13), 2);
}

TEST_F(SelectBlocksCuda, EqualKeysTieEverywhere) {
  SparseAttentionConfig wide = SmallConfig();
  wide.topk = 44;  // 42 free blocks: more than a warp
  for (const SparseAttentionConfig& config : {SmallConfig(), wide}) {
    CudaCase c(1000, {5, 1, 32}, config);
    for (int64_t t = 0; t < c.t; ++t) {
      for (int64_t i = 0; i < c.k.columns(); ++i) c.k.at(t, i) = 0.25F * static_cast<float>(i % 5);
    }
    for (int64_t slice : {0, 16}) {
      if (kSlowBuild && slice == 0) continue;
      c.config.selection_slice = slice;
      c.SelectOnDevice(ctx(), {{0, c.t}});
      ExpectWellFormed(c);
      for (int64_t f = 0; f < c.width(); ++f) EXPECT_EQ(c.BlocksOf(999, 0)[f], 1 + f);
    }
  }
}

std::vector<SparseAttentionConfig> Configs() {
  SparseAttentionConfig wide = SmallConfig();
  wide.init_blocks = 2;
  wide.topk = 9;
  SparseAttentionConfig no_window = SmallConfig();
  no_window.window_size = 0;
  no_window.init_blocks = 0;
  no_window.topk = 4;
  SparseAttentionConfig none_free = SmallConfig();
  none_free.topk = 2;
  return {TinyConfig(), wide, no_window, none_free};
}

TEST_F(SelectBlocksCuda, EqualsTheRuleOnRandomInput) {
  const std::vector<HeadCounts> all = {{16, 1, 16}, {6, 2, 32}, {1, 1, 64}, {32, 2, 128}};
  for (const SparseAttentionConfig& config : Configs()) {
    for (const HeadCounts& heads : all) {
      CudaCase c(kSlowBuild ? 170 : 450, heads, config);
      c.SelectOnDevice(ctx(), {{0, c.t}});
      ExpectTheRule(c, 0, heads.d > 64 ? 7 : 1);
    }
  }
}

TEST_F(SelectBlocksCuda, AnyNumberOfWindowsInABlock) {
  // One to eighty fine windows begin in a block.
  for (const auto& [stride, block] : std::vector<std::pair<int64_t, int64_t>>{
           {4, 4}, {1, 2}, {4, 12}, {3, 15}, {1, 64}, {1, 80}}) {
    SparseAttentionConfig config;
    config.kernel_stride = stride;
    config.kernel_size = 2 * stride;
    config.block_size = block;
    config.window_size = 2 * block;
    config.topk = 5;
    for (int64_t slice : {0, 1}) {
      config.selection_slice = slice;
      CudaCase c(std::min<int64_t>(kSlowBuild ? 200 : 800, 12 * block + 5), {4, 2, 16}, config);
      c.SelectOnDevice(ctx(), {{0, c.t}});
      ExpectTheRule(c);
    }
  }
}

TEST_F(SelectBlocksCuda, EveryEdgeLength) {
  for (int64_t n : {0, 1, 15, 16, 17, 31, 32, 63, 64, 65, 111, 112, 113, 127, 128, 129}) {
    CudaCase c(n, {3, 1, 16}, SmallConfig());
    c.SelectOnDevice(ctx(), {{0, n}});
    ExpectTheRule(c);
  }
  // Blocks of one window and no local ones beside the own: keys that a candidate's token does not
  // see yet, and scoring before the first coarse key.
  SparseAttentionConfig narrow = SmallConfig();
  narrow.block_size = 4;
  narrow.window_size = 0;
  narrow.init_blocks = 0;
  narrow.topk = 3;
  for (int64_t n : {1, 4, 12, 13, 31, 32, 33, 48, 100}) {
    CudaCase c(n, {3, 1, 16}, narrow);
    c.SelectOnDevice(ctx(), {{0, n}});
    ExpectTheRule(c);
  }
  CudaCase none(20, {3, 1, 16}, SmallConfig());
  none.SelectOnDevice(ctx(), {});
  EXPECT_EQ(none.chosen, std::vector<int32_t>(none.chosen.size(), SparseCase::kPoison));
}

// Kernel 32 / 16, blocks of 64, window 2048, topk 64: 96 blocks, 62 of them free. Up to 6144 tokens
// everything is chosen.
TEST_F(SelectBlocksCuda, ReleasedNumbers) {
  for (int64_t n : {6143, 6144, 6145, 8191, 8192}) {
    if (kSlowBuild && n > 6145) break;
    const bool small = n % 2 == 1;
    CudaCase c(n, small ? HeadCounts{2, 1, 16} : HeadCounts{4, 1, 32}, SparseAttentionConfig{});
    c.SelectOnDevice(ctx(), {{0, n}});
    ExpectTheRule(c, n > 6144 ? 6144 : n - 1, 61);
    const int32_t* last = c.BlocksOf(6142, 0);
    for (int32_t f = 0; f < 62; ++f) ASSERT_EQ(last[f], f + 1);
  }
}

TEST_F(SelectBlocksCuda, FutureTokensDoNotMatter) {
  const int64_t n = 400;
  const int64_t changed = 250;
  CudaCase before(n, {4, 2, 16}, SmallConfig());
  before.SelectOnDevice(ctx(), {{0, n}});
  CudaCase after(n, {4, 2, 16}, SmallConfig());
  for (int64_t t = changed; t < n; ++t) {
    for (int64_t i = 0; i < after.k.columns(); ++i) after.k.at(t, i) = 100.0F;
    for (int64_t i = 0; i < after.q.columns(); ++i) after.q.at(t, i) = -10.0F;
  }
  after.SelectOnDevice(ctx(), {{0, n}});
  const auto row = 2 * before.width();
  EXPECT_TRUE(std::equal(before.chosen.begin(), before.chosen.begin() + changed * row,
                         after.chosen.begin()));
  EXPECT_NE(before.chosen, after.chosen);
  const std::vector<int32_t> first = after.chosen;
  after.SelectOnDevice(ctx(), {{0, n}});
  EXPECT_EQ(first, after.chosen);
}

TEST_F(SelectBlocksCuda, PackedDocumentsChooseAsSeparateOnes) {
  std::vector<int64_t> lengths = {1, 300, 1, 1, 150, 16, 17, 300, 299, 0, 113};
  lengths.insert(lengths.end(), 40, 1);
  lengths.push_back(200);
  const auto documents = DocumentsOf(lengths, /*gap=*/3);
  CudaCase packed(documents.back().end + 2, {4, 2, 16}, SmallConfig());
  const std::vector<bool> used = Used(packed.t, documents);
  PoisonUnused(packed, used);
  packed.SelectOnDevice(ctx(), documents);
  const int64_t row = 2 * packed.width();
  for (const DocumentRange& document : documents) {
    CudaCase alone = packed.CudaPiece(document);
    alone.SelectOnDevice(ctx(), {{0, alone.t}});
    EXPECT_TRUE(std::equal(alone.chosen.begin(), alone.chosen.end(),
                           packed.chosen.begin() + document.begin * row))
        << "document at " << document.begin;
  }
  for (int64_t i = 0; i < packed.t * row; ++i) {
    if (!used[static_cast<size_t>(i / row)]) {
      ASSERT_EQ(packed.chosen[static_cast<size_t>(i)], SparseCase::kPoison);
    }
  }
}

TEST_F(SelectBlocksCuda, TokensMayLieFarApart) {
  if (!FarMatrix::Possible()) GTEST_SKIP() << "no such memory here";
  const std::vector<DocumentRange> documents = {{0, 150}, {150, 300}};
  CudaCase near(300, {4, 2, 16}, SmallConfig());
  near.SelectOnDevice(ctx(), documents);
  CudaCase far(300, {4, 2, 16}, SmallConfig());
  far.SelectOnDevice<FarMatrix>(ctx(), documents);
  EXPECT_EQ(near.chosen, far.chosen);
}

TEST_F(SelectBlocksCuda, SlicesOfAnySizeChooseTheSame) {
  SparseAttentionConfig wide = SmallConfig();
  wide.topk = 30;  // more free blocks than a slice has
  for (const SparseAttentionConfig& config : {SmallConfig(), wide}) {
    CudaCase whole(kSlowBuild ? 700 : 1900, {3, 1, 16}, config);
    const std::vector<DocumentRange> documents = {{0, 600}, {600, whole.t}};
    whole.SelectOnDevice(ctx(), documents);
    for (int64_t slice : {1, 20, 64}) {
      CudaCase cut(whole.t, {3, 1, 16}, config);
      cut.config.selection_slice = slice;
      cut.SelectOnDevice(ctx(), documents);
      EXPECT_EQ(whole.chosen, cut.chosen) << "slices of " << slice;
    }
  }
}

}  // namespace
}  // namespace sala::kernels
