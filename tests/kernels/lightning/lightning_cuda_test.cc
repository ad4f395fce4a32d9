#include <limits>

#include "kernels/lightning/lightning.h"
#include "kernels/lightning/reference.h"
#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {
namespace {

using Doubles = std::vector<double>;

Doubles Absolute(Doubles x) {
  for (double& value : x) value = std::abs(value);
  return x;
}

// Inputs of unit variance that bfloat16 holds, and the device's answers.
struct Problem {
  Problem(std::vector<int32_t> cu, std::vector<float> decay, int64_t width, unsigned seed = 1)
      : cu_seqlens(std::move(cu)),
        slopes(std::move(decay)),
        t(cu_seqlens.back()),
        n(static_cast<int64_t>(slopes.size())),
        d(width) {
    std::mt19937 rng(seed);
    for (Matrix* x : {&q, &k, &v, &dout}) *x = RandomBf16(t, n * d, rng);
    for (Matrix* x : {&state_in, &dstate_out}) *x = Matrix::Random(n, d * d, rng);
  }

  float scale() const { return 1.0F / std::sqrt(static_cast<float>(d)); }

  static Matrix RowsOf(const Matrix& x, int64_t begin, int64_t end) {
    Matrix rows(end - begin, x.columns());
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < x.columns(); ++c) rows.at(r - begin, c) = x.at(r, c);
    }
    return rows;
  }
  // Tokens [begin, end) as one document of their own; the states are those of this problem.
  Problem Piece(int64_t begin, int64_t end) const {
    Problem piece({0, static_cast<int32_t>(end - begin)}, slopes, d);
    piece.q = RowsOf(q, begin, end);
    piece.k = RowsOf(k, begin, end);
    piece.v = RowsOf(v, begin, end);
    piece.dout = RowsOf(dout, begin, end);
    piece.state_in = state_in;
    piece.dstate_out = dstate_out;
    return piece;
  }

  // `Rows`: DeviceMatrix or FarMatrix.
  template <typename Rows = DeviceMatrix>
  void Run(const Context& ctx, bool with_states = true) {
    const auto heads = [this](const Rows& x) { return x.heads(n, d); };
    const auto state = [this, with_states](const DeviceMatrix& x) {
      return with_states ? x.tensor().Reshape({n, d, d}) : Tensor();
    };
    // Different strides, none of them the width.
    const Rows dev_q(DType::kBF16, q, 8), dev_k(DType::kBF16, k, 16), dev_v(DType::kBF16, v, 24),
        dev_dout(DType::kBF16, dout, 8);
    const DeviceMatrix dev_in(DType::kF32, state_in), dev_dout_state(DType::kF32, dstate_out);
    const Rows dev_out(DType::kBF16, t, n * d, 16), dev_dq(DType::kBF16, t, n * d, 8),
        dev_dk(DType::kBF16, t, n * d, 24), dev_dv(DType::kBF16, t, n * d, 16);
    const DeviceMatrix dev_state_out(DType::kF32, n, d * d), dev_dstate_in(DType::kF32, n, d * d);
    LightningForward(ctx, heads(dev_q), heads(dev_k), heads(dev_v), cu_seqlens, slopes, scale(),
                     state(dev_in), heads(dev_out), state(dev_state_out));
    LightningBackward(ctx, heads(dev_q), heads(dev_k), heads(dev_v), heads(dev_dout), cu_seqlens,
                      slopes, scale(), state(dev_in), state(dev_dout_state), heads(dev_dq),
                      heads(dev_dk), heads(dev_dv), state(dev_dstate_in));
    for (const Rows* x : {&dev_out, &dev_dq, &dev_dk, &dev_dv}) {
      EXPECT_TRUE(x->GapsUntouched());
    }
    out = dev_out.Download();
    dq = dev_dq.Download();
    dk = dev_dk.Download();
    dv = dev_dv.Download();
    state_out = dev_state_out.Download();
    dstate_in = dev_dstate_in.Download();
  }

  std::vector<const Matrix*> Results() const { return {&out, &dq, &dk, &dv}; }

  std::vector<int32_t> cu_seqlens;
  std::vector<float> slopes;
  int64_t t, n, d;
  Matrix q{0, 1}, k{0, 1}, v{0, 1}, dout{0, 1}, state_in{0, 1}, dstate_out{0, 1};
  Matrix out{0, 1}, dq{0, 1}, dk{0, 1}, dv{0, 1}, state_out{0, 1}, dstate_in{0, 1};
};

struct Expected {
  reference::LightningResult<double> forward;
  reference::LightningGradients backward;
};

Expected RunReference(const Problem& p, bool absolute, const Doubles& state_in,
                      const Doubles& dstate_out) {
  const auto input = [absolute](const Matrix& x) {
    return absolute ? Absolute(x.values()) : x.values();
  };
  const reference::LightningShape shape = {
      p.t, p.n, p.d, static_cast<double>(p.scale()), {p.slopes.begin(), p.slopes.end()}};
  const Doubles s = absolute ? Absolute(state_in) : state_in;
  const Doubles ds = absolute ? Absolute(dstate_out) : dstate_out;
  return {reference::LightningForward(shape, input(p.q), input(p.k), input(p.v), s),
          reference::LightningBackward(shape, input(p.q), input(p.k), input(p.v), input(p.dout), s,
                                       ds)};
}

// The value of each result and the same sum with the absolute value of every term.
struct Standard {
  Standard(const Problem& p, const Doubles& state_in, const Doubles& dstate_out)
      : value(RunReference(p, false, state_in, dstate_out)),
        size(RunReference(p, true, state_in, dstate_out)) {}
  Expected value, size;
};

// Rounding of float32 accumulation: the longest path has D products for a score or a state's row,
// 64 in the chunk, 64 for the state's update, per chunk a decay, its table entry and an addition,
// and per segment the scan's.
double F32Error(const Problem& p) {
  return (2 * static_cast<double>(p.d) + 2 * 64 + 5 * (static_cast<double>(p.t) / 64 + 2)) *
         kF32Round;
}

// A path of one output has at most two roundings to bfloat16 before the last one: either the score,
// or the decayed operand of the state and then the state. Each is relative to the term that it
// rounds, so the sum of absolute values bounds them all; the output's own rounding is relative to
// the output. The factor 1.01 covers second order. Terms that are left out (kReach in
// cuda_states.cu: 4e-18 of a term) are far below F32Error.
double ActivationBound(const Problem& p, double value, double size) {
  return 1.01 * kBf16Round * std::abs(value) + (2.02 * kBf16Round + F32Error(p)) * size;
}
// A state is float32 and rounds the decayed operand.
double StateBound(const Problem& p, double size) {
  return (1.01 * kBf16Round + F32Error(p)) * size;
}

// Rows [begin, begin + piece.t) of the results of `p`.
void ExpectDocument(const Problem& p, const Problem& piece, int64_t begin,
                    const Standard& standard) {
  const auto compare = [&](const Matrix& found, const Doubles& value, const Doubles& size) {
    ExpectClose(Problem::RowsOf(found, begin, begin + piece.t), value,
                [&](size_t i) { return ActivationBound(p, value[i], size[i]); });
  };
  compare(p.out, standard.value.forward.out, standard.size.forward.out);
  compare(p.dq, standard.value.backward.dq, standard.size.backward.dq);
  compare(p.dk, standard.value.backward.dk, standard.size.backward.dk);
  compare(p.dv, standard.value.backward.dv, standard.size.backward.dv);
}
void ExpectDocument(const Problem& p, int64_t begin, int64_t end, const Doubles& state_in,
                    const Doubles& dstate_out) {
  SCOPED_TRACE("document at " + std::to_string(begin));
  const Problem piece = p.Piece(begin, end);
  ExpectDocument(p, piece, begin, Standard(piece, state_in, dstate_out));
}

void ExpectStateOut(const Problem& p, const Standard& last) {
  const Doubles& size = last.size.forward.state_out;
  ExpectClose(p.state_out, last.value.forward.state_out,
              [&](size_t i) { return StateBound(p, size[i]); });
}
void ExpectStateGradient(const Problem& p, const Standard& first) {
  const Doubles& size = first.size.backward.dstate_in;
  ExpectClose(p.dstate_in, first.value.backward.dstate_in,
              [&](size_t i) { return StateBound(p, size[i]); });
}

// Root mean square of the kernel's own error relative to the values, for one head. The rounding of
// the result is the format's, not the kernel's: its mean square, known from the expected values, is
// allowed on top.
void ExpectSmallRms(const Matrix& found, const Doubles& expected, int64_t head, int64_t width,
                    const std::string& where) {
  constexpr double kOwnError = 2.5e-3;
  double error = 0;
  double rounding = 0;
  double size = 0;
  for (int64_t r = 0; r < found.rows(); ++r) {
    for (int64_t c = head * width; c < (head + 1) * width; ++c) {
      const double value = expected[static_cast<size_t>(r * found.columns() + c)];
      const double rounded = static_cast<float>(BF16(static_cast<float>(value)));
      error += (found.at(r, c) - value) * (found.at(r, c) - value);
      rounding += (rounded - value) * (rounded - value);
      size += value * value;
    }
  }
  EXPECT_LT(std::sqrt(error / size), std::sqrt(kOwnError * kOwnError + rounding / size)) << where;
}

// All results of one document. With bfloat16 scores, decayed operands and states as operands the
// error before the result is rounded is 1.7e-3 for the quickest and 2.2e-3 for the slowest decay.
void ExpectOneDocument(const Problem& p) {
  const Standard standard(p, p.state_in.values(), p.dstate_out.values());
  ExpectDocument(p, p, 0, standard);
  ExpectStateOut(p, standard);
  ExpectStateGradient(p, standard);
  constexpr int64_t kEnoughTokens = 63;  // below, one score's rounding weighs too much
  if (p.t < kEnoughTokens) return;
  for (int64_t h = 0; h < p.n; ++h) {
    const auto& forward = standard.value.forward;
    const auto& backward = standard.value.backward;
    const std::string slope = " at slope " + std::to_string(p.slopes[static_cast<size_t>(h)]);
    ExpectSmallRms(p.out, forward.out, h, p.d, "out" + slope);
    ExpectSmallRms(p.dq, backward.dq, h, p.d, "dq" + slope);
    ExpectSmallRms(p.dk, backward.dk, h, p.d, "dk" + slope);
    ExpectSmallRms(p.dv, backward.dv, h, p.d, "dv" + slope);
  }
}

class LightningCuda : public CudaKernelTest {};

TEST_F(LightningCuda, MatchesTheRecurrenceAtAllEdgeLengths) {
  for (int32_t t : {1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
    for (int64_t d : {16, 32, 64}) {
      if (kSlowBuild && (d == 64 || t % 2 == 0)) continue;
      SCOPED_TRACE(std::to_string(t) + " tokens, width " + std::to_string(d));
      Problem p({0, t}, {0.84F, 1.0F / 256}, d);
      p.Run(ctx());
      ExpectOneDocument(p);
    }
  }
}

TEST_F(LightningCuda, WidestHead) {
  for (int32_t t : {1, 63, 64, 65, 128, 300}) {
    if (kSlowBuild && t != 65) continue;
    SCOPED_TRACE(std::to_string(t) + " tokens");
    Problem p({0, t}, {0.1F, 1.0F / 256}, 128);
    p.Run(ctx());
    ExpectOneDocument(p);
  }
}

// Segments have 256 tokens at these sizes, so 4 to 6 of them, the last one with 1 or 60 tokens.
TEST_F(LightningCuda, SeveralSegments) {
  for (const auto& [t, d] : {std::pair{1025, 16}, {1340, 32}, {769, 64}}) {
    if (kSlowBuild && d != 16) continue;
    Problem p({0, t}, {0.84F, 0.1F, 1.0F / 64, 1.0F / 256, 0.0F}, d);
    p.Run(ctx());
    ExpectOneDocument(p);
  }
}

TEST_F(LightningCuda, SlowDecayOverManySegmentsOfTheWidestHead) {
  if (kSlowBuild) GTEST_SKIP() << "too long for a sanitizer";
  Problem p({0, 1536}, {0.84F, 0.1F, 1.0F / 64, 1.0F / 256}, 128);
  p.Run(ctx());
  ExpectOneDocument(p);
}

// More entries than one batch of the scan has (8).
TEST_F(LightningCuda, ManySegments) {
  if (kSlowBuild) GTEST_SKIP() << "too long for a sanitizer";
  Problem p({0, 256 * 18 + 7}, {1.0F / 256, 1.0F / 1024}, 16);
  p.Run(ctx());
  ExpectOneDocument(p);
}

// Documents that start at a chunk's or a segment's start (64, 192, 256), end with one (128, 512),
// one-token documents in numbers, a last chunk of one token, an empty document, documents over
// several segments.
const std::vector<std::vector<int32_t>>& Packings() {
  static const std::vector<std::vector<int32_t>> packings = {
      {0, 64, 100, 128, 192, 257},   {0, 1, 2, 3, 3, 4, 70, 71, 72, 200, 201},
      {0, 63, 64, 65, 129},          {0, 130, 131},
      {0, 256, 512, 513, 600, 1100}, {0, 255, 257, 900, 960, 961}};
  return packings;
}

TEST_F(LightningCuda, PackedDocumentsMatchSeparateRecurrences) {
  for (const std::vector<int32_t>& cu : Packings()) {
    SCOPED_TRACE("packing of " + std::to_string(cu.back()));
    if (kSlowBuild && cu.back() > 1000) continue;
    Problem p(cu, {0.5F, 1.0F / 256}, 16);
    p.Run(ctx(), /*with_states=*/false);
    for (size_t s = 0; s + 1 < cu.size(); ++s) {
      if (cu[s] < cu[s + 1]) ExpectDocument(p, cu[s], cu[s + 1], {}, {});
    }
  }
}

TEST_F(LightningCuda, PackedDocumentsOfTheWidestHead) {
  const std::vector<int32_t> cu = {0, 64, 100, 320, 321};
  Problem p(cu, {1.0F / 256}, 128);
  p.Run(ctx(), /*with_states=*/false);
  for (size_t s = 0; s + 1 < cu.size(); ++s) ExpectDocument(p, cu[s], cu[s + 1], {}, {});
}

TEST_F(LightningCuda, ManyDocumentsOfOneToken) {
  constexpr int32_t kTokens = 300;
  std::vector<int32_t> cu;
  for (int32_t i = 0; i <= kTokens; ++i) cu.push_back(i);
  Problem p(cu, {0.5F, 1.0F / 256}, 32);
  p.Run(ctx(), /*with_states=*/false);
  for (int32_t i = 0; i < kTokens; ++i) ExpectDocument(p, i, i + 1, {}, {});
}

TEST_F(LightningCuda, StatesReachOnlyTheFirstAndTheLastDocument) {
  for (const std::vector<int32_t>& cu :
       {std::vector<int32_t>{0, 70, 90, 200}, {0, 600, 640, 1200}, {0, 256, 300, 512}}) {
    if (kSlowBuild && cu.back() > 1000) continue;
    SCOPED_TRACE("packing of " + std::to_string(cu.back()));
    Problem p(cu, {0.1F, 1.0F / 256}, 16);
    p.Run(ctx());
    const Doubles in = p.state_in.values();
    const Doubles gradient = p.dstate_out.values();
    ExpectDocument(p, cu[0], cu[1], in, {});
    ExpectDocument(p, cu[1], cu[2], {}, {});
    ExpectDocument(p, cu[2], cu[3], {}, gradient);
    ExpectStateOut(p, Standard(p.Piece(cu[2], cu[3]), {}, gradient));
    ExpectStateGradient(p, Standard(p.Piece(cu[0], cu[1]), in, {}));
  }
}

TEST_F(LightningCuda, SplitWithCarriedStateMatchesOnePass) {
  constexpr int32_t kTokens = 600;
  for (int32_t cut : {64, 256, 320, 576}) {
    if (kSlowBuild && cut != 320) continue;
    Problem whole({0, kTokens}, {0.84F, 0.1F, 1.0F / 256}, 32);
    whole.Run(ctx());
    Problem left = whole.Piece(0, cut);
    Problem right = whole.Piece(cut, kTokens);
    left.Run(ctx());  // its gradients wait for the right part
    right.state_in = left.state_out;
    right.Run(ctx());
    left.dstate_out = right.dstate_in;
    left.Run(ctx());

    const Standard standard(whole, whole.state_in.values(), whole.dstate_out.values());
    const auto compare = [&](const Matrix& a, const Matrix& b, const Matrix& all,
                             const Doubles& value, const Doubles& size, bool state) {
      Doubles found = a.values();
      const Doubles tail = b.values();
      found.insert(found.end(), tail.begin(), tail.end());
      // Both sides round.
      ExpectClose(all, found, [&](size_t i) {
        return 2 * (state ? StateBound(whole, size[i]) : ActivationBound(whole, value[i], size[i]));
      });
    };
    const Expected& value = standard.value;
    const Expected& size = standard.size;
    const Matrix none(0, 1);
    compare(left.out, right.out, whole.out, value.forward.out, size.forward.out, false);
    compare(left.dq, right.dq, whole.dq, value.backward.dq, size.backward.dq, false);
    compare(left.dk, right.dk, whole.dk, value.backward.dk, size.backward.dk, false);
    compare(left.dv, right.dv, whole.dv, value.backward.dv, size.backward.dv, false);
    compare(right.state_out, none, whole.state_out, {}, size.forward.state_out, true);
    compare(left.dstate_in, none, whole.dstate_in, {}, size.backward.dstate_in, true);
  }
}

TEST_F(LightningCuda, ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens) {
  for (int64_t d : {16, 128}) {
    if (kSlowBuild && d == 128) continue;
    const std::vector<int32_t> cu = {0, 90, 150, 151, 600};
    Problem before(cu, {0.5F, 1.0F / 256}, d);
    before.Run(ctx());
    Problem after(cu, {0.5F, 1.0F / 256}, d);
    constexpr int64_t kChanged = 120;
    for (Matrix* x : {&after.q, &after.k, &after.v, &after.dout}) x->at(kChanged, 3) += 1.0F;
    after.Run(ctx());
    for (const auto& [begin, end] : {std::pair{0, 90}, {150, 151}, {151, 600}}) {
      for (size_t i = 0; i < before.Results().size(); ++i) {
        EXPECT_TRUE(Problem::RowsOf(*before.Results()[i], begin, end)
                        .SameBits(Problem::RowsOf(*after.Results()[i], begin, end)))
            << "result " << i << " of the document at " << begin;
      }
    }
    EXPECT_TRUE(before.state_out.SameBits(after.state_out));
    EXPECT_TRUE(before.dstate_in.SameBits(after.dstate_in));
    EXPECT_TRUE(Problem::RowsOf(before.out, 90, kChanged)
                    .SameBits(Problem::RowsOf(after.out, 90, kChanged)));
    EXPECT_FALSE(Problem::RowsOf(before.out, kChanged, 150)
                     .SameBits(Problem::RowsOf(after.out, kChanged, 150)));
  }
}

TEST_F(LightningCuda, BitsDoNotDependOnRuns) {
  const std::vector<int32_t> cu = {0, 90, 91, 580};
  Problem first(cu, {0.5F, 1.0F / 256}, 32);
  first.Run(ctx());
  Problem second(cu, {0.5F, 1.0F / 256}, 32);
  second.Run(ctx());
  for (size_t i = 0; i < first.Results().size(); ++i) {
    EXPECT_TRUE(first.Results()[i]->SameBits(*second.Results()[i])) << "result " << i;
  }
  EXPECT_TRUE(first.state_out.SameBits(second.state_out));
  EXPECT_TRUE(first.dstate_in.SameBits(second.dstate_in));
}

TEST_F(LightningCuda, TokensMayLieFarApart) {
  if (!FarMatrix::Possible()) GTEST_SKIP() << "no such memory here";
  const std::vector<int32_t> cu = {0, 90, 300};
  Problem near(cu, {0.5F, 1.0F / 256}, 16);
  near.Run(ctx());
  Problem far(cu, {0.5F, 1.0F / 256}, 16);
  far.Run<FarMatrix>(ctx());
  for (size_t i = 0; i < near.Results().size(); ++i) {
    EXPECT_TRUE(near.Results()[i]->SameBits(*far.Results()[i])) << "result " << i;
  }
}

// Chunks of 64 tokens that have tokens of two documents multiply all of them with each other. Where
// a document begins with a chunk only states could carry something over, and a state of another
// document is not multiplied with zero but left out.
TEST_F(LightningCuda, NotANumberPassesNoBorderOfChunks) {
  // Borders inside of a segment (256 tokens), and between two.
  const std::vector<int32_t> cu = {0, 128, 192, 256, 512, 576, 1100};
  Problem before(cu, {0.5F, 1.0F / 256}, 16);
  before.Run(ctx());
  for (const size_t poisoned : {0U, 2U, 3U, 4U, 5U}) {
    Problem after(cu, {0.5F, 1.0F / 256}, 16);
    const int64_t changed = cu[poisoned] + 5;
    for (Matrix* x : {&after.q, &after.k, &after.v, &after.dout}) {
      x->at(changed, 3) = std::numeric_limits<float>::quiet_NaN();
    }
    after.Run(ctx());
    for (size_t s = 0; s + 1 < cu.size(); ++s) {
      if (s == poisoned) continue;
      for (size_t i = 0; i < before.Results().size(); ++i) {
        EXPECT_TRUE(Problem::RowsOf(*before.Results()[i], cu[s], cu[s + 1])
                        .SameBits(Problem::RowsOf(*after.Results()[i], cu[s], cu[s + 1])))
            << "result " << i << " of the document at " << cu[s] << " with a NaN at " << changed;
      }
    }
  }
}

TEST_F(LightningCuda, NoTokensPassTheStatesThrough) {
  Problem p({0}, {0.5F, 0.1F}, 16);
  p.Run(ctx());
  EXPECT_TRUE(p.state_out.SameBits(p.state_in));
  EXPECT_TRUE(p.dstate_in.SameBits(p.dstate_out));
  // With no state to pass on, zero.
  const DeviceMatrix none(DType::kBF16, 0, 32), out(DType::kF32, 2, 256);
  const auto heads = none.heads(2, 16);
  LightningForward(ctx(), heads, heads, heads, p.cu_seqlens, p.slopes, 1.0F, {}, heads,
                   out.tensor().Reshape({2, 16, 16}));
  for (double x : out.Download().values()) EXPECT_EQ(x, 0.0);
}

TEST_F(LightningCuda, StatesMayBeTakenAndGivenInTheSameMemory) {
  constexpr int64_t kWidth = 16;
  Problem p({0, 600}, {0.1F, 1.0F / 256}, kWidth);
  p.Run(ctx());
  const DeviceMatrix q(DType::kBF16, p.q), k(DType::kBF16, p.k), v(DType::kBF16, p.v),
      dout(DType::kBF16, p.dout), state_in(DType::kF32, p.state_in), state(DType::kF32, p.state_in),
      dstate(DType::kF32, p.dstate_out);
  const DeviceMatrix out(DType::kBF16, p.t, p.n * kWidth), dq(DType::kBF16, p.t, p.n * kWidth),
      dk(DType::kBF16, p.t, p.n * kWidth), dv(DType::kBF16, p.t, p.n * kWidth);
  const auto heads = [&](const DeviceMatrix& x) { return x.heads(p.n, kWidth); };
  const auto states = [&](const DeviceMatrix& x) {
    return x.tensor().Reshape({p.n, kWidth, kWidth});
  };
  LightningForward(ctx(), heads(q), heads(k), heads(v), p.cu_seqlens, p.slopes, p.scale(),
                   states(state), heads(out), states(state));
  LightningBackward(ctx(), heads(q), heads(k), heads(v), heads(dout), p.cu_seqlens, p.slopes,
                    p.scale(), states(state_in), states(dstate), heads(dq), heads(dk), heads(dv),
                    states(dstate));
  EXPECT_TRUE(out.Download().SameBits(p.out));
  EXPECT_TRUE(dk.Download().SameBits(p.dk));
  EXPECT_TRUE(state.Download().SameBits(p.state_out));
  EXPECT_TRUE(dstate.Download().SameBits(p.dstate_in));
}

// LightningStates and LightningStateGradient of the problem's tokens, `in_place`: into the memory
// of the states that enter.
void RunStates(const Context& ctx, Problem& p, bool carried_in, bool in_place) {
  const DeviceMatrix q(DType::kBF16, p.q, 8), k(DType::kBF16, p.k, 16), v(DType::kBF16, p.v, 24),
      dout(DType::kBF16, p.dout, 8), state_in(DType::kF32, p.state_in),
      dstate_out(DType::kF32, p.dstate_out), other(DType::kF32, p.n, p.d * p.d),
      dother(DType::kF32, p.n, p.d * p.d);
  const auto state = [&p](const DeviceMatrix& x) { return x.tensor().Reshape({p.n, p.d, p.d}); };
  const DeviceMatrix& state_out = in_place ? state_in : other;
  const DeviceMatrix& dstate_in = in_place ? dstate_out : dother;
  LightningStates(ctx, k.heads(p.n, p.d), v.heads(p.n, p.d), p.cu_seqlens, p.slopes,
                  carried_in ? state(state_in) : Tensor(), state(state_out));
  LightningStateGradient(ctx, q.heads(p.n, p.d), dout.heads(p.n, p.d), p.cu_seqlens, p.slopes,
                         p.scale(), carried_in, state(dstate_out), state(dstate_in));
  p.state_out = state_out.Download();
  p.dstate_in = dstate_in.Download();
}

// Documents that begin and end on and off the grids of chunks (64) and segments (256), one that
// ends with the tokens, one over all, none.
TEST_F(LightningCuda, StatesAloneHaveTheBitsOfTheFullCalls) {
  for (const auto& cu : {std::vector<int32_t>{0, 600},
                         {0, 0, 70, 90, 200},
                         {0, 64, 128},
                         {0, 512, 513},
                         {0, 512, 600},
                         {0, 256, 512},
                         {0, 300, 620, 700},
                         {0, 1},
                         {0, 200, 200},
                         {0},
                         {0, 0}}) {
    SCOPED_TRACE("packing of " + std::to_string(cu.back()));
    for (const int64_t d : {16, 32}) {
      if (d == 32 && (kSlowBuild || cu.size() != 3)) continue;
      Problem full(cu, {0.84F, 1.0F / 256, 0.0F}, d);
      full.Run(ctx());
      for (const bool in_place : {false, true}) {
        Problem alone(cu, full.slopes, d);
        RunStates(ctx(), alone, /*carried_in=*/true, in_place);
        EXPECT_TRUE(alone.state_out.SameBits(full.state_out)) << "in place " << in_place;
        EXPECT_TRUE(alone.dstate_in.SameBits(full.dstate_in)) << "in place " << in_place;
      }
    }
  }
}

TEST_F(LightningCuda, StatesAloneOfTheWidestHead) {
  const std::vector<int32_t> cu = {0, kSlowBuild ? 65 : 300};
  Problem full(cu, {1.0F / 256}, 128);
  full.Run(ctx());
  Problem alone(cu, full.slopes, 128);
  RunStates(ctx(), alone, true, false);
  EXPECT_TRUE(alone.state_out.SameBits(full.state_out));
  EXPECT_TRUE(alone.dstate_in.SameBits(full.dstate_in));
}

// A document that begins at token 0 takes no state and gives no gradient back.
TEST_F(LightningCuda, StatesOfADocumentThatBeginsWithTheTokens) {
  for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 100}, {0, 600}}) {
    Problem zero(cu, {0.1F, 1.0F / 256}, 16);
    zero.state_in = Matrix::Filled(zero.n, zero.d * zero.d, 0.0F);
    zero.Run(ctx());
    Problem alone(cu, zero.slopes, 16);
    RunStates(ctx(), alone, /*carried_in=*/false, false);
    EXPECT_TRUE(alone.state_out.SameBits(zero.state_out));
    for (const double x : alone.dstate_in.values()) ASSERT_EQ(x, 0.0);
  }
}

// Ranges of one document: states from left to right and their gradients from right to left agree
// with one call. Ranges shorter than a chunk, empty, and of several segments.
TEST_F(LightningCuda, StatesOfRangesMatchOneCall) {
  const std::vector<int32_t> cu = {0, 620};
  Problem whole(cu, {0.84F, 0.1F, 1.0F / 256}, 16);
  whole.Run(ctx());
  const Standard standard(whole, whole.state_in.values(), whole.dstate_out.values());
  for (const std::vector<int32_t>& borders :
       {std::vector<int32_t>{0, 20, 20, 333, 620}, {0, 0, 64, 575, 576, 620}}) {
    if (kSlowBuild && borders.size() == 6) continue;
    std::vector<Problem> parts;
    for (size_t r = 0; r + 1 < borders.size(); ++r) {
      parts.push_back(whole.Piece(borders[r], borders[r + 1]));
    }
    for (size_t r = 0; r < parts.size(); ++r) {
      if (r > 0) parts[r].state_in = parts[r - 1].state_out;
      RunStates(ctx(), parts[r], true, false);
    }
    for (size_t r = parts.size(); r-- > 0;) {
      if (r + 1 < parts.size()) parts[r].dstate_out = parts[r + 1].dstate_in;
      RunStates(ctx(), parts[r], true, false);
    }
    // The ranges have 11 chunks together, one less than F32Error counts.
    whole.state_out = parts.back().state_out;
    whole.dstate_in = parts.front().dstate_in;
    ExpectStateOut(whole, standard);
    ExpectStateGradient(whole, standard);
  }
}

TEST_F(LightningCuda, TokensPastTheDocumentsAreNeitherReadNorWritten) {
  Problem longer({0, 100}, {0.5F, 1.0F / 256}, 16);
  Problem p = longer.Piece(0, 70);
  p.Run(ctx());
  for (Matrix* x : {&longer.q, &longer.k, &longer.v, &longer.dout}) {
    for (int64_t t = 70; t < 100; ++t) {
      for (int64_t i = 0; i < x->columns(); ++i) {
        x->at(t, i) = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
  longer.cu_seqlens = {0, 70};
  longer.Run(ctx());
  for (size_t i = 0; i < p.Results().size(); ++i) {
    EXPECT_TRUE(Problem::RowsOf(*longer.Results()[i], 0, 70).SameBits(*p.Results()[i]));
    for (double x : Problem::RowsOf(*longer.Results()[i], 70, 100).values()) {
      ASSERT_TRUE(std::isnan(x));
    }
  }
}

TEST_F(LightningCuda, TotalDecayLeavesOnlyTheOwnToken) {
  Problem p({0, 130}, {200.0F}, 16);  // lambda = e^-200 counts as 0
  p.Run(ctx());
  for (int64_t t = 0; t < p.t; ++t) {
    double dot = 0;
    double size = 0;
    for (int64_t a = 0; a < p.d; ++a) {
      const double product = static_cast<double>(p.q.at(t, a)) * p.k.at(t, a);
      dot += product;
      size += std::abs(product);
    }
    for (int64_t b = 0; b < p.d; ++b) {
      const double value = p.scale() * dot * p.v.at(t, b);
      ASSERT_NEAR(p.out.at(t, b), value,
                  ActivationBound(p, value, p.scale() * size * std::abs(p.v.at(t, b))));
    }
  }
}

}  // namespace
}  // namespace sala::kernels
