#include "kernels/kl_divergence/kl_divergence.h"

#include <optional>
#include <tuple>

#include "kernels/kl_divergence/reference.h"
#include "tests/kernels/common/rank_replay.h"
#include "tests/kernels/common/softmax_rows.h"

namespace sala::kernels {
namespace {

constexpr int64_t kTeacherWidth = 16;
constexpr int64_t kWidth = 24;
constexpr float kTeacherScale = 0.5F;
constexpr float kStudentScale = 0.25F;
constexpr float kGradScale = 0.125F;
constexpr float kOldWeightGradient = 0.25F;

struct Problem {
  Problem(int64_t tokens_in, int64_t vocabulary_in, unsigned seed = 51)
      : tokens(tokens_in), vocabulary(vocabulary_in) {
    std::mt19937 rng(seed);
    teacher_hidden = RandomBf16(tokens, kTeacherWidth, rng);
    teacher_weight = RandomBf16(vocabulary, kTeacherWidth, rng);
    hidden = RandomBf16(tokens, kWidth, rng);
    weight = RandomBf16(vocabulary, kWidth, rng);
  }
  int64_t tokens, vocabulary;
  Matrix teacher_hidden{1, 1}, teacher_weight{1, 1}, hidden{1, 1}, weight{1, 1};
};

struct Found {
  Found(const Problem& p, bool with_dhidden, int64_t dweight_rows)
      : dhidden(DType::kBF16, with_dhidden ? p.tokens : 0, kWidth, 8),
        dweight(DType::kF32, Matrix::Filled(dweight_rows, kWidth, kOldWeightGradient), 16) {}
  KlDivergenceResult result;
  DeviceMatrix dhidden, dweight;
};

Found Compute(const Context& ctx, const Problem& p, int64_t chunk, float tau,
              bool with_dhidden = true, bool with_dweight = true) {
  const DeviceMatrix teacher_hidden(DType::kBF16, p.teacher_hidden, 8),
      teacher_weight(DType::kBF16, p.teacher_weight, 16), hidden(DType::kBF16, p.hidden, 24),
      weight(DType::kBF16, p.weight, 8);
  Found found(p, with_dhidden, with_dweight ? p.vocabulary : 0);
  found.result =
      KlDivergence(ctx, teacher_hidden.tensor(), teacher_weight.tensor(), hidden.tensor(),
                   weight.tensor(), {kTeacherScale, kStudentScale, tau, kGradScale, chunk},
                   with_dhidden ? found.dhidden.tensor() : sala::Tensor(),
                   with_dweight ? found.dweight.tensor() : sala::Tensor());
  return found;
}

// Logits / tau, by the reference.
std::vector<double> Scaled(const Matrix& hidden, const Matrix& weight, double scale) {
  const auto h = hidden.values();
  const auto w = weight.values();
  return reference::Logits(hidden.rows(), hidden.columns(), weight.rows(), scale, h.data(),
                           w.data());
}

// What one rank has found, or several of which each has a part of the vocabulary: the sums of the
// parts' rows are no longer than those of whole rows, and what joins them is float64.
void ExpectRight(const Problem& p, double tau, const std::vector<const Found*>& ranks) {
  const auto teacher = Scaled(p.teacher_hidden, p.teacher_weight, kTeacherScale / tau);
  const auto student = Scaled(p.hidden, p.weight, kStudentScale / tau);
  const double spread = std::max(Spread(p.vocabulary, teacher), Spread(p.vocabulary, student));
  // An error d of the logits (2 roundings more for their scale, 1 / tau) moves each of two
  // log-probabilities by at most 2 d, and the weights by a factor 1 + 2 d on terms of size
  // `range`. The sums add their errors twice, as a divisor and in the terms.
  const double logit_error = LogitError(p.teacher_hidden, p.teacher_weight, kTeacherScale / tau) +
                             LogitError(p.hidden, p.weight, kStudentScale / tau) +
                             2 * kF32Round * spread;
  const double range = std::log(static_cast<double>(p.vocabulary)) + 2 * spread;
  const double sum_error = RowSumError(p.vocabulary, spread);
  const double error = 2 * (2 + range) * logit_error + 2 * (1 + range) * sum_error;

  double loss = 0;
  double entropy = 0;
  int64_t agree = 0;
  std::vector<double> dlogits(student.size());
  std::vector<double> size(student.size());
  for (int64_t t = 0; t < p.tokens; ++t) {
    const double* a = teacher.data() + t * p.vocabulary;
    const double* b = student.data() + t * p.vocabulary;
    const std::vector<double> log_p = reference::LogSoftmax(p.vocabulary, a);
    const std::vector<double> log_q = reference::LogSoftmax(p.vocabulary, b);
    for (int64_t v = 0; v < p.vocabulary; ++v) {
      const auto i = static_cast<size_t>(v);
      const double probability = std::exp(log_p[i]);
      loss += tau * tau * probability * (log_p[i] - log_q[i]);
      entropy -= probability * log_p[i];
      const auto at = static_cast<size_t>(t * p.vocabulary + v);
      dlogits[at] = kGradScale * tau * (std::exp(log_q[i]) - probability);
      size[at] = kGradScale * tau * (std::exp(log_q[i]) + probability);
    }
    agree += std::max_element(a, a + p.vocabulary) - a == std::max_element(b, b + p.vocabulary) - b
                 ? 1
                 : 0;
  }
  const auto tokens = static_cast<double>(p.tokens);
  const Found& found = *ranks[0];
  EXPECT_NEAR(found.result.loss_sum, loss, tokens * tau * tau * error);
  EXPECT_NEAR(found.result.teacher_entropy, entropy, tokens * error);
  EXPECT_EQ(found.result.agree, agree);
  EXPECT_EQ(found.result.tokens, p.tokens);
  for (const Found* other : ranks) {
    EXPECT_EQ(other->result.loss_sum, found.result.loss_sum);
    EXPECT_EQ(other->result.teacher_entropy, found.result.teacher_entropy);
    EXPECT_EQ(other->result.agree, agree);
    EXPECT_EQ(other->result.tokens, p.tokens);
  }
  // Each probability: what its sum and its own exponential have, then one rounding to bfloat16.
  const HeadGradient expected(p.hidden, p.weight, kStudentScale, dlogits, size, kOldWeightGradient);
  const double gradient_error = 2 * logit_error + 2 * sum_error + 1.01 * kBf16Round;
  if (ranks.size() > 1) {
    std::vector<const DeviceMatrix*> dhidden, dweight;
    for (const Found* rank : ranks) {
      dhidden.push_back(&rank->dhidden);
      dweight.push_back(&rank->dweight);
    }
    expected.ExpectHiddenSum(dhidden, gradient_error);
    expected.ExpectWeightRows(dweight, gradient_error);
    return;
  }
  if (found.dhidden.rows() > 0) expected.ExpectHidden(found.dhidden, gradient_error);
  if (found.dweight.rows() > 0) expected.ExpectWeight(found.dweight, gradient_error);
}
void ExpectRight(const Problem& p, double tau, const Found& found) {
  ExpectRight(p, tau, {&found});
}

using KlDivergenceCuda = CudaKernelTest;

TEST_F(KlDivergenceCuda, AgreesWithReference) {
  for (const int64_t tokens : EdgeSizes()) {
    if (kSlowBuild && tokens > 1 && tokens != 33) continue;
    const Problem p(tokens, 61);
    ExpectRight(p, 1.0, Compute(ctx(), p, 13, 1.0F));
    ExpectRight(p, 2.5, Compute(ctx(), p, 64, 2.5F));
    if (!kSlowBuild) ExpectRight(p, 1.0, Compute(ctx(), p, 1000, 1.0F));
  }
}

// One pack of 8, whole and broken; around one step of a block; several steps.
TEST_F(KlDivergenceCuda, AnyVocabulary) {
  for (const int64_t vocabulary : {1, 2, 7, 8, 9, 4095, 4096, 4097, 4105, 9001}) {
    if (kSlowBuild && vocabulary > 4097) continue;
    const Problem p(kSlowBuild ? 2 : 6, vocabulary, 52);
    ExpectRight(p, 1.5, Compute(ctx(), p, 4, 1.5F));
  }
}

TEST_F(KlDivergenceCuda, RepeatsToTheBit) {
  const Problem p(kSlowBuild ? 9 : 33, 999);
  const Found first = Compute(ctx(), p, 8, 1.0F);
  for (int i = 0; i < 2; ++i) {
    const Found again = Compute(ctx(), p, 8, 1.0F);
    EXPECT_EQ(again.result.loss_sum, first.result.loss_sum);
    EXPECT_EQ(again.result.teacher_entropy, first.result.teacher_entropy);
    EXPECT_EQ(again.dhidden.Bytes(), first.dhidden.Bytes());
    EXPECT_EQ(again.dweight.Bytes(), first.dweight.Bytes());
  }
}

TEST_F(KlDivergenceCuda, GradientsMayBeLeftOut) {
  const Problem p(kSlowBuild ? 9 : 20, 61);
  const Found all = Compute(ctx(), p, 8, 1.0F);
  const Found none = Compute(ctx(), p, 8, 1.0F, false, false);
  EXPECT_EQ(none.result.loss_sum, all.result.loss_sum);
  EXPECT_EQ(none.result.teacher_entropy, all.result.teacher_entropy);
  EXPECT_EQ(none.result.agree, all.result.agree);
  EXPECT_EQ(Compute(ctx(), p, 8, 1.0F, true, false).dhidden.Bytes(), all.dhidden.Bytes());
  EXPECT_EQ(Compute(ctx(), p, 8, 1.0F, false, true).dweight.Bytes(), all.dweight.Bytes());
}

// Both heads come from the same product with the same plan, and every difference of the two is of
// equal bits: nothing remains to be rounded.
TEST_F(KlDivergenceCuda, EqualModelsGiveZeroLossAndZeroGradient) {
  for (const int64_t vocabulary : {61, 4200}) {
    const Problem p(9, vocabulary);
    const DeviceMatrix hidden(DType::kBF16, p.hidden), weight(DType::kBF16, p.weight);
    for (const float tau : {1.0F, 0.7F}) {
      const DeviceMatrix dhidden(DType::kBF16, 9, kWidth);
      const DeviceMatrix dweight(DType::kF32, Matrix::Filled(vocabulary, kWidth, 0));
      const KlDivergenceResult result = KlDivergence(
          ctx(), hidden.tensor(), weight.tensor(), hidden.tensor(), weight.tensor(),
          {kStudentScale, kStudentScale, tau, kGradScale, 4}, dhidden.tensor(), dweight.tensor());
      EXPECT_EQ(result.loss_sum, 0.0);
      EXPECT_EQ(result.agree, 9);
      EXPECT_GT(result.teacher_entropy, 0.0);
      for (const float x : dhidden.Download().values<float>()) ASSERT_EQ(x, 0.0F);
      for (const float x : dweight.Download().values<float>()) ASSERT_EQ(x, 0.0F);
    }
  }
}

// A student a little off its teacher: the divergence is of second order, far below what bfloat16
// logits would allow to see.
TEST_F(KlDivergenceCuda, SmallDivergencesAreSeen) {
  constexpr int64_t kTokens = 16;
  constexpr int64_t kVocabulary = 200;
  std::mt19937 rng(53);
  Problem p(kTokens, kVocabulary);
  const Matrix hidden = RandomBf16(kTokens, 8, rng, 4.0F);
  const Matrix weight = RandomBf16(kVocabulary, 8, rng);
  Matrix moved = weight;
  for (int64_t v = 0; v < kVocabulary; ++v) {
    // Half a percent of one column in 8, then exact in bfloat16 again.
    moved.at(v, 0) = static_cast<float>(BF16(weight.at(v, 0) * 1.006F));
  }
  const DeviceMatrix h(DType::kBF16, hidden), w(DType::kBF16, weight), m(DType::kBF16, moved);
  const KlDivergenceResult result = KlDivergence(ctx(), h.tensor(), w.tensor(), h.tensor(),
                                                 m.tensor(), {1.0F, 1.0F, 1.0F, 1.0F, 64}, {}, {});
  const auto a = Scaled(hidden, weight, 1);
  const auto b = Scaled(hidden, moved, 1);
  const double expected =
      reference::KlDivergenceForward(kTokens, kVocabulary, 1.0, a.data(), b.data());
  EXPECT_LT(expected, 1e-3 * kTokens);
  EXPECT_GT(expected, 1e-6 * kTokens);
  // The logits' errors enter multiplied by their difference, a few hundredths; those of the sums
  // are nearly equal on both sides and cancel, but for the roundings of each: 1e-6 a token.
  EXPECT_NEAR(result.loss_sum, expected, 2e-6 * kTokens);
}

TEST_F(KlDivergenceCuda, DryRunNeedsTheScratchOfARealRun) {
  auto opened = OpenCudaDevice({.host = "test", .dry = true});
  ASSERT_TRUE(opened.ok());
  const std::unique_ptr<Device> dry = std::move(opened).value();
  Arena memory(size_t{1} << 20, dry.get());
  Arena scratch(size_t{1} << 20, dry.get());
  const Context context = {DeviceKind::kCuda, nullptr, &scratch, dry.get()};
  KlDivergence(context, memory.New(DType::kBF16, {33, 8}), memory.New(DType::kBF16, {61, 8}),
               memory.New(DType::kBF16, {33, 16}), memory.New(DType::kBF16, {61, 16}),
               {1.0F, 1.0F, 1.0F, 1.0F, 16}, memory.New(DType::kBF16, {33, 16}),
               memory.New(DType::kF32, {61, 16}));
  // Two logits, three numbers a token, three sums, the work space of a product on an sm_90; in 256
  // bytes.
  const auto round = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  EXPECT_EQ(scratch.peak_bytes(), 2 * round(size_t{16} * 64 * 4) + round(size_t{33} * 24) +
                                      round(24) + (size_t{64} << 20));
}

// ---- cut over ranks ----

struct Sharded {
  explicit Sharded(int64_t n) : exchanged(n), ranks(static_cast<size_t>(n)) {}
  std::vector<const Found*> all() const {
    std::vector<const Found*> pointers;
    for (const auto& rank : ranks) pointers.push_back(&*rank);
    return pointers;
  }
  RankReplay exchanged;
  std::vector<std::optional<Found>> ranks;
};

// Rows [first, first + rows) of a weight; NaN behind its last.
Matrix PartOf(const Matrix& weight, int64_t first, int64_t rows) {
  Matrix part(rows, weight.columns());
  for (int64_t r = 0; r < std::min(rows, weight.rows() - first); ++r) {
    for (int64_t i = 0; i < weight.columns(); ++i) part.at(r, i) = weight.at(first + r, i);
  }
  return part;
}

Sharded ComputeSharded(const Context& ctx, const Problem& p, int64_t ranks, int64_t chunk,
                       float tau) {
  const int64_t rows = (p.vocabulary + ranks - 1) / ranks;
  const DeviceMatrix teacher_hidden(DType::kBF16, p.teacher_hidden, 8),
      hidden(DType::kBF16, p.hidden, 24);
  Sharded found(ranks);
  // The second message of a chunk needs the first of all ranks, and nothing needs the second.
  found.exchanged.Run(3, [&](const RankExchange& exchange) {
    const int64_t first = exchange.rank * rows;
    const DeviceMatrix teacher_weight(DType::kBF16, PartOf(p.teacher_weight, first, rows), 16),
        weight(DType::kBF16, PartOf(p.weight, first, rows), 8);
    auto& mine = found.ranks[static_cast<size_t>(exchange.rank)];
    mine.emplace(p, true, rows);
    mine->result = KlDivergence(
        ctx, teacher_hidden.tensor(), teacher_weight.tensor(), hidden.tensor(), weight.tensor(),
        {kTeacherScale, kStudentScale, tau, kGradScale, chunk, {first, p.vocabulary, &exchange}},
        mine->dhidden.tensor(), mine->dweight.tensor());
  });
  return found;
}

// 37 entries on 4 ranks: 10 rows each, 3 of padding. 5 on 4: the last rank has nothing but padding.
TEST_F(KlDivergenceCuda, RanksWithPartsOfTheVocabulary) {
  for (const auto& [tokens, vocabulary, ranks] : {std::tuple{21, 37, 1},
                                                  {21, 37, 2},
                                                  {21, 37, 3},
                                                  {21, 37, 4},
                                                  {9, 5, 4},
                                                  {0, 37, 2},
                                                  {3, 8209, 2}}) {
    if (kSlowBuild && (ranks == 3 || vocabulary > 37)) continue;
    SCOPED_TRACE(testing::Message() << vocabulary << " entries on " << ranks << " ranks");
    const Problem p(tokens, vocabulary, 54);
    const double tau = ranks % 2 == 0 ? 2.5 : 1.0;
    const Sharded found = ComputeSharded(ctx(), p, ranks, 8, static_cast<float>(tau));
    ExpectRight(p, tau, found.all());
    std::vector<int64_t> sizes;
    for (int64_t begin = 0; begin < tokens; begin += 8) {
      const int64_t count = std::min<int64_t>(8, tokens - begin);
      sizes.push_back(8 * count);
      sizes.push_back(4 * count);
    }
    EXPECT_EQ(found.exchanged.sizes(), sizes);
  }
}

TEST_F(KlDivergenceCuda, EqualModelsOnRanksGiveZeroLossAndZeroGradient) {
  const Problem p(9, 61);
  for (const int64_t ranks : {2, 4}) {
    const int64_t rows = (p.vocabulary + ranks - 1) / ranks;
    const DeviceMatrix hidden(DType::kBF16, p.hidden);
    RankReplay replay(ranks);
    std::vector<KlDivergenceResult> results(static_cast<size_t>(ranks));
    std::vector<Matrix> gradients(static_cast<size_t>(2 * ranks), Matrix(1, 1));
    replay.Run(3, [&](const RankExchange& exchange) {
      const int64_t first = exchange.rank * rows;
      const DeviceMatrix weight(DType::kBF16, PartOf(p.weight, first, rows));
      const DeviceMatrix dhidden(DType::kBF16, 9, kWidth);
      const DeviceMatrix dweight(DType::kF32, Matrix::Filled(rows, kWidth, 0));
      const auto rank = static_cast<size_t>(exchange.rank);
      results[rank] = KlDivergence(
          ctx(), hidden.tensor(), weight.tensor(), hidden.tensor(), weight.tensor(),
          {kStudentScale, kStudentScale, 0.7F, kGradScale, 4, {first, p.vocabulary, &exchange}},
          dhidden.tensor(), dweight.tensor());
      gradients[2 * rank] = dhidden.Download();
      gradients[2 * rank + 1] = dweight.Download();
    });
    for (const KlDivergenceResult& result : results) {
      EXPECT_EQ(result.loss_sum, 0.0);
      EXPECT_EQ(result.agree, 9);
      EXPECT_GT(result.teacher_entropy, 0.0);
    }
    for (const Matrix& gradient : gradients) {
      for (const float x : gradient.values<float>()) ASSERT_EQ(x, 0.0F);
    }
  }
}

// Teacher and student have their largest logits at entries of several ranks; the lowest counts.
TEST_F(KlDivergenceCuda, TiesGoToTheLowestIdOfAllRanks) {
  Problem p(1, 37);
  p.hidden = Matrix::Filled(1, kWidth, 0);
  p.teacher_hidden = Matrix::Filled(1, kTeacherWidth, 0);
  p.hidden.at(0, 0) = p.teacher_hidden.at(0, 0) = 1;
  for (int64_t v = 0; v < 37; ++v) p.weight.at(v, 0) = p.teacher_weight.at(v, 0) = -1;
  p.weight.at(17, 0) = p.weight.at(36, 0) = 3;
  for (const int64_t ranks : {1, 2, 3, 4}) {
    p.teacher_weight.at(17, 0) = p.teacher_weight.at(30, 0) = 2;
    const Sharded found = ComputeSharded(ctx(), p, ranks, 16, 1.0F);
    for (const Found* rank : found.all()) EXPECT_EQ(rank->result.agree, 1);
    p.teacher_weight.at(17, 0) = -1;
    const Sharded others = ComputeSharded(ctx(), p, ranks, 16, 1.0F);
    for (const Found* rank : others.all()) EXPECT_EQ(rank->result.agree, 0);
  }
}

TEST_F(KlDivergenceCuda, PaddingOfOneRankChangesNoBit) {
  const Problem p(9, 61);
  const Found found = Compute(ctx(), p, 8, 1.0F);
  const DeviceMatrix teacher_hidden(DType::kBF16, p.teacher_hidden, 8),
      teacher_weight(DType::kBF16, PartOf(p.teacher_weight, 0, 64), 16),
      hidden(DType::kBF16, p.hidden, 24), weight(DType::kBF16, PartOf(p.weight, 0, 64), 8);
  Found padded(p, true, 64);
  KlDivergenceOptions options = {kTeacherScale, kStudentScale, 1.0F, kGradScale, 8};
  options.shard.vocab = 61;
  padded.result =
      KlDivergence(ctx(), teacher_hidden.tensor(), teacher_weight.tensor(), hidden.tensor(),
                   weight.tensor(), options, padded.dhidden.tensor(), padded.dweight.tensor());
  EXPECT_EQ(padded.result.loss_sum, found.result.loss_sum);
  EXPECT_EQ(padded.result.teacher_entropy, found.result.teacher_entropy);
  EXPECT_EQ(padded.result.agree, found.result.agree);
  EXPECT_EQ(padded.dhidden.Bytes(), found.dhidden.Bytes());
  const Matrix dweight = padded.dweight.Download(), expected = found.dweight.Download();
  for (int64_t r = 0; r < 64; ++r) {
    for (int64_t i = 0; i < kWidth; ++i) {
      ASSERT_EQ(dweight.at(r, i), r < 61 ? expected.at(r, i) : kOldWeightGradient);
    }
  }
}

TEST_F(KlDivergenceCuda, DryRunExchangesAndNeedsRoomForIt) {
  auto opened = OpenCudaDevice({.host = "test", .dry = true});
  ASSERT_TRUE(opened.ok());
  const std::unique_ptr<Device> dry = std::move(opened).value();
  Arena memory(size_t{1} << 20, dry.get());
  Arena scratch(size_t{1} << 20, dry.get());
  const Context context = {DeviceKind::kCuda, nullptr, &scratch, dry.get()};
  int64_t floats = 0;
  const RankExchange exchange = {
      .rank = 1, .ranks = 2, .gather = [&](const Context&, const ConstTensor& mine, const Tensor&) {
        floats += mine.numel();
      }};
  KlDivergence(context, memory.New(DType::kBF16, {33, 8}), memory.New(DType::kBF16, {61, 8}),
               memory.New(DType::kBF16, {33, 16}), memory.New(DType::kBF16, {61, 16}),
               {1.0F, 1.0F, 1.0F, 1.0F, 16, {61, 122, &exchange}},
               memory.New(DType::kBF16, {33, 16}), memory.New(DType::kF32, {61, 16}));
  EXPECT_EQ(floats, 33 * 12);
  // As without ranks, and what is exchanged for 16 tokens: this rank's and that of both.
  const auto round = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  EXPECT_EQ(scratch.peak_bytes(), 2 * round(size_t{16} * 64 * 4) + round(size_t{33} * 24) +
                                      round(24) + (size_t{64} << 20) + round(size_t{16} * 32) +
                                      round(size_t{16} * 32 * 2) + round(size_t{16} * 16) +
                                      round(size_t{16} * 16 * 2));
}

}  // namespace
}  // namespace sala::kernels
