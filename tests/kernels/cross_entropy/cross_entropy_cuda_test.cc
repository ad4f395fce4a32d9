#include "kernels/cross_entropy/cross_entropy.h"

#include <optional>
#include <tuple>

#include "kernels/cross_entropy/reference.h"
#include "tests/kernels/common/rank_replay.h"
#include "tests/kernels/common/softmax_rows.h"

namespace sala::kernels {
namespace {

constexpr float kLogitScale = 0.25F;
constexpr float kGradScale = 0.125F;
constexpr float kOldWeightGradient = 0.25F;

struct Problem {
  Problem(int64_t tokens_in, int64_t width_in, int64_t vocabulary_in, unsigned seed = 41)
      : tokens(tokens_in), width(width_in), vocabulary(vocabulary_in) {
    std::mt19937 rng(seed);
    hidden = RandomBf16(tokens, width, rng, 2.0F);
    weight = RandomBf16(vocabulary, width, rng);
    labels.resize(static_cast<size_t>(tokens));
    for (int32_t& label : labels) {
      label = rng() % 4 == 0 ? -1 : static_cast<int32_t>(rng() % static_cast<uint64_t>(vocabulary));
    }
  }
  int64_t tokens, width, vocabulary;
  Matrix hidden{1, 1}, weight{1, 1};
  std::vector<int32_t> labels;
};

struct Found {
  Found(const Problem& p, bool with_dhidden, int64_t dweight_rows)
      : token_loss(DType::kF32, 1, p.tokens),
        dhidden(DType::kBF16, with_dhidden ? p.tokens : 0, p.width, 8),
        dweight(DType::kF32, Matrix::Filled(dweight_rows, p.width, kOldWeightGradient), 16) {}
  CrossEntropyResult result;
  DeviceMatrix token_loss, dhidden, dweight;
};

Found Compute(const Context& ctx, const Problem& p, int64_t chunk, bool with_dhidden = true,
              bool with_dweight = true) {
  const DeviceMatrix hidden(DType::kBF16, p.hidden, 8), weight(DType::kBF16, p.weight, 16);
  const DeviceIntegers labels(p.labels);
  Found found(p, with_dhidden, with_dweight ? p.vocabulary : 0);
  found.result = CrossEntropy(ctx, hidden.tensor(), weight.tensor(), labels.tensor(),
                              {kLogitScale, kGradScale, chunk}, found.token_loss.vector(),
                              with_dhidden ? found.dhidden.tensor() : sala::Tensor(),
                              with_dweight ? found.dweight.tensor() : sala::Tensor());
  return found;
}

// What one rank has found, or several of which each has a part of the vocabulary: the sums of the
// parts' rows are no longer than those of whole rows, and what joins them is float64.
void ExpectRight(const Problem& p, const std::vector<const Found*>& ranks) {
  const auto h = p.hidden.values();
  const auto w = p.weight.values();
  const auto logits =
      reference::Logits(p.tokens, p.width, p.vocabulary, kLogitScale, h.data(), w.data());
  const double logit_error = LogitError(p.hidden, p.weight, kLogitScale);
  // An error of all logits by d moves a log-probability by at most 2 d. The sum of exponentials and
  // its logarithm add theirs.
  const double error = 2 * logit_error + RowSumError(p.vocabulary, Spread(p.vocabulary, logits));

  std::vector<double> token_loss(static_cast<size_t>(p.tokens));
  std::vector<double> dlogits(logits.size());
  std::vector<double> size(logits.size());  // of the gradient before p - onehot cancels
  double loss = 0;
  int64_t targets = 0;
  int64_t correct = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int32_t label = p.labels[static_cast<size_t>(t)];
    if (label < 0) continue;
    const double* row = logits.data() + t * p.vocabulary;
    const std::vector<double> log_p = reference::LogSoftmax(p.vocabulary, row);
    token_loss[static_cast<size_t>(t)] = -log_p[static_cast<size_t>(label)];
    loss -= log_p[static_cast<size_t>(label)];
    ++targets;
    correct += std::max_element(row, row + p.vocabulary) - row == label ? 1 : 0;
    for (int64_t v = 0; v < p.vocabulary; ++v) {
      const double probability = std::exp(log_p[static_cast<size_t>(v)]);
      const double onehot = v == label ? 1 : 0;
      const auto i = static_cast<size_t>(t * p.vocabulary + v);
      dlogits[i] = kGradScale * (probability - onehot);
      size[i] = kGradScale * (probability + onehot);
    }
  }
  const Found& found = *ranks[0];
  EXPECT_EQ(found.result.targets, targets);
  EXPECT_EQ(found.result.correct, correct);
  EXPECT_NEAR(found.result.loss_sum, loss, static_cast<double>(targets) * error);
  ExpectClose(found.token_loss.Download(), token_loss,
              [&](size_t t) { return error + kF32Round * token_loss[t]; });
  EXPECT_TRUE(found.token_loss.GapsUntouched());
  for (const Found* other : ranks) {
    EXPECT_EQ(other->result.loss_sum, found.result.loss_sum);
    EXPECT_EQ(other->result.targets, targets);
    EXPECT_EQ(other->result.correct, correct);
    EXPECT_EQ(other->token_loss.Bytes(), found.token_loss.Bytes());
  }
  // The probability is exp of what has the error above, once more an exponential and a product,
  // then one rounding to bfloat16.
  const HeadGradient expected(p.hidden, p.weight, kLogitScale, dlogits, size, kOldWeightGradient);
  const double gradient_error = error + RowSumError(p.vocabulary, 0) + 1.01 * kBf16Round;
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
void ExpectRight(const Problem& p, const Found& found) { ExpectRight(p, {&found}); }

using CrossEntropyCuda = CudaKernelTest;

TEST_F(CrossEntropyCuda, AgreesWithReference) {
  for (const int64_t tokens : EdgeSizes()) {
    if (kSlowBuild && tokens > 1 && tokens != 33) continue;
    const Problem p(tokens, 24, 61);
    for (const int64_t chunk : {7, 64, 1000}) ExpectRight(p, Compute(ctx(), p, chunk));
  }
}

// More tokens than the sums over tokens have threads (1024).
TEST_F(CrossEntropyCuda, ManyTokens) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  const Problem p(1040, 8, 9);
  ExpectRight(p, Compute(ctx(), p, 600));
}

// One pack of 8, whole and broken; around one step of a block; several steps.
TEST_F(CrossEntropyCuda, AnyVocabulary) {
  for (const int64_t vocabulary : {1, 2, 7, 8, 9, 4095, 4096, 4097, 4105, 9001}) {
    if (kSlowBuild && vocabulary > 4097) continue;
    const Problem p(kSlowBuild ? 2 : 6, 16, vocabulary, 42);
    ExpectRight(p, Compute(ctx(), p, 4));
  }
}

TEST_F(CrossEntropyCuda, RepeatsToTheBit) {
  const Problem p(kSlowBuild ? 9 : 33, 24, 999);
  const Found first = Compute(ctx(), p, 8);
  for (int i = 0; i < 2; ++i) {
    const Found again = Compute(ctx(), p, 8);
    EXPECT_EQ(again.result.loss_sum, first.result.loss_sum);
    EXPECT_EQ(again.token_loss.Bytes(), first.token_loss.Bytes());
    EXPECT_EQ(again.dhidden.Bytes(), first.dhidden.Bytes());
    EXPECT_EQ(again.dweight.Bytes(), first.dweight.Bytes());
  }
}

TEST_F(CrossEntropyCuda, EachOutputMayBeLeftOut) {
  const Problem p(kSlowBuild ? 9 : 20, 24, 61);
  const Found all = Compute(ctx(), p, 8);
  const Found loss_only = Compute(ctx(), p, 8, false, false);
  EXPECT_EQ(loss_only.result.loss_sum, all.result.loss_sum);
  EXPECT_EQ(loss_only.result.correct, all.result.correct);
  EXPECT_EQ(loss_only.token_loss.Bytes(), all.token_loss.Bytes());
  EXPECT_EQ(Compute(ctx(), p, 8, true, false).dhidden.Bytes(), all.dhidden.Bytes());
  EXPECT_EQ(Compute(ctx(), p, 8, false, true).dweight.Bytes(), all.dweight.Bytes());
  const DeviceMatrix hidden(DType::kBF16, p.hidden), weight(DType::kBF16, p.weight);
  const DeviceIntegers labels(p.labels);
  const CrossEntropyResult bare =
      CrossEntropy(ctx(), hidden.tensor(), weight.tensor(), labels.tensor(),
                   {kLogitScale, kGradScale, 8}, {}, {}, {});
  EXPECT_EQ(bare.loss_sum, all.result.loss_sum);
}

TEST_F(CrossEntropyCuda, TokensWithoutTarget) {
  Problem p(20, 24, 61);
  for (size_t t = 0; t < p.labels.size(); ++t) p.labels[t] = t % 2 == 0 ? -1 : 5;
  const Found some = Compute(ctx(), p, 16);
  const Matrix dhidden = some.dhidden.Download();
  const Matrix token_loss = some.token_loss.Download();
  for (int64_t t = 0; t < p.tokens; t += 2) {
    for (int64_t i = 0; i < p.width; ++i) ASSERT_EQ(dhidden.at(t, i), 0.0F);
    ASSERT_EQ(token_loss.at(0, t), 0.0F);
  }
  for (int32_t& label : p.labels) label = -1;
  const Found none = Compute(ctx(), p, 16);
  EXPECT_EQ(none.result.loss_sum, 0.0);
  EXPECT_EQ(none.result.targets, 0);
  EXPECT_EQ(none.result.correct, 0);
  for (const float x : none.token_loss.Download().values<float>()) ASSERT_EQ(x, 0.0F);
  for (const float x : none.dhidden.Download().values<float>()) ASSERT_EQ(x, 0.0F);
  for (const float x : none.dweight.Download().values<float>()) ASSERT_EQ(x, kOldWeightGradient);
}

// The logits are the first column of the weight; equal ones stand in one pack, in one thread's next
// step, in another thread, and in another warp.
TEST_F(CrossEntropyCuda, TiesGoToTheLowestId) {
  constexpr int64_t kVocabulary = 9000;
  for (const int64_t first : {3, 300, 4000}) {
    for (const int64_t second : {first + 1, first + 9, first + 1000, first + 4096}) {
      Matrix hidden = Matrix::Filled(3, 8, 0);
      for (int64_t t = 0; t < 3; ++t) hidden.at(t, 0) = 1;
      Matrix weight = Matrix::Filled(kVocabulary, 8, 0);
      for (int64_t v = 0; v < kVocabulary; ++v) weight.at(v, 0) = -2;
      weight.at(first, 0) = weight.at(second, 0) = 1.5F;
      const DeviceMatrix h(DType::kBF16, hidden), w(DType::kBF16, weight);
      const auto lower = static_cast<int32_t>(first);
      const DeviceIntegers labels({lower, lower, static_cast<int32_t>(second)});
      const DeviceMatrix token_loss(DType::kF32, 1, 3);
      const CrossEntropyResult result = CrossEntropy(ctx(), h.tensor(), w.tensor(), labels.tensor(),
                                                     {}, token_loss.vector(), {}, {});
      EXPECT_EQ(result.correct, 2) << first << ", " << second;
      const Matrix losses = token_loss.Download();
      EXPECT_EQ(losses.at(0, 0), losses.at(0, 2));
      EXPECT_NEAR(losses.at(0, 0), std::log(2 + (kVocabulary - 2) * std::exp(-3.5)),
                  RowSumError(kVocabulary, 3.5) + 10 * kF32Round);
    }
    if (kSlowBuild) break;
  }
}

TEST_F(CrossEntropyCuda, LargeLogitsStayFinite) {
  Problem p(5, 24, 61);
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t i = 0; i < p.width; ++i) p.hidden.at(t, i) *= 16384.0F;
  }
  p.labels = {1, 2, 3, 4, 5};
  const Found found = Compute(ctx(), p, 2);
  EXPECT_TRUE(std::isfinite(found.result.loss_sum));
  for (const float x : found.dhidden.Download().values<float>()) ASSERT_TRUE(std::isfinite(x));
  for (const float x : found.dweight.Download().values<float>()) ASSERT_TRUE(std::isfinite(x));
  p.hidden.at(0, 0) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(Compute(ctx(), p, 2).result.loss_sum));
}

TEST_F(CrossEntropyCuda, DryRunNeedsTheScratchOfARealRun) {
  auto opened = OpenCudaDevice({.host = "test", .dry = true});
  ASSERT_TRUE(opened.ok());
  const std::unique_ptr<Device> dry = std::move(opened).value();
  Arena memory(size_t{1} << 20, dry.get());
  Arena scratch(size_t{1} << 20, dry.get());
  const Context context = {DeviceKind::kCuda, nullptr, &scratch, dry.get()};
  CrossEntropy(context, memory.New(DType::kBF16, {33, 16}), memory.New(DType::kBF16, {61, 16}),
               memory.New(DType::kI32, {33}), {1.0F, 1.0F, 16}, memory.New(DType::kF32, {33}),
               memory.New(DType::kBF16, {33, 16}), memory.New(DType::kF32, {61, 16}));
  // Logits, four numbers a token, four sums, the work space of a product on an sm_90; in 256 bytes.
  const auto round = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  EXPECT_EQ(scratch.peak_bytes(),
            round(size_t{16} * 64 * 4) + round(size_t{33} * 32) + round(32) + (size_t{64} << 20));
}

using CrossEntropyCudaDeathTest = CrossEntropyCuda;

TEST_F(CrossEntropyCudaDeathTest, LabelsOutOfRangeAreFound) {
  Problem p(4, 8, 16);
  p.labels = {0, 16, -2, 15};
  EXPECT_DEATH(Compute(ctx(), p, 16), "2 labels outside of \\[-1, 16\\)");
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

// Equal parts of the vocabulary for `ranks` ranks; the padding behind it holds NaN.
Sharded ComputeSharded(const Context& ctx, const Problem& p, int64_t ranks, int64_t chunk) {
  const int64_t rows = (p.vocabulary + ranks - 1) / ranks;
  const DeviceMatrix hidden(DType::kBF16, p.hidden, 8);
  const DeviceIntegers labels(p.labels);
  Sharded found(ranks);
  // Nothing that is sent depends on what is received.
  found.exchanged.Run(2, [&](const RankExchange& exchange) {
    const int64_t first = exchange.rank * rows;
    Matrix part(rows, p.width);
    for (int64_t r = 0; r < std::min(rows, p.vocabulary - first); ++r) {
      for (int64_t i = 0; i < p.width; ++i) part.at(r, i) = p.weight.at(first + r, i);
    }
    const DeviceMatrix weight(DType::kBF16, part, 16);
    auto& mine = found.ranks[static_cast<size_t>(exchange.rank)];
    mine.emplace(p, true, rows);
    mine->result =
        CrossEntropy(ctx, hidden.tensor(), weight.tensor(), labels.tensor(),
                     {kLogitScale, kGradScale, chunk, {first, p.vocabulary, &exchange}},
                     mine->token_loss.vector(), mine->dhidden.tensor(), mine->dweight.tensor());
  });
  return found;
}

// 37 entries on 4 ranks: 10 rows each, 3 of padding. 5 on 4: the last rank has nothing but padding.
TEST_F(CrossEntropyCuda, RanksWithPartsOfTheVocabulary) {
  for (const auto& [tokens, vocabulary, ranks] : {std::tuple{21, 37, 1},
                                                  {21, 37, 2},
                                                  {21, 37, 3},
                                                  {21, 37, 4},
                                                  {9, 5, 4},
                                                  {0, 37, 2},
                                                  {3, 8209, 2}}) {
    if (kSlowBuild && (ranks == 3 || vocabulary > 37)) continue;
    SCOPED_TRACE(testing::Message() << vocabulary << " entries on " << ranks << " ranks");
    const Problem p(tokens, 16, vocabulary, 44);
    const Sharded found = ComputeSharded(ctx(), p, ranks, 8);
    ExpectRight(p, found.all());
    std::vector<int64_t> sizes;
    for (int64_t begin = 0; begin < tokens; begin += 8) {
      sizes.push_back(5 * std::min<int64_t>(8, tokens - begin));
    }
    EXPECT_EQ(found.exchanged.sizes(), sizes);
  }
}

TEST_F(CrossEntropyCuda, AllLabelsOnOneRankOrNone) {
  Problem p(5, 16, 37, 45);
  for (const int32_t label : {0, 36, -1}) {
    for (int32_t& l : p.labels) l = label;
    ExpectRight(p, ComputeSharded(ctx(), p, 4, 4).all());
  }
}

// The logits are the first column of the weight: the largest ones at entries 17 and 30.
TEST_F(CrossEntropyCuda, TiesGoToTheLowestIdOfAllRanks) {
  Problem p(2, 8, 37);
  p.hidden = Matrix::Filled(2, 8, 0);
  for (int64_t t = 0; t < 2; ++t) p.hidden.at(t, 0) = 1;
  for (int64_t v = 0; v < 37; ++v) p.weight.at(v, 0) = -1;
  p.weight.at(17, 0) = p.weight.at(30, 0) = 2;
  for (const int64_t ranks : {1, 2, 3, 4}) {
    p.labels = {17, 30};
    const Sharded found = ComputeSharded(ctx(), p, ranks, 16);
    for (const Found* rank : found.all()) EXPECT_EQ(rank->result.correct, 1);
    p.labels = {30, 30};
    const Sharded others = ComputeSharded(ctx(), p, ranks, 16);
    for (const Found* rank : others.all()) EXPECT_EQ(rank->result.correct, 0);
  }
}

// A rank whose logits all overflow takes no part; a NaN of one rank reaches all.
TEST_F(CrossEntropyCuda, InfinityAndNanOfOneRank) {
  Problem p(1, 8, 37);
  p.hidden = Matrix::Filled(1, 8, 0);
  p.hidden.at(0, 0) = 64;
  for (int64_t v = 0; v < 37; ++v) p.weight.at(v, 0) = v >= 10 && v < 20 ? -3e38F : 0.0F;
  p.labels = {3};
  const Sharded found = ComputeSharded(ctx(), p, 4, 16);
  for (const Found* rank : found.all()) {
    EXPECT_NEAR(rank->result.loss_sum, std::log(27.0), RowSumError(37, 0));
    for (const float x : rank->dhidden.Download().values<float>()) ASSERT_TRUE(std::isfinite(x));
  }
  p.weight.at(25, 0) = NAN;
  const Sharded spoiled = ComputeSharded(ctx(), p, 4, 16);
  for (const Found* rank : spoiled.all()) EXPECT_TRUE(std::isnan(rank->result.loss_sum));
}

TEST_F(CrossEntropyCuda, PaddingOfOneRankChangesNoBit) {
  const Problem p(kSlowBuild ? 9 : 33, 24, 61);
  const Found found = Compute(ctx(), p, 8);
  Matrix padded(64, p.width);
  for (int64_t r = 0; r < 61; ++r) {
    for (int64_t i = 0; i < p.width; ++i) padded.at(r, i) = p.weight.at(r, i);
  }
  const DeviceMatrix hidden(DType::kBF16, p.hidden, 8), weight(DType::kBF16, padded, 16);
  const DeviceIntegers labels(p.labels);
  Found with(p, true, 64);
  CrossEntropyOptions options = {kLogitScale, kGradScale, 8};
  options.shard.vocab = 61;
  with.result =
      CrossEntropy(ctx(), hidden.tensor(), weight.tensor(), labels.tensor(), options,
                   with.token_loss.vector(), with.dhidden.tensor(), with.dweight.tensor());
  EXPECT_EQ(with.result.loss_sum, found.result.loss_sum);
  EXPECT_EQ(with.result.correct, found.result.correct);
  EXPECT_EQ(with.token_loss.Bytes(), found.token_loss.Bytes());
  EXPECT_EQ(with.dhidden.Bytes(), found.dhidden.Bytes());
  const Matrix dweight = with.dweight.Download(), expected = found.dweight.Download();
  for (int64_t r = 0; r < 64; ++r) {
    for (int64_t i = 0; i < p.width; ++i) {
      ASSERT_EQ(dweight.at(r, i), r < 61 ? expected.at(r, i) : kOldWeightGradient);
    }
  }
}

TEST_F(CrossEntropyCuda, DryRunExchangesAndNeedsRoomForIt) {
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
  CrossEntropy(context, memory.New(DType::kBF16, {33, 16}), memory.New(DType::kBF16, {61, 16}),
               memory.New(DType::kI32, {33}), {1.0F, 1.0F, 16, {61, 122, &exchange}},
               memory.New(DType::kF32, {33}), memory.New(DType::kBF16, {33, 16}),
               memory.New(DType::kF32, {61, 16}));
  EXPECT_EQ(floats, 33 * 5);
  // As without ranks, and what is exchanged for 16 tokens: this rank's and that of both.
  const auto round = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  EXPECT_EQ(scratch.peak_bytes(), round(size_t{16} * 64 * 4) + round(size_t{33} * 32) + round(32) +
                                      (size_t{64} << 20) + round(size_t{16} * 20) +
                                      round(size_t{16} * 20 * 2));
}

}  // namespace
}  // namespace sala::kernels
