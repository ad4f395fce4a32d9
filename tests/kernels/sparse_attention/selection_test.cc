#include <gmock/gmock.h>

#include <functional>

#include "tests/kernels/sparse_attention/sparse_case.h"

namespace sala::kernels {
namespace {

TEST(SparseConfig, ReleasedNumbers) {
  const SparseAttentionConfig config;
  EXPECT_EQ(SparseConfigProblem(config), "");
  EXPECT_EQ(config.total_blocks(), 96);
  EXPECT_EQ(config.local_blocks(), 33);
  EXPECT_EQ(config.free_blocks(), 62);
}

TEST(SparseConfig, EachProblemIsNamed) {
  const auto problem = [](const std::function<void(SparseAttentionConfig&)>& change) {
    SparseAttentionConfig config;
    change(config);
    return SparseConfigProblem(config);
  };
  EXPECT_EQ(problem([](auto& c) { c.kernel_stride = 0; }),
            "kernel_stride is 0, must be at least 1");
  EXPECT_EQ(problem([](auto& c) { c.kernel_size = 48; }),
            "kernel_size is 48, must be twice kernel_stride (16)");
  EXPECT_EQ(problem([](auto& c) { c.block_size = 40; }),
            "block_size is 40, must be a positive multiple of kernel_stride (16)");
  EXPECT_EQ(problem([](auto& c) { c.window_size = 100; }),
            "window_size is 100, must be a multiple of block_size (64)");
  EXPECT_EQ(problem([](auto& c) { c.init_blocks = -1; }),
            "init_blocks is -1, must not be negative");
  EXPECT_EQ(problem([](auto& c) { c.dense_len = -5; }), "dense_len is -5, must not be negative");
  EXPECT_EQ(problem([](auto& c) { c.topk = 2; }), "");
  EXPECT_THAT(problem([](auto& c) { c.topk = 1; }),
              ::testing::StartsWith("topk is 1, must be at least init_blocks + 1 (2)"));
}

TEST(CompressKeys, CountsOnlyFullWindows) {
  const SparseAttentionConfig config;
  EXPECT_EQ(FineCount(config, 0), 0);
  EXPECT_EQ(FineCount(config, 31), 0);
  EXPECT_EQ(FineCount(config, 32), 1);
  EXPECT_EQ(FineCount(config, 47), 1);
  EXPECT_EQ(FineCount(config, 48), 2);
  EXPECT_EQ(CoarseCount(config, 127), 0);
  EXPECT_EQ(CoarseCount(config, 128), 1);
  EXPECT_EQ(CoarseCount(config, 191), 1);
  EXPECT_EQ(CoarseCount(config, 192), 2);
}

TEST(CompressKeys, MatchesMeansOfEachDocument) {
  KernelTest kernel;
  const SparseAttentionConfig config = SmallConfig();
  const auto documents = DocumentsOf({7, 100, 1, 8, 33}, /*gap=*/2);
  SparseCase c(documents.back().end, {2, 2, 8}, config);
  int64_t fine_count = 0;
  int64_t coarse_count = 0;
  for (const auto& document : documents) {
    fine_count += FineCount(config, document.length());
    coarse_count += CoarseCount(config, document.length());
  }
  Matrix fine(fine_count, 16);
  Matrix coarse(coarse_count, 16);
  CompressKeys(kernel.ctx(), c.Narrow(c.k), documents, config, c.Narrow(fine), c.Narrow(coarse));
  std::vector<double> expected_fine;
  std::vector<double> expected_coarse;
  for (const auto& document : documents) {
    const AttentionCase piece = c.Piece(document);
    const auto means = reference::CompressKeys(piece.Shape(), piece.k.values(), config);
    for (const auto& row : means.fine) {
      expected_fine.insert(expected_fine.end(), row.begin(), row.end());
    }
    for (const auto& row : means.coarse) {
      expected_coarse.insert(expected_coarse.end(), row.begin(), row.end());
    }
  }
  // Summed in double, rounded once; the second unit covers double rounding in both orders of
  // division.
  ExpectClose(fine, expected_fine,
              [&](size_t i) { return kF32Round * std::abs(expected_fine[i]) + 1e-15; });
  ExpectClose(coarse, expected_coarse,
              [&](size_t i) { return kF32Round * std::abs(expected_coarse[i]) + 1e-15; });
}

// One head of width 1, blocks of 2 tokens, windows of 2 tokens at every token, scale 1. Forced:
// block 0, own block, one before it; one free block. q = 1 ranks by the means themselves: f_i =
// (k_i + k_(i+1)) / 2, block b takes the best of f_(2b-1), f_(2b), f_(2b+1).
struct HandCase : SparseCase {
  explicit HandCase(const std::vector<float>& keys)
      : SparseCase(static_cast<int64_t>(keys.size()), {1, 1, 1}, Config()) {
    for (int64_t i = 0; i < t; ++i) {
      q.at(i, 0) = 1.0F;
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

TEST(SelectBlocks, HandComputedScores) {
  KernelTest kernel;
  //            block: 0     1     2     3     4     5     6
  HandCase c({0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 0, 0, 0, 0});
  ASSERT_EQ(c.config.free_blocks(), 1);
  c.Select(kernel.ctx(), {{0, c.t}});
  // Token 13: own block 6, forced 0, 5, 6; candidates 1..4. f_7 = 1.5, f_8 = 3.5, f_9 = 2, the rest
  // 0. Scores: block 3 has f_7 = 1.5, block 4 has f_8 = 3.5, blocks 1 and 2 have 0.
  EXPECT_EQ(c.FreeBlock(13), 4);
  // Token 11: own 5, forced 0, 4, 5; candidates 1..3: block 3 sees f_7 = 1.5.
  EXPECT_EQ(c.FreeBlock(11), 3);
  // Token 9: own 4, forced 0, 3, 4; candidates 1, 2: both 0, the lower one wins.
  EXPECT_EQ(c.FreeBlock(9), 1);
  // Token 7: own 3, four blocks in the past, which is the whole budget: block 1 is all that is not
  // forced.
  EXPECT_EQ(c.FreeBlock(7), 1);
  // Token 5: blocks 0..2 are all forced.
  EXPECT_EQ(c.FreeBlock(5), kNoBlock);
  EXPECT_EQ(c.FreeBlock(0), kNoBlock);
}

TEST(SelectBlocks, TiesGoToTheLowerBlock) {
  KernelTest kernel;
  // f_4 = f_5 = 2 for k_5 = 4. Block 2 has f_3..f_5, block 3 has f_5..f_7: both score f_5.
  HandCase c({0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0});
  c.Select(kernel.ctx(), {{0, c.t}});
  EXPECT_EQ(c.FreeBlock(13), 2);
  // k_7 = 6 as well: f_6 = f_7 = 3, shared by blocks 3 (f_5..f_7) and 4 (f_7..f_9).
  HandCase d({0, 0, 0, 0, 0, 4, 0, 6, 0, 0, 0, 0, 0, 0});
  d.Select(kernel.ctx(), {{0, d.t}});
  EXPECT_EQ(d.FreeBlock(13), 3);
  // Equal keys: everything ties.
  HandCase e(std::vector<float>(14, 1.0F));
  e.Select(kernel.ctx(), {{0, e.t}});
  EXPECT_EQ(e.FreeBlock(13), 1);
}

TEST(SelectBlocks, HeadsAreNormalisedBeforeTheyAreAdded) {
  KernelTest kernel;
  // Two heads share the key/value head; k_4 = k_5 = 5, k_6 = k_7 = -8, else 0. Coarse windows are 8
  // tokens at every fourth: tokens 0..7 and 4..11, both with mean (10 - 16) / 8 = -0.75. Head 0 (q
  // = 1) has Z = log(2 e^-0.75) and gives block 2, by f_4 = 5, e^5.75 / 2 = 157. Head 1 (q = -s)
  // has Z = log(2 e^(0.75 s)) and gives block 3, by f_6 = -8, e^(7.25 s) / 2.
  SparseCase c(14, {2, 1, 1}, HandCase::Config());
  const auto free_block = [&](float s) {
    for (int64_t t = 0; t < 14; ++t) {
      c.q.at(t, 0) = 1.0F;
      c.q.at(t, 1) = -s;
      c.k.at(t, 0) = t == 4 || t == 5 ? 5.0F : t == 6 || t == 7 ? -8.0F : 0.0F;
    }
    c.Select(kernel.ctx(), {{0, 14}});
    return c.chosen[13];
  };
  EXPECT_EQ(free_block(1.0F), 3);  // e^7.25 / 2 = 704 against 157
  // e^4.71 / 2 = 56 against 157. Without the normalisers e^5.2 = 181 would beat e^5 = 148.
  EXPECT_EQ(free_block(0.65F), 2);
}

TEST(SelectBlocks, ScoresBeyondTheFloatRangeKeepTheirForm) {
  KernelTest kernel;
  // One strong fine window inside a weak coarse one: exp(200 - Z) would be infinite without the
  // limit.
  HandCase c({0, 0, 0, 0, 0, 0, 0, 0, 900, 0, 0, 0, 0, 0});
  c.Select(kernel.ctx(), {{0, c.t}});
  ExpectWellFormed(c);
  EXPECT_EQ(c.FreeBlock(13), 3);  // f_7 = f_8 = 450: blocks 3 and 4 tie at the limit
  // Finite without the limit: f_3 = f_4 = 82 and f_8 = 86, with Z = log(e^-21.5 + 1). Blocks 1, 2
  // and 4 tie at it.
  HandCase d({0, 0, 0, 0, 164, 0, -336, 0, 0, 172, 0, 0, 0, 0});
  d.Select(kernel.ctx(), {{0, d.t}});
  EXPECT_EQ(d.FreeBlock(13), 1);
}

TEST(SelectBlocks, EqualsTheRuleOnRandomInput) {
  KernelTest kernel;
  SparseAttentionConfig wide = SmallConfig();
  wide.init_blocks = 2;
  wide.topk = 9;
  SparseAttentionConfig no_window = SmallConfig();
  no_window.window_size = 0;
  no_window.init_blocks = 0;
  no_window.topk = 4;
  SparseAttentionConfig none_free = SmallConfig();
  none_free.topk = 2;
  for (const SparseAttentionConfig& config : {SmallConfig(), wide, no_window, none_free}) {
    for (const HeadCounts& heads : {HeadCounts{16, 1, 16}, {4, 2, 8}}) {
      SparseCase c(450, heads, config);
      c.Select(kernel.ctx(), {{0, c.t}});
      ExpectWellFormed(c);
      const auto q = c.q.values();
      const auto keys = reference::CompressKeys(c.Shape(), c.k.values(), config);
      for (int64_t t = 0; t < c.t; ++t) {
        for (int64_t g = 0; g < heads.kv; ++g) {
          ExpectChoice(c, reference::Select(c.Shape(), q, keys, config, t, g), t, g);
        }
      }
    }
  }
}

// Documents of 95, 96 and 97 blocks, and of a token less and more, with the released numbers: the
// first and the last token of the blocks around those where not all blocks are forced any more
// (34), where as many lie behind as may be chosen (62), and where one is left out (96).
TEST(SelectBlocks, ReleasedNumbersAtTheBordersOfBlocks) {
  KernelTest kernel;
  const SparseAttentionConfig config;
#ifdef SALA_SANITIZED
  const std::vector<int64_t> lengths = {6143, 6209};
#else
  const std::vector<int64_t> lengths = {6079, 6080, 6081, 6143, 6144, 6145, 6207, 6208, 6209};
#endif
  for (const int64_t n : lengths) {
    SparseCase c(n, {2, 1, 4}, config);
    c.Select(kernel.ctx(), {{0, n}});
    ExpectWellFormed(c);
    const auto q = c.q.values();
    const auto keys = reference::CompressKeys(c.Shape(), c.k.values(), config);
    for (const int64_t block : {31, 32, 33, 34, 35, 61, 62, 63, 64, 93, 94, 95, 96, 97}) {
      for (const int64_t t : {64 * block, 64 * block + 63, n - 1}) {
        if (t >= n) continue;
        const reference::Selection expected = reference::Select(c.Shape(), q, keys, config, t, 0);
        EXPECT_EQ(static_cast<int64_t>(expected.chosen.size()), std::min<int64_t>(96, t / 64 + 1));
        ExpectChoice(c, expected, t, 0);
      }
    }
  }
}

TEST(SelectBlocks, FutureTokensDoNotMatter) {
  KernelTest kernel;
  SparseCase before(400, {4, 2, 8}, SmallConfig());
  before.Select(kernel.ctx(), {{0, 400}});
  SparseCase after(400, {4, 2, 8}, SmallConfig());
  constexpr int64_t kChanged = 250;
  for (int64_t t = kChanged; t < 400; ++t) {
    for (int64_t i = 0; i < after.k.columns(); ++i) after.k.at(t, i) = 10.0F;
    for (int64_t i = 0; i < after.q.columns(); ++i) after.q.at(t, i) = -10.0F;
  }
  after.Select(kernel.ctx(), {{0, 400}});
  const auto row = 2 * before.width();
  EXPECT_TRUE(std::equal(before.chosen.begin(), before.chosen.begin() + kChanged * row,
                         after.chosen.begin()));
  EXPECT_NE(before.chosen, after.chosen);
}

TEST(SelectBlocks, PackedDocumentsChooseAsSeparateOnes) {
  KernelTest kernel;
  const auto documents = DocumentsOf({1, 300, 1, 1, 150, 16, 17}, /*gap=*/3);
  SparseCase packed(documents.back().end + 2, {4, 2, 8}, SmallConfig());
  packed.Select(kernel.ctx(), documents);
  const int64_t row = 2 * packed.width();
  std::vector<bool> used(static_cast<size_t>(packed.t));
  for (const DocumentRange& document : documents) {
    SparseCase alone = packed.SparsePiece(document);
    alone.Select(kernel.ctx(), {{0, alone.t}});
    EXPECT_TRUE(std::equal(alone.chosen.begin(), alone.chosen.end(),
                           packed.chosen.begin() + document.begin * row))
        << "document at " << document.begin;
    for (int64_t t = document.begin; t < document.end; ++t) used[static_cast<size_t>(t)] = true;
  }
  for (int64_t i = 0; i < packed.t * row; ++i) {
    if (!used[static_cast<size_t>(i / row)]) {
      ASSERT_EQ(packed.chosen[static_cast<size_t>(i)], SparseCase::kPoison);
    }
  }
}

}  // namespace
}  // namespace sala::kernels
