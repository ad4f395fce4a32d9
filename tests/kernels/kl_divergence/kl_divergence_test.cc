#include "kernels/kl_divergence/kl_divergence.h"

#include <memory>
#include <numeric>

#include "kernels/kl_divergence/reference.h"
#include "tests/kernels/common/kernel_test.h"
#include "tests/kernels/common/rank_threads.h"

namespace sala::kernels {
namespace {

constexpr int64_t kTeacherWidth = 11;
constexpr int64_t kWidth = 17;
constexpr int64_t kVocabulary = 61;
constexpr float kTeacherScale = 0.5F;
constexpr float kStudentScale = 0.25F;
constexpr float kGradScale = 0.125F;

struct Problem {
  explicit Problem(int64_t n) : tokens(n) {
    std::mt19937 rng(51);
    teacher_hidden = Matrix::Random(n, kTeacherWidth, rng, 1);
    teacher_weight = Matrix::Random(kVocabulary, kTeacherWidth, rng, 2);
    hidden = Matrix::Random(n, kWidth, rng, 3);
    weight = Matrix::Random(kVocabulary, kWidth, rng, 1);
  }
  int64_t tokens;
  Matrix teacher_hidden{1, 1}, teacher_weight{1, 1}, hidden{1, 1}, weight{1, 1};
};

struct Found {
  explicit Found(int64_t tokens) : dhidden(tokens, kWidth, 2) {}
  KlDivergenceResult result;
  Matrix dhidden;
  Matrix dweight = Matrix::Filled(kVocabulary, kWidth, 0.25F, 1);
};

Found Compute(Problem& p, int64_t chunk, float tau, int threads = 1) {
  Found found(p.tokens);
  KernelTest test(threads);
  const KlDivergenceOptions options{kTeacherScale, kStudentScale, tau, kGradScale, chunk};
  found.result = KlDivergence(test.ctx(), p.teacher_hidden.tensor(), p.teacher_weight.tensor(),
                              p.hidden.tensor(), p.weight.tensor(), options, found.dhidden.tensor(),
                              found.dweight.tensor());
  EXPECT_EQ(test.arena().used_bytes(), 0U);
  return found;
}

struct Expected {
  double loss = 0;
  double entropy = 0;
  int64_t agree = 0;
  double range =
      0;  // bound of |log p - log q| and of log p: twice the sum of the largest logits / tau
  std::vector<double> dhidden;
  std::vector<double> dweight;
};

// Of the first `vocabulary` entries.
Expected Direct(const Problem& p, double tau, int64_t vocabulary = kVocabulary) {
  const auto th = p.teacher_hidden.values();
  const auto tw = p.teacher_weight.values();
  const auto h = p.hidden.values();
  const auto w = p.weight.values();
  const auto teacher =
      reference::Logits(p.tokens, kTeacherWidth, vocabulary, kTeacherScale, th.data(), tw.data());
  const auto student =
      reference::Logits(p.tokens, kWidth, vocabulary, kStudentScale, h.data(), w.data());
  Expected e;
  const auto largest = [](const std::vector<double>& logits) {
    double m = 0;
    for (double x : logits) m = std::max(m, std::abs(x));
    return m;
  };
  e.range =
      std::log(static_cast<double>(vocabulary)) + 2 * (largest(teacher) + largest(student)) / tau;
  e.loss =
      reference::KlDivergenceForward(p.tokens, vocabulary, tau, teacher.data(), student.data());
  for (int64_t t = 0; t < p.tokens; ++t) {
    const auto* row = teacher.data() + t * vocabulary;
    std::vector<double> scaled(row, row + vocabulary);
    for (double& x : scaled) x /= tau;
    for (double l : reference::LogSoftmax(vocabulary, scaled.data())) e.entropy -= std::exp(l) * l;
    const auto* other = student.data() + t * vocabulary;
    e.agree += std::max_element(row, row + vocabulary) - row ==
                       std::max_element(other, other + vocabulary) - other
                   ? 1
                   : 0;
  }
  std::vector<double> dlogits(student.size());
  reference::KlDivergenceBackward(p.tokens, vocabulary, tau, kGradScale, teacher.data(),
                                  student.data(), dlogits.data());
  e.dhidden.resize(h.size());
  e.dweight.assign(static_cast<size_t>(vocabulary * kWidth), 0.25);
  reference::HeadBackward(p.tokens, kWidth, vocabulary, kStudentScale, dlogits.data(), h.data(),
                          w.data(), e.dhidden.data(), e.dweight.data());
  return e;
}

TEST(KlDivergence, AgreesWithADirectComputationOverAllPositions) {
  for (int64_t tokens : EdgeSizes()) {
    for (float tau : {1.0F, 2.5F}) {
      Problem p(tokens);
      const Expected e = Direct(p, tau);
      // A logit error d shifts each of the two log-probabilities by at most 2 d and the weights p
      // by a factor 1 + 2 d on differences of size e.range. Float32 sums of a block: 84 roundings
      // on terms of that size.
      const double logit_error = (LogitError(p.teacher_hidden, p.teacher_weight, kTeacherScale) +
                                  LogitError(p.hidden, p.weight, kStudentScale)) /
                                 tau;
      const double error = tau * tau * (2 * (2 + e.range) * logit_error + e.range * 84 * kF32Round);
      for (int64_t chunk : {1, 13, 64, 1000}) {
        Found found = Compute(p, chunk, tau);
        const auto t = static_cast<double>(tokens);
        EXPECT_NEAR(found.result.loss_sum, e.loss, t * error);
        EXPECT_NEAR(found.result.teacher_entropy, e.entropy, t * error);
        EXPECT_EQ(found.result.agree, e.agree);
        EXPECT_EQ(found.result.tokens, tokens);
        // q and p sum to 1 each and have relative error 2 logit_error + 84 roundings; then
        // kVocabulary products.
        const double slope_error =
            2 * tau * kGradScale * (2 * logit_error + (84 + kVocabulary) * kF32Round);
        ExpectClose(found.dhidden, e.dhidden,
                    [&](size_t) { return kStudentScale * 5 * slope_error; });
        ExpectClose(found.dweight, e.dweight, [&](size_t) {
          return kStudentScale * 5 * t * (slope_error + tau * kGradScale * 2 * t * kF32Round) +
                 kF32Round;
        });
        EXPECT_TRUE(found.dhidden.GapsUntouched() && found.dweight.GapsUntouched());
      }
    }
  }
}

TEST(KlDivergence, ChunksAndThreadsDoNotChangeLossAndHiddenGradient) {
  Problem p(100);
  Found one = Compute(p, 512, 1.0F);
  for (int64_t chunk : {1, 33, 99, 100}) {
    Found other = Compute(p, chunk, 1.0F, 3);
    EXPECT_EQ(one.result.loss_sum, other.result.loss_sum);
    EXPECT_EQ(one.result.teacher_entropy, other.result.teacher_entropy);
    EXPECT_TRUE(one.dhidden.SameBits(other.dhidden));
  }
  EXPECT_TRUE(one.dweight.SameBits(Compute(p, 512, 1.0F, 3).dweight));
}

TEST(KlDivergence, OrderOfTokensChangesNothingBeyondRounding) {
  Problem p(65);
  Found before = Compute(p, 16, 1.0F);
  Problem shuffled = p;
  std::vector<int64_t> order(65);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(1));
  for (int64_t t = 0; t < 65; ++t) {
    const int64_t from = order[static_cast<size_t>(t)];
    for (int64_t i = 0; i < kWidth; ++i) shuffled.hidden.at(t, i) = p.hidden.at(from, i);
    for (int64_t i = 0; i < kTeacherWidth; ++i) {
      shuffled.teacher_hidden.at(t, i) = p.teacher_hidden.at(from, i);
    }
  }
  Found after = Compute(shuffled, 16, 1.0F);
  // Sums of 65 doubles in another order.
  EXPECT_NEAR(before.result.loss_sum, after.result.loss_sum, 65 * 0x1p-53 * before.result.loss_sum);
  EXPECT_EQ(before.result.agree, after.result.agree);
  for (int64_t t = 0; t < 65; ++t) {
    for (int64_t i = 0; i < kWidth; ++i) {
      ASSERT_EQ(after.dhidden.at(t, i), before.dhidden.at(order[static_cast<size_t>(t)], i));
    }
  }
}

TEST(KlDivergence, EqualModelsGiveZeroLossAndZeroGradient) {
  Problem p(33);
  for (float tau : {1.0F, 0.7F}) {
    Matrix dhidden(33, kWidth);
    Matrix dweight = Matrix::Filled(kVocabulary, kWidth, 0);
    KernelTest test;
    const KlDivergenceOptions options{kStudentScale, kStudentScale, tau, kGradScale, 10};
    const KlDivergenceResult result =
        KlDivergence(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.hidden.tensor(),
                     p.weight.tensor(), options, dhidden.tensor(), dweight.tensor());
    EXPECT_EQ(result.loss_sum, 0.0);
    EXPECT_EQ(result.agree, 33);
    EXPECT_GT(result.teacher_entropy, 0.0);
    for (float g : dhidden.values<float>()) ASSERT_EQ(g, 0.0F);
    for (float g : dweight.values<float>()) ASSERT_EQ(g, 0.0F);
  }
}

TEST(KlDivergence, GradientsMayBeLeftOut) {
  Problem p(20);
  Found all = Compute(p, 8, 1.0F);
  KernelTest test;
  const KlDivergenceOptions options{kTeacherScale, kStudentScale, 1.0F, kGradScale, 8};
  const KlDivergenceResult result =
      KlDivergence(test.ctx(), p.teacher_hidden.tensor(), p.teacher_weight.tensor(),
                   p.hidden.tensor(), p.weight.tensor(), options, {}, {});
  EXPECT_EQ(result.loss_sum, all.result.loss_sum);
}

TEST(KlDivergence, ReferenceBackwardEqualsComplexStep) {
  constexpr int64_t kT = 2;
  constexpr int64_t kV = 6;
  std::mt19937 rng(53);
  const auto teacher = Matrix::Random(kT, kV, rng).values();
  const auto student = Matrix::Random(kT, kV, rng).values();
  for (double tau : {1.0, 2.0}) {
    std::vector<double> d(student.size());
    reference::KlDivergenceBackward(kT, kV, tau, 1.7, teacher.data(), student.data(), d.data());
    ExpectSameGradient(d, ComplexStep(student, [&](const auto& z) {
                         return 1.7 * reference::KlDivergenceForward(kT, kV, tau, teacher.data(),
                                                                     z.data());
                       }));
  }
}

// ---- cut over ranks ----

struct Sharded {
  explicit Sharded(int64_t n) : exchanged(n), ranks(static_cast<size_t>(n)) {}
  RankThreads exchanged;
  struct Rank {
    KlDivergenceResult result;
    Matrix dhidden{1, 1}, dweight{1, 1};
  };
  std::vector<Rank> ranks;
};

// Rows [first, first + rows) of the first `vocabulary`; NaN behind them.
Matrix ShardOf(const Matrix& weight, int64_t vocabulary, int64_t first, int64_t rows) {
  Matrix shard = Matrix::Filled(rows, weight.columns(), NAN, 1);
  for (int64_t r = 0; r < std::min(rows, vocabulary - first); ++r) {
    for (int64_t i = 0; i < weight.columns(); ++i) shard.at(r, i) = weight.at(first + r, i);
  }
  return shard;
}

std::unique_ptr<Sharded> ComputeSharded(Problem& p, int64_t vocabulary, int64_t ranks,
                                        int64_t chunk, float tau) {
  const int64_t rows = (vocabulary + ranks - 1) / ranks;
  auto found = std::make_unique<Sharded>(ranks);
  found->exchanged.Run([&](const RankExchange& exchange) {
    const int64_t first = exchange.rank * rows;
    Matrix teacher_weight = ShardOf(p.teacher_weight, vocabulary, first, rows);
    Matrix weight = ShardOf(p.weight, vocabulary, first, rows);
    Sharded::Rank& mine = found->ranks[static_cast<size_t>(exchange.rank)];
    mine = {{}, Matrix(p.tokens, kWidth, 2), Matrix::Filled(rows, kWidth, 0.25F, 1)};
    KernelTest test(exchange.rank == 1 ? 3 : 1);
    const KlDivergenceOptions options = {
        kTeacherScale, kStudentScale, tau, kGradScale, chunk, {first, vocabulary, &exchange}};
    mine.result = KlDivergence(test.ctx(), p.teacher_hidden.tensor(), teacher_weight.tensor(),
                               p.hidden.tensor(), weight.tensor(), options, mine.dhidden.tensor(),
                               mine.dweight.tensor());
    EXPECT_EQ(test.arena().used_bytes(), 0U);
  });
  return found;
}

void ExpectShardsRight(Problem& p, int64_t vocabulary, int64_t ranks, int64_t chunk, float tau) {
  SCOPED_TRACE(testing::Message() << p.tokens << " tokens, " << vocabulary << " entries, " << ranks
                                  << " ranks");
  const Expected e = Direct(p, tau, vocabulary);
  const auto sharded = ComputeSharded(p, vocabulary, ranks, chunk, tau);
  const auto& found = sharded->ranks;
  // The bounds of the whole vocabulary: what joins the ranks' parts is float64.
  const double logit_error = (LogitError(p.teacher_hidden, p.teacher_weight, kTeacherScale) +
                              LogitError(p.hidden, p.weight, kStudentScale)) /
                             tau;
  const double error = tau * tau * (2 * (2 + e.range) * logit_error + e.range * 84 * kF32Round);
  const auto t = static_cast<double>(p.tokens);
  EXPECT_NEAR(found[0].result.loss_sum, e.loss, t * error);
  EXPECT_NEAR(found[0].result.teacher_entropy, e.entropy, t * error);
  for (const auto& mine : found) {
    EXPECT_EQ(mine.result.loss_sum, found[0].result.loss_sum);
    EXPECT_EQ(mine.result.teacher_entropy, found[0].result.teacher_entropy);
    EXPECT_EQ(mine.result.agree, e.agree);
    EXPECT_EQ(mine.result.tokens, p.tokens);
    EXPECT_TRUE(mine.dhidden.GapsUntouched() && mine.dweight.GapsUntouched());
  }
  Matrix dhidden(p.tokens, kWidth);
  for (int64_t r = 0; r < p.tokens; ++r) {
    for (int64_t i = 0; i < kWidth; ++i) {
      double sum = 0;
      for (const auto& mine : found) sum += static_cast<double>(mine.dhidden.at(r, i));
      dhidden.at(r, i) = static_cast<float>(sum);
    }
  }
  const double slope_error =
      2 * tau * kGradScale * (2 * logit_error + (84 + kVocabulary) * kF32Round);
  ExpectClose(dhidden, e.dhidden, [&](size_t) { return kStudentScale * 5 * slope_error; });
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
  ExpectClose(dweight, e.dweight, [&](size_t) {
    return kStudentScale * 5 * t * (slope_error + tau * kGradScale * 2 * t * kF32Round) + kF32Round;
  });
  std::vector<int64_t> sizes;
  for (int64_t begin = 0; begin < p.tokens; begin += chunk) {
    const int64_t count = std::min(chunk, p.tokens - begin);
    sizes.push_back(8 * count);
    sizes.push_back(4 * count);
  }
  EXPECT_EQ(sharded->exchanged.sizes(), sizes);
}

// 37 entries on 4 ranks: 10 rows each, 3 of padding. 5 on 4: the last rank has nothing but padding.
TEST(KlDivergenceShards, AgreeWithReference) {
  for (int64_t tokens : {0, 1, 33, 65}) {
    for (int64_t vocabulary : {int64_t{5}, int64_t{37}, kVocabulary}) {
      Problem p(tokens);
      for (int64_t ranks : {1, 2, 3, 4}) {
        ExpectShardsRight(p, vocabulary, ranks, 16, ranks % 2 == 0 ? 2.5F : 1.0F);
      }
    }
  }
}

TEST(KlDivergenceShards, EqualModelsGiveZeroLossAndZeroGradient) {
  Problem p(9);
  p.teacher_hidden = p.hidden;
  p.teacher_weight = p.weight;
  for (int64_t ranks : {2, 4}) {
    RankThreads threads(ranks);
    threads.Run([&](const RankExchange& exchange) {
      const int64_t rows = (37 + ranks - 1) / ranks;
      const int64_t first = exchange.rank * rows;
      Matrix weight = ShardOf(p.weight, 37, first, rows);
      Matrix dhidden(9, kWidth);
      Matrix dweight = Matrix::Filled(rows, kWidth, 0);
      KernelTest test;
      const KlDivergenceResult result = KlDivergence(
          test.ctx(), p.hidden.tensor(), weight.tensor(), p.hidden.tensor(), weight.tensor(),
          {kStudentScale, kStudentScale, 0.7F, kGradScale, 4, {first, 37, &exchange}},
          dhidden.tensor(), dweight.tensor());
      EXPECT_EQ(result.loss_sum, 0.0);
      EXPECT_EQ(result.agree, 9);
      for (const float g : dhidden.values<float>()) ASSERT_EQ(g, 0.0F);
      for (const float g : dweight.values<float>()) ASSERT_EQ(g, 0.0F);
    });
  }
}

// The first column of the weights alone: teacher and student have their largest logits at entries
// of several ranks, of which the lowest counts.
TEST(KlDivergenceShards, TiesGoToTheLowestIdOfAllRanks) {
  Problem p(1);
  p.hidden = Matrix::Filled(1, kWidth, 0);
  p.teacher_hidden = Matrix::Filled(1, kTeacherWidth, 0);
  p.hidden.at(0, 0) = p.teacher_hidden.at(0, 0) = 1;
  for (int64_t v = 0; v < kVocabulary; ++v) p.weight.at(v, 0) = p.teacher_weight.at(v, 0) = -1;
  p.teacher_weight.at(17, 0) = p.teacher_weight.at(30, 0) = 2;
  p.weight.at(17, 0) = p.weight.at(36, 0) = 3;
  for (int64_t ranks : {1, 2, 3, 4}) {
    EXPECT_EQ(ComputeSharded(p, 37, ranks, 16, 1.0F)->ranks[0].result.agree, 1);
  }
  p.teacher_weight.at(17, 0) = -1;  // 30 and 17 now
  for (int64_t ranks : {1, 2, 3, 4}) {
    EXPECT_EQ(ComputeSharded(p, 37, ranks, 16, 1.0F)->ranks[0].result.agree, 0);
  }
}

TEST(KlDivergenceShards, PaddingOfOneRankChangesNoBit) {
  Problem p(20);
  KernelTest test;
  KlDivergenceOptions options = {kTeacherScale, kStudentScale, 1.0F, kGradScale, 8};
  Matrix dhidden(20, kWidth), padded_dhidden(20, kWidth);
  Matrix dweight = Matrix::Filled(37, kWidth, 0), padded_dweight = Matrix::Filled(40, kWidth, 0);
  const KlDivergenceResult result =
      KlDivergence(test.ctx(), p.teacher_hidden.tensor(), p.teacher_weight.tensor().Rows(0, 37),
                   p.hidden.tensor(), p.weight.tensor().Rows(0, 37), options, dhidden.tensor(),
                   dweight.tensor());
  Matrix teacher_weight = ShardOf(p.teacher_weight, 37, 0, 40);
  Matrix weight = ShardOf(p.weight, 37, 0, 40);
  options.shard.vocab = 37;
  const KlDivergenceResult padded = KlDivergence(
      test.ctx(), p.teacher_hidden.tensor(), teacher_weight.tensor(), p.hidden.tensor(),
      weight.tensor(), options, padded_dhidden.tensor(), padded_dweight.tensor());
  EXPECT_EQ(padded.loss_sum, result.loss_sum);
  EXPECT_EQ(padded.teacher_entropy, result.teacher_entropy);
  EXPECT_TRUE(padded_dhidden.SameBits(dhidden));
  for (int64_t v = 0; v < 40; ++v) {
    for (int64_t i = 0; i < kWidth; ++i) {
      ASSERT_EQ(padded_dweight.at(v, i), v < 37 ? dweight.at(v, i) : 0.0F);
    }
  }
}

}  // namespace
}  // namespace sala::kernels
