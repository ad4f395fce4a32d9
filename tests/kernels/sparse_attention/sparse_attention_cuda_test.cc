#include "tests/kernels/attention/attention_cuda_case.h"
#include "tests/kernels/sparse_attention/sparse_case.h"

namespace sala::kernels {
namespace {

// Blocks are chosen on the CPU (the reference's rule, tested there) and uploaded.
class SparseAttentionCuda : public CudaKernelTest {
 protected:
  static SparseCase NewCase(int64_t tokens, const HeadCounts& heads,
                            const SparseAttentionConfig& config) {
    SparseCase c(tokens, heads, config);
    RoundInputs(c);
    return c;
  }
  void Run(SparseCase& c, const std::vector<DocumentRange>& documents) {
    KernelTest cpu;
    c.Select(cpu.ctx(), documents);
    RunWithBlocks(c, documents);
  }
  template <typename Rows = DeviceMatrix>
  void RunWithBlocks(SparseCase& c, const std::vector<DocumentRange>& documents,
                     bool backward = true) {
    const DeviceAttentionOf<Rows> x(c);
    const DeviceIntegers chosen(c.chosen);
    const ConstTensor blocks = chosen.tensor().Reshape({c.t, c.heads.kv, c.width()});
    SparseAttentionForward(ctx(), x.q(), x.k(), x.v(), documents, c.config, c.scale(), blocks,
                           x.out(), x.lse());
    if (backward) {
      SparseAttentionBackward(ctx(), x.q(), x.k(), x.v(), x.out(), x.lse(), x.dout(), documents,
                              c.config, c.scale(), blocks, x.dq(), x.dk(), x.dv());
    }
    x.Download(c);
  }
};

// Blocks of 64 with a budget of six: 3 local, 1 initial, 2 free; a block is left out from 384 on.
SparseAttentionConfig ShortConfig() {
  SparseAttentionConfig config;
  config.window_size = 128;
  config.topk = 4;
  return config;
}

TEST_F(SparseAttentionCuda, MatchesReferenceWithTheSameBlocks) {
  const std::vector<int64_t> lengths =
      kSlowBuild
          ? std::vector<int64_t>{33, 130}
          : std::vector<int64_t>{1, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 112, 113, 127, 128, 320};
  for (const int64_t n : lengths) {
    for (const HeadCounts& heads : {HeadCounts{16, 1, 16}, {4, 2, 32}}) {
      SCOPED_TRACE(testing::Message() << n << " tokens, head size " << heads.d);
      SparseCase c = NewCase(n, heads, SmallConfig());
      Run(c, {{0, n}});
      ExpectMatchesReferenceInBf16(c, c.SeenKeys());
    }
  }
}

TEST_F(SparseAttentionCuda, BlocksOf64) {
  const std::vector<int64_t> lengths =
      kSlowBuild ? std::vector<int64_t>{65} : std::vector<int64_t>{63, 64, 65, 383, 384, 385, 500};
  for (const int64_t n : lengths) {
    SparseCase c = NewCase(n, {2, 1, 64}, ShortConfig());
    Run(c, {{0, n}});
    ExpectMatchesReferenceInBf16(c, c.SeenKeys());
  }
}

TEST_F(SparseAttentionCuda, HeadsOfTheReleasedModel) {
  SparseCase small = NewCase(kSlowBuild ? 20 : 150, {16, 1, 128}, SmallConfig());
  Run(small, {{0, small.t}});
  ExpectMatchesReferenceInBf16(small, small.SeenKeys());
  if (kSlowBuild) return;
  SparseCase c = NewCase(400, {16, 1, 128}, ShortConfig());
  Run(c, {{0, c.t}});
  ExpectMatchesReferenceInBf16(c, c.SeenKeys());
}

// More than one tile of keys to a block, and blocks that all are forced.
TEST_F(SparseAttentionCuda, OtherBlockNumbers) {
  if (kSlowBuild) GTEST_SKIP() << "no branch of its own";
  SparseAttentionConfig config;
  config.kernel_size = 16;
  config.kernel_stride = 8;
  for (const int64_t block : {32, 128}) {
    config.block_size = block;
    config.window_size = block;
    config.init_blocks = 2;
    config.topk = 4;  // 2 initial, 2 local, 1 free
    SparseCase c = NewCase(8 * block + 5, {2, 1, 16}, config);
    Run(c, {{0, c.t}});
    ExpectMatchesReferenceInBf16(c, c.SeenKeys());
    config.topk = 3;  // none free
    SparseCase forced = NewCase(6 * block, {1, 1, 16}, config);
    Run(forced, {{0, forced.t}});
    ExpectMatchesReferenceInBf16(forced, forced.SeenKeys());
  }
}

// The released numbers of blocks (1 initial, 33 local, 62 free) in blocks of a quarter of the size:
// a block is left out from 1,536 tokens on, and the initial block is local before 544.
TEST_F(SparseAttentionCuda, ReleasedBlockNumbersInSmallBlocks) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  SparseAttentionConfig config = SmallConfig();
  config.window_size = 512;
  config.topk = 64;
  ASSERT_EQ(config.free_blocks(), 62);
  SparseCase c = NewCase(2048, {1, 1, 16}, config);
  Run(c, {{0, c.t}});
  ExpectMatchesReferenceInBf16(c, c.SeenKeys());
}

// The same in blocks of 64: a block is left out from 6,144 tokens on. The forward pass only; rows
// by sample, which stands for all lengths, because a row does not depend on what follows.
TEST_F(SparseAttentionCuda, ReleasedBlockNumbers) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  SparseCase c = NewCase(6209, {1, 1, 16}, SparseAttentionConfig());
  KernelTest cpu;
  c.Select(cpu.ctx(), {{0, c.t}});
  RunWithBlocks(c, {{0, c.t}}, /*backward=*/false);
  const reference::Attends seen = c.SeenKeys();
  const Bf16Reference expected(c, seen, /*statistics_of_case=*/true);
  Comparison out("out");
  for (const int64_t t : {0, 63, 64, 2111, 2112, 2175, 2176, 6143, 6144, 6145, 6150, 6207, 6208}) {
    double lse = 0;
    out.Expect(c.out, t, 0, expected.Out(t, 0, &lse));
    ASSERT_NEAR(c.lse.at(t, 0), lse, expected.LseBound(lse)) << "token " << t;
    ASSERT_EQ(static_cast<int64_t>(c.Seen(t, 0).size()), std::min<int64_t>(96, t / 64 + 1));
  }
  out.ExpectAccepted();
}

// Lists of more than 8,192 tokens: block 1 is chosen by everyone who may. Rows and keys by sample.
TEST_F(SparseAttentionCuda, LongListsInPieces) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  SparseCase c = NewCase(8500, {1, 1, 16}, SmallConfig());
  for (int64_t t = 0; t < c.t; ++t) {
    int32_t* row = c.chosen.data() + t * c.width();
    const int64_t last = t / 16 - 2;  // candidates 1 .. last - 1
    std::fill_n(row, c.width(), kNoBlock);
    if (last > 1) row[0] = 1;
    if (last > 3) row[1] = static_cast<int32_t>(2 + t * 7 % (last - 2));
  }
  RunWithBlocks(c, {{0, c.t}});
  ExpectSampleMatchesReference(c, c.SeenKeys(), {0, 47, 48, 4000, 8191, 8192, 8255, 8499},
                               {0, 15, 16, 31, 32, 4000, 8499});
}

TEST_F(SparseAttentionCuda, NothingToDo) {
  SparseCase none = NewCase(0, {2, 1, 16}, SmallConfig());
  RunWithBlocks(none, {});
  SparseCase c = NewCase(5, {2, 1, 16}, SmallConfig());
  RunWithBlocks(c, {});
  ExpectOnlyUsedWritten(c, Used(c.t, {}));
}

TEST_F(SparseAttentionCuda, PackedDocumentsHaveTheBitsOfSeparateOnes) {
  const auto documents =
      DocumentsOf(kSlowBuild ? std::vector<int64_t>{1, 120, 1}
                             : std::vector<int64_t>{1, 1, 200, 1, 16, 15, 130, 1, 1, 1});
  SparseCase packed = NewCase(documents.back().end, {4, 2, 16}, SmallConfig());
  Run(packed, documents);
  for (const DocumentRange& document : documents) {
    SparseCase alone = packed.SparsePiece(document);
    Run(alone, {{0, alone.t}});
    for (size_t i = 0; i < alone.Results().size(); ++i) {
      EXPECT_TRUE(alone.Results()[i]->SameBits(AttentionCase::Rows(*packed.Results()[i], document)))
          << "result " << i << " of the document at " << document.begin;
    }
  }
}

TEST_F(SparseAttentionCuda, TokensOutsideTheDocumentsAreNeitherReadNorWritten) {
  const auto documents = DocumentsOf({150, 1, 140}, /*gap=*/6);
  const int64_t tokens = documents.back().end + 5;
  SparseCase inside = NewCase(tokens, {4, 2, 16}, SmallConfig());
  Run(inside, documents);
  SparseCase poisoned = NewCase(tokens, {4, 2, 16}, SmallConfig());
  const std::vector<bool> used = Used(tokens, documents);
  PoisonUnused(poisoned, used);
  Run(poisoned, documents);
  ExpectSameResults(inside, poisoned);
  ExpectOnlyUsedWritten(poisoned, used);
}

TEST_F(SparseAttentionCuda, ChangingOneTokenReachesOnlyItsDocument) {
  const auto documents = DocumentsOf({160, 200, 150});
  SparseCase before = NewCase(510, {2, 1, 16}, SmallConfig());
  Run(before, documents);
  SparseCase after = NewCase(510, {2, 1, 16}, SmallConfig());
  constexpr int64_t kChanged = 300;
  for (Matrix* x : {&after.q, &after.k, &after.v, &after.dout}) x->at(kChanged, 3) += 1.0F;
  Run(after, documents);
  for (const DocumentRange& other : {documents[0], documents[2]}) {
    for (size_t i = 0; i < before.Results().size(); ++i) {
      EXPECT_TRUE(AttentionCase::Rows(*before.Results()[i], other)
                      .SameBits(AttentionCase::Rows(*after.Results()[i], other)))
          << "result " << i << " of the document at " << other.begin;
    }
  }
  EXPECT_FALSE(AttentionCase::Rows(before.dk, documents[1])
                   .SameBits(AttentionCase::Rows(after.dk, documents[1])));
}

TEST_F(SparseAttentionCuda, RunsRepeat) {
  const auto documents = DocumentsOf({kSlowBuild ? 120 : 257, 1, kSlowBuild ? 20 : 130});
  SparseCase one = NewCase(documents.back().end, {8, 2, 16}, SmallConfig());
  SparseCase two = NewCase(documents.back().end, {8, 2, 16}, SmallConfig());
  Run(one, documents);
  Run(two, documents);
  ExpectSameResults(one, two);
}

TEST_F(SparseAttentionCuda, DryRunTakesTheSameScratch) {
  const auto documents = DocumentsOf({130, 1, 64});
  SparseCase c = NewCase(documents.back().end, {4, 2, 16}, SmallConfig());
  Run(c, documents);
  const size_t dry = DryScratch(size_t{1} << 16, [&](const Context& dry_ctx, void* memory) {
    const Tensor wide(memory, DType::kBF16, {c.t, 4, 16}, DeviceKind::kCuda);
    const Tensor narrow(memory, DType::kBF16, {c.t, 2, 16}, DeviceKind::kCuda);
    const Tensor lse(memory, DType::kF32, {c.t, 4}, DeviceKind::kCuda);
    const Tensor blocks(memory, DType::kI32, {c.t, 2, c.width()}, DeviceKind::kCuda);
    SparseAttentionForward(dry_ctx, wide, narrow, narrow, documents, c.config, 0.25F, blocks, wide,
                           lse);
    SparseAttentionBackward(dry_ctx, wide, narrow, narrow, wide, lse, wide, documents, c.config,
                            0.25F, blocks, wide, narrow, narrow);
  });
  EXPECT_EQ(dry, ctx().scratch->peak_bytes());
}

TEST_F(SparseAttentionCuda, TokensMayLieFarApart) {
  if (!FarMatrix::Possible()) GTEST_SKIP() << "no such memory here";
  const auto documents = DocumentsOf({130, 3});
  SparseCase near = NewCase(documents.back().end, {4, 2, 16}, SmallConfig());
  Run(near, documents);
  SparseCase far = NewCase(documents.back().end, {4, 2, 16}, SmallConfig());
  far.chosen = near.chosen;
  RunWithBlocks<FarMatrix>(far, documents);
  ExpectSameResults(near, far);
}

TEST_F(SparseAttentionCuda, BlocksNobodySelectedGetNoGradient) {
  SparseCase c = NewCase(320, {4, 1, 16}, SmallConfig());
  // Only the last token is looked at, so the blocks it left out are in nobody's list.
  for (int64_t t = 0; t + 1 < c.t; ++t) {
    for (int64_t i = 0; i < c.dout.columns(); ++i) c.dout.at(t, i) = 0.0F;
  }
  Run(c, {{0, c.t}});
  const std::vector<int64_t> seen = c.Seen(c.t - 1, 0);
  ASSERT_EQ(seen.size(), 7U);
  for (int64_t t = 0; t < c.t; ++t) {
    const bool in_list = std::binary_search(seen.begin(), seen.end(), t / c.config.block_size);
    for (int64_t i = 0; i < c.dk.columns(); ++i) {
      ASSERT_EQ(c.dv.at(t, i) != 0.0F, in_list) << t;
      ASSERT_EQ(c.dk.at(t, i) != 0.0F, in_list) << t;
    }
  }
}

// The CPU aborts; a GPU cannot, and must not leave its memory.
TEST_F(SparseAttentionCuda, BlocksThatCannotBeFreeArePassedOver) {
  SparseCase c = NewCase(200, {2, 1, 16}, SmallConfig());
  Run(c, {{0, c.t}});
  SparseCase wrong = NewCase(200, {2, 1, 16}, SmallConfig());
  wrong.chosen = c.chosen;
  for (int64_t t = 0; t < 48; ++t) {  // no free blocks there
    int32_t* row = wrong.chosen.data() + t * wrong.width();
    row[0] = 0;
    row[1] = 1 << 30;
    row[2] = -5;
  }
  RunWithBlocks(wrong, {{0, c.t}});
  ExpectSameResults(c, wrong);
}

using SparseAttentionCudaDeathTest = SparseAttentionCuda;

TEST_F(SparseAttentionCudaDeathTest, ShapesThatDoNotFitAbort) {
  SparseCase c = NewCase(3, {17, 1, 16}, SmallConfig());
  EXPECT_DEATH(Run(c, {{0, 3}}), "17 query heads to a key/value head, expected at most 16");
}

}  // namespace
}  // namespace sala::kernels
