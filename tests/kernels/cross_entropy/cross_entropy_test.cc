#include "kernels/cross_entropy/cross_entropy.h"

#include <memory>

#include "kernels/cross_entropy/reference.h"
#include "tests/kernels/common/kernel_test.h"
#include "tests/kernels/common/rank_threads.h"

namespace sala::kernels {
namespace {

constexpr int64_t kWidth = 19;
constexpr int64_t kVocabulary = 67;
constexpr float kLogitScale = 0.5F;
constexpr float kGradScale = 0.125F;

// The loss and the probabilities inherit the logits' absolute error (twice: label and log-sum-exp),
// besides exp's 4 roundings and 80 of a block's sum.
double LossError(const Matrix& hidden, const Matrix& weight) {
  return 2 * LogitError(hidden, weight, kLogitScale) + 84 * kF32Round;
}

struct Problem {
  explicit Problem(int64_t n, uint32_t seed = 41) : tokens(n) {
    std::mt19937 rng(seed);
    hidden = Matrix::Random(n, kWidth, rng, 3);
    weight = Matrix::Random(kVocabulary, kWidth, rng, 1);
    std::uniform_int_distribution<int32_t> pick(-1, kVocabulary - 1);
    labels.resize(static_cast<size_t>(n) + 1);
    for (int32_t& l : labels) l = pick(rng);
    if (n > 2) labels[2] = -1;
  }
  sala::Tensor label_tensor() { return sala::Tensor(labels.data(), {tokens}); }
  int64_t tokens;
  Matrix hidden{1, 1};
  Matrix weight{1, 1};
  std::vector<int32_t> labels;
};

struct Found {
  explicit Found(int64_t tokens) : token_loss(1, tokens), dhidden(tokens, kWidth, 2) {}
  CrossEntropyResult result;
  Matrix token_loss;
  Matrix dhidden;
  Matrix dweight = Matrix::Filled(kVocabulary, kWidth, 0.25F, 1);
};

Found Compute(Problem& p, int64_t chunk, int threads = 1) {
  Found found(p.tokens);
  KernelTest test(threads);
  const CrossEntropyOptions options{kLogitScale, kGradScale, chunk};
  found.result =
      CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(), options,
                   found.token_loss.vector(), found.dhidden.tensor(), found.dweight.tensor());
  EXPECT_EQ(test.arena().used_bytes(), 0U);
  return found;
}

TEST(CrossEntropy, AgreesWithReference) {
  for (int64_t tokens : EdgeSizes()) {
    Problem p(tokens);
    const auto h = p.hidden.values();
    const auto w = p.weight.values();
    const double loss = reference::CrossEntropyForward(tokens, kWidth, kVocabulary, kLogitScale,
                                                       h.data(), w.data(), p.labels.data());
    std::vector<double> dh(h.size());
    std::vector<double> dw(w.size(), 0.25);
    reference::CrossEntropyBackward(tokens, kWidth, kVocabulary, kLogitScale, kGradScale, h.data(),
                                    w.data(), p.labels.data(), dh.data(), dw.data());
    Found found = Compute(p, 16);
    const double loss_error = LossError(p.hidden, p.weight);
    EXPECT_NEAR(found.result.loss_sum, loss, static_cast<double>(tokens) * loss_error);
    // A row of dlogits has absolute values summing to at most 2 grad_scale, relative error
    // loss_error; the product with the weight sums kVocabulary terms.
    const double dlogits_error = 2 * kGradScale * (loss_error + kVocabulary * kF32Round);
    ExpectClose(found.dhidden, dh, [&](size_t) { return kLogitScale * 5 * dlogits_error; });
    const auto t = static_cast<double>(tokens);
    ExpectClose(found.dweight, dw, [&](size_t i) {
      return kLogitScale * 5 * kGradScale * t * (loss_error + t * kF32Round) +
             (t / 16 + 2) * kF32Round * (std::abs(dw[i]) + kLogitScale * 5 * kGradScale * t);
    });
    EXPECT_TRUE(found.dhidden.GapsUntouched() && found.dweight.GapsUntouched());
  }
}

TEST(CrossEntropy, CountsTargetsAndCorrectOnes) {
  // Identity weights: the logits are the hidden states.
  Matrix hidden = Matrix::Filled(4, 3, 0);
  Matrix weight = Matrix::Filled(3, 3, 0);
  for (int64_t i = 0; i < 3; ++i) weight.at(i, i) = 1;
  hidden.at(0, 2) = 1;  // arg-max 2
  hidden.at(1, 1) = 1;  // arg-max 1
  hidden.at(2, 1) = 2;  // a tie of 1 and 2 goes to 1
  hidden.at(2, 2) = 2;
  std::vector<int32_t> labels = {2, 0, 1, -1};
  KernelTest test;
  Matrix token_loss(1, 4);
  const CrossEntropyResult result =
      CrossEntropy(test.ctx(), hidden.tensor(), weight.tensor(), sala::Tensor(labels.data(), {4}),
                   {}, token_loss.vector(), {}, {});
  EXPECT_EQ(result.targets, 3);
  EXPECT_EQ(result.correct, 2);
  // Exact inputs: exp's 4 roundings, the sum's few, and the rounding of the loss to float32.
  const double bound = 10 * kF32Round;
  EXPECT_NEAR(token_loss.at(0, 0), std::log(2 + std::exp(1.0)) - 1, bound);
  EXPECT_NEAR(token_loss.at(0, 1), std::log(2 + std::exp(1.0)), bound);
  EXPECT_NEAR(token_loss.at(0, 2), std::log(1 + 2 * std::exp(2.0)) - 2, bound);
  EXPECT_EQ(token_loss.at(0, 3), 0.0F);
}

TEST(CrossEntropy, ChunksAndThreadsDoNotChangeLossAndHiddenGradient) {
  Problem p(129);
  Found one = Compute(p, 512);
  for (int64_t chunk : {1, 7, 64, 128, 129, 130}) {
    Found other = Compute(p, chunk, chunk == 64 ? 3 : 1);
    EXPECT_EQ(one.result.loss_sum, other.result.loss_sum) << chunk;
    EXPECT_EQ(one.result.correct, other.result.correct);
    EXPECT_TRUE(one.token_loss.SameBits(other.token_loss)) << chunk;
    EXPECT_TRUE(one.dhidden.SameBits(other.dhidden)) << chunk;
    // dweight adds the chunks' float32 sums: 129 products and at most 129 chunks, terms below 5
    // kGradScale kLogitScale.
    const auto expected = one.dweight.values();
    ExpectClose(other.dweight, expected, [&](size_t) {
      return 2 * 129 * kF32Round * (0.25 + 129 * 5 * kGradScale * kLogitScale);
    });
  }
  Found threads = Compute(p, 512, 3);
  EXPECT_TRUE(one.dweight.SameBits(threads.dweight));
}

TEST(CrossEntropy, EachOutputMayBeLeftOut) {
  Problem p(33);
  Found all = Compute(p, 16);
  KernelTest test;
  const CrossEntropyOptions options{kLogitScale, kGradScale, 16};
  const auto loss_only = CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(),
                                      p.label_tensor(), options, {}, {}, {});
  EXPECT_EQ(loss_only.loss_sum, all.result.loss_sum);
  Matrix dhidden(33, kWidth);
  CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(), options, {},
               dhidden.tensor(), {});
  EXPECT_TRUE(dhidden.SameBits(all.dhidden));
  Matrix dweight = Matrix::Filled(kVocabulary, kWidth, 0.25F);
  CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(), options, {}, {},
               dweight.tensor());
  EXPECT_TRUE(dweight.SameBits(all.dweight));
}

TEST(CrossEntropy, TokensWithoutTargetGetNoGradient) {
  Problem p(40);
  Found found = Compute(p, 16);
  for (int64_t t = 0; t < 40; ++t) {
    if (p.labels[static_cast<size_t>(t)] >= 0) continue;
    for (int64_t i = 0; i < kWidth; ++i) ASSERT_EQ(found.dhidden.at(t, i), 0.0F);
    ASSERT_EQ(found.token_loss.at(0, t), 0.0F);
  }
}

TEST(CrossEntropy, LargeLogitsStayFinite) {
  Problem p(5);
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t i = 0; i < kWidth; ++i) p.hidden.at(t, i) *= 1e4F;
  }
  Found found = Compute(p, 2);
  EXPECT_TRUE(std::isfinite(found.result.loss_sum));
  for (float g : found.dhidden.values<float>()) ASSERT_TRUE(std::isfinite(g));
  p.hidden.at(0, 0) = std::numeric_limits<float>::quiet_NaN();
  p.labels[0] = 1;
  EXPECT_TRUE(std::isnan(Compute(p, 2).result.loss_sum));
}

TEST(CrossEntropy, ReferenceBackwardEqualsComplexStep) {
  constexpr int64_t kT = 4;
  constexpr int64_t kW = 3;
  constexpr int64_t kV = 5;
  using C = std::complex<double>;
  std::mt19937 rng(43);
  const auto h = Matrix::Random(kT, kW, rng).values();
  const auto w = Matrix::Random(kV, kW, rng).values();
  const std::vector<int32_t> labels = {3, -1, 0, 4};
  const std::vector<C> hc(h.begin(), h.end());
  const std::vector<C> wc(w.begin(), w.end());
  std::vector<double> dh(h.size());
  std::vector<double> dw(w.size());
  reference::CrossEntropyBackward(kT, kW, kV, 0.7, 1.3, h.data(), w.data(), labels.data(),
                                  dh.data(), dw.data());
  const auto loss = [&](const std::vector<C>& hidden, const std::vector<C>& weight) {
    return 1.3 * reference::CrossEntropyForward(kT, kW, kV, 0.7, hidden.data(), weight.data(),
                                                labels.data());
  };
  ExpectSameGradient(dh, ComplexStep(h, [&](const auto& z) { return loss(z, wc); }));
  ExpectSameGradient(dw, ComplexStep(w, [&](const auto& z) { return loss(hc, z); }));
}

// ---- cut over ranks ----

struct Sharded {
  explicit Sharded(int64_t n) : exchanged(n), ranks(static_cast<size_t>(n)) {}
  RankThreads exchanged;
  struct Rank {
    CrossEntropyResult result;
    Matrix token_loss{1, 0}, dhidden{1, 1}, dweight{1, 1};
  };
  std::vector<Rank> ranks;
};

// The first `vocabulary` rows of p.weight, cut in equal parts for `ranks` ranks; the padding behind
// them holds NaN, which nothing may read.
std::unique_ptr<Sharded> ComputeSharded(Problem& p, int64_t vocabulary, int64_t ranks,
                                        int64_t chunk) {
  const int64_t rows = (vocabulary + ranks - 1) / ranks;
  auto found = std::make_unique<Sharded>(ranks);
  found->exchanged.Run([&](const RankExchange& exchange) {
    const int64_t first = exchange.rank * rows;
    Matrix weight = Matrix::Filled(rows, kWidth, NAN, 1);
    for (int64_t r = 0; r < std::min(rows, vocabulary - first); ++r) {
      for (int64_t i = 0; i < kWidth; ++i) weight.at(r, i) = p.weight.at(first + r, i);
    }
    Sharded::Rank& mine = found->ranks[static_cast<size_t>(exchange.rank)];
    mine = {{},
            Matrix(1, p.tokens),
            Matrix(p.tokens, kWidth, 2),
            Matrix::Filled(rows, kWidth, 0.25F, 1)};
    KernelTest test(exchange.rank == 1 ? 3 : 1);
    const CrossEntropyOptions options = {
        kLogitScale, kGradScale, chunk, {first, vocabulary, &exchange}};
    mine.result =
        CrossEntropy(test.ctx(), p.hidden.tensor(), weight.tensor(), p.label_tensor(), options,
                     mine.token_loss.vector(), mine.dhidden.tensor(), mine.dweight.tensor());
    EXPECT_EQ(test.arena().used_bytes(), 0U);
  });
  return found;
}

void ExpectShardsRight(Problem& p, int64_t vocabulary, int64_t ranks, int64_t chunk) {
  SCOPED_TRACE(testing::Message() << p.tokens << " tokens, " << vocabulary << " entries, " << ranks
                                  << " ranks");
  const auto h = p.hidden.values();
  const auto w = p.weight.values();
  const double loss = reference::CrossEntropyForward(p.tokens, kWidth, vocabulary, kLogitScale,
                                                     h.data(), w.data(), p.labels.data());
  std::vector<double> dh(h.size());
  std::vector<double> dw(static_cast<size_t>(vocabulary * kWidth), 0.25);
  reference::CrossEntropyBackward(p.tokens, kWidth, vocabulary, kLogitScale, kGradScale, h.data(),
                                  w.data(), p.labels.data(), dh.data(), dw.data());
  const auto sharded = ComputeSharded(p, vocabulary, ranks, chunk);
  const auto& found = sharded->ranks;

  // The whole vocabulary in one weight: the same sums, cut in other places.
  KernelTest test;
  Matrix token_loss(1, p.tokens);
  const CrossEntropyResult whole =
      CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor().Rows(0, vocabulary),
                   p.label_tensor(), {kLogitScale, kGradScale, chunk}, token_loss.vector(), {}, {});

  // The bounds of the whole vocabulary: what joins the ranks' parts is float64.
  const double loss_error = LossError(p.hidden, p.weight);
  const auto t = static_cast<double>(p.tokens);
  EXPECT_NEAR(found[0].result.loss_sum, loss, t * loss_error);
  for (const auto& mine : found) {
    EXPECT_EQ(mine.result.loss_sum, found[0].result.loss_sum);
    EXPECT_EQ(mine.result.targets, whole.targets);
    EXPECT_EQ(mine.result.correct, whole.correct);
    EXPECT_TRUE(mine.token_loss.SameBits(found[0].token_loss));
    EXPECT_TRUE(mine.dhidden.GapsUntouched() && mine.dweight.GapsUntouched());
  }
  // Two sums of one row, each with the error of a loss but for the logits', which are the same.
  ExpectClose(found[0].token_loss, token_loss.values(), [&](size_t i) {
    return (2 * 84 + 2 * std::abs(token_loss.at(0, static_cast<int64_t>(i)))) * kF32Round;
  });

  Matrix dhidden(p.tokens, kWidth);
  for (int64_t r = 0; r < p.tokens; ++r) {
    for (int64_t i = 0; i < kWidth; ++i) {
      double sum = 0;
      for (const auto& mine : found) sum += static_cast<double>(mine.dhidden.at(r, i));
      dhidden.at(r, i) = static_cast<float>(sum);
    }
  }
  const double dlogits_error = 2 * kGradScale * (loss_error + kVocabulary * kF32Round);
  ExpectClose(dhidden, dh, [&](size_t) { return kLogitScale * 5 * dlogits_error; });
  const int64_t rows = found[0].dweight.rows();
  Matrix dweight(vocabulary, kWidth);
  for (int64_t r = 0; r < rows * ranks; ++r) {
    const Matrix& part = found[static_cast<size_t>(r / rows)].dweight;
    for (int64_t i = 0; i < kWidth; ++i) {
      if (r < vocabulary) {
        dweight.at(r, i) = part.at(r % rows, i);
      } else {
        ASSERT_EQ(part.at(r % rows, i), 0.25F) << "padding";
      }
    }
  }
  ExpectClose(dweight, dw, [&](size_t i) {
    return kLogitScale * 5 * kGradScale * t * (loss_error + t * kF32Round) +
           (t / 16 + 2) * kF32Round * (std::abs(dw[i]) + kLogitScale * 5 * kGradScale * t);
  });

  std::vector<int64_t> sizes;
  for (int64_t begin = 0; begin < p.tokens; begin += chunk) {
    sizes.push_back(5 * std::min(chunk, p.tokens - begin));
  }
  EXPECT_EQ(sharded->exchanged.sizes(), sizes);
}

// 37 entries on 4 ranks: 10 rows each, 3 of padding. 5 on 4: the last rank has nothing but padding.
TEST(CrossEntropyShards, AgreeWithReference) {
  for (int64_t tokens : {0, 1, 33, 65}) {
    for (int64_t vocabulary : {int64_t{5}, int64_t{37}, kVocabulary}) {
      Problem p(tokens);
      for (int32_t& label : p.labels) label %= static_cast<int32_t>(vocabulary);
      for (int64_t ranks : {1, 2, 3, 4}) ExpectShardsRight(p, vocabulary, ranks, 16);
    }
  }
}

TEST(CrossEntropyShards, AllLabelsOnOneRankOrNone) {
  Problem p(9);
  for (int32_t label : {0, 36, -1}) {
    for (int32_t& l : p.labels) l = label;
    for (int64_t ranks : {2, 4}) ExpectShardsRight(p, 37, ranks, 4);
  }
}

TEST(CrossEntropyShards, TiesGoToTheLowestIdOfAllRanks) {
  // The logits are the first column of the weight: the largest ones at entries 17 and 30 (ranks 1
  // and 3 of 4, 0 and 1 of 2).
  Problem p(2);
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t i = 0; i < kWidth; ++i) p.hidden.at(t, i) = i == 0 ? 1.0F : 0.0F;
  }
  for (int64_t v = 0; v < kVocabulary; ++v) p.weight.at(v, 0) = -1;
  p.weight.at(17, 0) = p.weight.at(30, 0) = 2;
  p.labels = {17, 30, -1};
  for (int64_t ranks : {1, 2, 3, 4}) {
    const auto found = ComputeSharded(p, 37, ranks, 16);
    for (const auto& mine : found->ranks) {
      EXPECT_EQ(mine.result.correct, 1);
      EXPECT_EQ(mine.token_loss.at(0, 0), mine.token_loss.at(0, 1));
    }
  }
  p.labels = {30, 30, -1};
  EXPECT_EQ(ComputeSharded(p, 37, 4, 16)->ranks[2].result.correct, 0);
}

// A rank whose logits all overflow takes no part; a NaN of one rank reaches all.
TEST(CrossEntropyShards, InfinityAndNan) {
  Problem p(1);
  for (int64_t i = 0; i < kWidth; ++i) p.hidden.at(0, i) = i == 0 ? 16.0F : 0.0F;
  for (int64_t v = 0; v < 37; ++v) p.weight.at(v, 0) = v >= 10 && v < 20 ? -3e38F : 0.0F;
  p.labels = {3, -1};
  const auto found = ComputeSharded(p, 37, 4, 16);
  for (const auto& mine : found->ranks) {
    // 27 equal logits; the rounding of the loss to float32 and few others.
    EXPECT_NEAR(mine.token_loss.at(0, 0), std::log(27.0), 10 * kF32Round);
    for (const float g : mine.dhidden.values<float>()) ASSERT_TRUE(std::isfinite(g));
  }
  p.weight.at(25, 0) = NAN;
  const auto spoiled = ComputeSharded(p, 37, 4, 16);
  for (const auto& mine : spoiled->ranks) EXPECT_TRUE(std::isnan(mine.result.loss_sum));
}

TEST(CrossEntropyShards, PaddingOfOneRankChangesNoBit) {
  constexpr int64_t kEntries = 61;
  Problem p(33);
  for (int32_t& label : p.labels) label %= kEntries;
  KernelTest test;
  Matrix token_loss(1, 33), dhidden(33, kWidth), padded_loss(1, 33), padded_dhidden(33, kWidth);
  Matrix dweight = Matrix::Filled(kEntries, kWidth, 0.25F);
  Matrix padded_dweight = Matrix::Filled(kVocabulary, kWidth, 0.25F);
  CrossEntropyOptions options = {kLogitScale, kGradScale, 16};
  const CrossEntropyResult result = CrossEntropy(
      test.ctx(), p.hidden.tensor(), p.weight.tensor().Rows(0, kEntries), p.label_tensor(), options,
      token_loss.vector(), dhidden.tensor(), dweight.tensor());
  for (int64_t v = kEntries; v < kVocabulary; ++v) p.weight.at(v, 0) = NAN;
  options.shard.vocab = kEntries;
  const CrossEntropyResult padded =
      CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(), options,
                   padded_loss.vector(), padded_dhidden.tensor(), padded_dweight.tensor());
  EXPECT_EQ(padded.loss_sum, result.loss_sum);
  EXPECT_EQ(padded.correct, result.correct);
  EXPECT_TRUE(padded_loss.SameBits(token_loss));
  EXPECT_TRUE(padded_dhidden.SameBits(dhidden));
  for (int64_t v = 0; v < kVocabulary; ++v) {
    for (int64_t i = 0; i < kWidth; ++i) {
      ASSERT_EQ(padded_dweight.at(v, i), v < kEntries ? dweight.at(v, i) : 0.25F);
    }
  }
}

TEST(CrossEntropyShardsDeathTest, RefusesShardsThatDoNotFit) {
  Problem p(1);
  KernelTest test;
  const auto run = [&](const VocabularyShard& shard) {
    CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(),
                 {.shard = shard}, {}, {}, {});
  };
  const RankExchange deaf = {.rank = 0, .ranks = 2, .gather = nullptr};
  const RankExchange two = {.rank = 0, .ranks = 2, .gather = [](auto&&...) {}};
  EXPECT_DEATH(run({.vocab = 68}), "without an exchange");
  EXPECT_DEATH(run({.first_row = 67, .vocab = 134}), "without an exchange");
  EXPECT_DEATH(run({.vocab = 134, .exchange = &deaf}), "no way to gather");
  EXPECT_DEATH(run({.exchange = &two}), "needs its size");
  p.labels[0] = 66;
  EXPECT_DEATH(run({.vocab = 66}), "label 66 at 0, vocabulary 66");
}

}  // namespace
}  // namespace sala::kernels
