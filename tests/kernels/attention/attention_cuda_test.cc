#include "tests/kernels/attention/attention_cuda_case.h"

namespace sala::kernels {
namespace {

class AttentionCuda : public CudaKernelTest {
 protected:
  template <typename Rows = DeviceMatrix>
  void Run(AttentionCase& c, const std::vector<DocumentRange>& documents) {
    const DeviceAttentionOf<Rows> x(c);
    AttentionForward(ctx(), x.q(), x.k(), x.v(), documents, c.scale(), x.out(), x.lse());
    AttentionBackward(ctx(), x.q(), x.k(), x.v(), x.out(), x.lse(), x.dout(), documents, c.scale(),
                      x.dq(), x.dk(), x.dv());
    x.Download(c);
  }
  static AttentionCase NewCase(int64_t tokens, const HeadCounts& heads) {
    AttentionCase c(tokens, heads);
    RoundInputs(c);
    return c;
  }
};

TEST_F(AttentionCuda, MatchesReferenceAtTheEdgeLengths) {
  const std::vector<int64_t> lengths =
      kSlowBuild ? std::vector<int64_t>{1, 65}
                 : std::vector<int64_t>{1, 2, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129};
  for (const int64_t n : lengths) {
    for (const HeadCounts& heads : {HeadCounts{4, 2, 16}, {1, 1, 32}, {3, 1, 64}, {2, 2, 128}}) {
      SCOPED_TRACE(testing::Message() << n << " tokens, head size " << heads.d);
      AttentionCase c = NewCase(n, heads);
      Run(c, {{0, n}});
      ExpectMatchesReferenceInBf16(c);
    }
  }
}

TEST_F(AttentionCuda, HeadsOfTheReleasedModel) {
  const std::vector<int64_t> lengths =
      kSlowBuild ? std::vector<int64_t>{65} : std::vector<int64_t>{1, 64, 65, 129};
  for (const int64_t n : lengths) {
    AttentionCase c = NewCase(n, {16, 1, 128});
    Run(c, {{0, n}});
    ExpectMatchesReferenceInBf16(c);
  }
}

// Several tiles of queries and keys, and more heads in a group than a warp has rows.
TEST_F(AttentionCuda, LongerDocuments) {
  for (const HeadCounts& heads : {HeadCounts{2, 1, 32}, {20, 1, 16}}) {
    AttentionCase c = NewCase(kSlowBuild ? 150 : 400, heads);
    Run(c, {{0, c.t}});
    ExpectMatchesReferenceInBf16(c);
  }
}

// 64 heads to a key/value head: more than 512 tokens come in pieces that are added at the end.
TEST_F(AttentionCuda, SumsOfKeysInPieces) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  AttentionCase c = NewCase(530, {64, 1, 16});
  Run(c, {{0, c.t}});
  ExpectSampleMatchesReference(c, reference::AttendsAll, {0, 63, 64, 511, 512, 529},
                               {0, 17, 18, 63, 64, 300, 511, 512, 529});
}

TEST_F(AttentionCuda, NothingToDo) {
  AttentionCase none = NewCase(0, {2, 1, 16});
  Run(none, {});
  AttentionCase c = NewCase(5, {2, 1, 16});
  Run(c, {});
  ExpectOnlyUsedWritten(c, Used(c.t, {}));
}

TEST_F(AttentionCuda, PackedDocumentsHaveTheBitsOfSeparateOnes) {
  const auto documents =
      DocumentsOf(kSlowBuild ? std::vector<int64_t>{1, 65, 1}
                             : std::vector<int64_t>{1, 1, 1, 64, 63, 1, 130, 2, 65, 128, 1, 1});
  AttentionCase packed = NewCase(documents.back().end, {4, 2, 32});
  Run(packed, documents);
  for (const DocumentRange& document : documents) {
    AttentionCase alone = packed.Piece(document);
    Run(alone, {{0, alone.t}});
    for (size_t i = 0; i < alone.Results().size(); ++i) {
      EXPECT_TRUE(alone.Results()[i]->SameBits(AttentionCase::Rows(*packed.Results()[i], document)))
          << "result " << i << " of the document at " << document.begin;
    }
  }
}

TEST_F(AttentionCuda, ManyDocumentsOfOneToken) {
  std::vector<int64_t> lengths(kSlowBuild ? 5 : 70, 1);
  const auto documents = DocumentsOf(lengths);
  AttentionCase c = NewCase(documents.back().end, {2, 1, 16});
  Run(c, documents);
  for (int64_t t = 0; t < c.t; ++t) {  // one key: its value, and no gradient of the scores
    for (int64_t i = 0; i < 32; ++i) {
      ASSERT_EQ(c.out.at(t, i), c.v.at(t, i % 16));
      ASSERT_NEAR(c.dq.at(t, i), 0.0F, 1e-5F);
    }
  }
}

TEST_F(AttentionCuda, TokensOutsideTheDocumentsAreNeitherReadNorWritten) {
  const auto documents = DocumentsOf({70, 1, 64, 3}, /*gap=*/9);
  const int64_t tokens = documents.back().end + 4;
  AttentionCase inside = NewCase(tokens, {4, 2, 16});
  Run(inside, documents);
  AttentionCase poisoned = NewCase(tokens, {4, 2, 16});
  const std::vector<bool> used = Used(tokens, documents);
  PoisonUnused(poisoned, used);
  Run(poisoned, documents);
  ExpectSameResults(inside, poisoned);  // with the NaN of unused tokens, which have one bit pattern
  ExpectOnlyUsedWritten(poisoned, used);
}

TEST_F(AttentionCuda, ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens) {
  const auto documents = DocumentsOf({100, 90, 110});
  AttentionCase before = NewCase(300, {4, 2, 16});
  Run(before, documents);
  AttentionCase after = NewCase(300, {4, 2, 16});
  constexpr int64_t kChanged = 150;
  for (Matrix* x : {&after.q, &after.k, &after.v, &after.dout}) x->at(kChanged, 3) += 1.0F;
  Run(after, documents);
  for (const DocumentRange& other : {documents[0], documents[2]}) {
    for (size_t i = 0; i < before.Results().size(); ++i) {
      EXPECT_TRUE(AttentionCase::Rows(*before.Results()[i], other)
                      .SameBits(AttentionCase::Rows(*after.Results()[i], other)))
          << "result " << i << " of the document at " << other.begin;
    }
  }
  const DocumentRange earlier = {documents[1].begin, kChanged};
  EXPECT_TRUE(
      AttentionCase::Rows(before.out, earlier).SameBits(AttentionCase::Rows(after.out, earlier)));
  const DocumentRange later = {kChanged, documents[1].end};
  EXPECT_FALSE(
      AttentionCase::Rows(before.out, later).SameBits(AttentionCase::Rows(after.out, later)));
}

TEST_F(AttentionCuda, RunsRepeat) {
  const auto documents = DocumentsOf({130, 1, 64});
  AttentionCase one = NewCase(documents.back().end, {8, 2, 16});
  AttentionCase two = NewCase(documents.back().end, {8, 2, 16});
  Run(one, documents);
  Run(two, documents);
  ExpectSameResults(one, two);
}

TEST_F(AttentionCuda, DryRunTakesTheSameScratch) {
  const auto documents = DocumentsOf({130, 1, 64});
  AttentionCase c = NewCase(documents.back().end, {4, 2, 16});
  Run(c, documents);
  const size_t dry = DryScratch(size_t{1} << 16, [&](const Context& dry_ctx, void* memory) {
    const Tensor wide(memory, DType::kBF16, {c.t, 4, 16}, DeviceKind::kCuda);
    const Tensor narrow(memory, DType::kBF16, {c.t, 2, 16}, DeviceKind::kCuda);
    const Tensor lse(memory, DType::kF32, {c.t, 4}, DeviceKind::kCuda);
    AttentionForward(dry_ctx, wide, narrow, narrow, documents, 0.25F, wide, lse);
    AttentionBackward(dry_ctx, wide, narrow, narrow, wide, lse, wide, documents, 0.25F, wide,
                      narrow, narrow);
  });
  EXPECT_EQ(dry, ctx().scratch->peak_bytes());
}

TEST_F(AttentionCuda, TokensMayLieFarApart) {
  if (!FarMatrix::Possible()) GTEST_SKIP() << "no such memory here";
  const auto documents = DocumentsOf({70, 3});
  AttentionCase near = NewCase(documents.back().end, {4, 2, 16});
  AttentionCase far = NewCase(documents.back().end, {4, 2, 16});
  Run(near, documents);
  Run<FarMatrix>(far, documents);
  ExpectSameResults(near, far);
}

TEST_F(AttentionCuda, LargeScoresStayFinite) {
  AttentionCase c = NewCase(140, {2, 1, 16});
  for (int64_t t = 0; t < c.t; ++t) {
    for (int64_t i = 0; i < c.q.columns(); ++i) c.q.at(t, i) *= 1024.0F;
  }
  Run(c, {{0, c.t}});
  for (const Matrix* result : c.Results()) {
    for (double x : result->values()) ASSERT_TRUE(std::isfinite(x));
  }
}

using AttentionCudaDeathTest = AttentionCuda;

TEST_F(AttentionCudaDeathTest, ShapesThatDoNotFitAbort) {
  AttentionCase c = NewCase(3, {2, 1, 24});
  EXPECT_DEATH(Run(c, {{0, 3}}), "head size 24, expected 16, 32, 64 or 128");
}

}  // namespace
}  // namespace sala::kernels
