#include "kernels/lightning/lightning.h"

#include <algorithm>
#include <complex>
#include <limits>

#include "kernels/lightning/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

using Complex = std::complex<double>;

std::vector<double> AsDouble(const std::vector<float>& x) { return {x.begin(), x.end()}; }

std::vector<double> Absolute(std::vector<double> x) {
  for (double& value : x) value = std::abs(value);
  return x;
}

// Everything random; outputs poisoned with NaN.
struct LightningCase {
  LightningCase(std::vector<int32_t> cu, std::vector<float> decay, int64_t width, unsigned seed = 1)
      : cu_seqlens(std::move(cu)),
        slopes(std::move(decay)),
        t(cu_seqlens.back()),
        n(static_cast<int64_t>(slopes.size())),
        d(width),
        rng(seed) {
    for (Matrix* x : {&q, &k, &v, &dout}) *x = Matrix::Random(t, n * d, rng, 3);
    for (Matrix* x : {&state_in, &dstate_out}) *x = Matrix::Random(n, d * d, rng);
    Poison();
  }
  void Poison() {
    for (Matrix* x : {&out, &dq, &dk, &dv}) *x = Matrix(t, n * d, 2);
    for (Matrix* x : {&state_out, &dstate_in}) *x = Matrix(n, d * d);
  }

  Tensor Heads(Matrix& x) const { return x.tensor().AsHeads(n, d); }
  Tensor State(Matrix& x) const { return x.tensor().Reshape({n, d, d}); }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(d)); }

  void Run(const Context& ctx, bool with_states = true) {
    const Tensor none;
    LightningForward(ctx, Heads(q), Heads(k), Heads(v), cu_seqlens, slopes, scale(),
                     with_states ? State(state_in) : none, Heads(out),
                     with_states ? State(state_out) : none);
    LightningBackward(ctx, Heads(q), Heads(k), Heads(v), Heads(dout), cu_seqlens, slopes, scale(),
                      with_states ? State(state_in) : none, with_states ? State(dstate_out) : none,
                      Heads(dq), Heads(dk), Heads(dv), with_states ? State(dstate_in) : none);
  }

  static Matrix Rows(const Matrix& x, int64_t begin, int64_t end) {
    Matrix rows(end - begin, x.columns());
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < x.columns(); ++c) rows.at(r - begin, c) = x.at(r, c);
    }
    return rows;
  }
  LightningCase Piece(int64_t begin, int64_t end) const {
    LightningCase piece({0, static_cast<int32_t>(end - begin)}, slopes, d);
    piece.q = Rows(q, begin, end);
    piece.k = Rows(k, begin, end);
    piece.v = Rows(v, begin, end);
    piece.dout = Rows(dout, begin, end);
    return piece;
  }

  std::vector<const Matrix*> Results() const { return {&out, &dq, &dk, &dv}; }

  std::vector<int32_t> cu_seqlens;
  std::vector<float> slopes;
  int64_t t, n, d;
  int64_t more_chunks = 0;  // than one call needs, where results come from several
  std::mt19937 rng;
  Matrix q{0, 1}, k{0, 1}, v{0, 1}, dout{0, 1}, state_in{0, 1}, dstate_out{0, 1};
  Matrix out{0, 1}, dq{0, 1}, dk{0, 1}, dv{0, 1}, state_out{0, 1}, dstate_in{0, 1};
};

// Worst-case first-order bound on chunked results: the longest path has D products for q.k or the
// state, 64 in the chunk, once more for the state's update, and per chunk a decay, its table
// entry's own rounding and an addition. It multiplies the same sums with absolute values for all
// terms, which the reference computes from absolute inputs.
double ErrorFactor(const LightningCase& c) {
  const double chunks = static_cast<double>(c.t) / 64 + 2 + static_cast<double>(c.more_chunks);
  return (2 * static_cast<double>(c.d) + 2 * 64 + 4 * chunks + 8) * kF32Round;
}

struct Expected {
  reference::LightningResult<double> forward;
  reference::LightningGradients backward;
};

Expected RunReference(const LightningCase& c, bool absolute, const std::vector<double>& state_in,
                      const std::vector<double>& dstate_out) {
  const auto input = [absolute](const Matrix& x) {
    return absolute ? Absolute(x.values()) : x.values();
  };
  const reference::LightningShape shape = {c.t, c.n, c.d, static_cast<double>(c.scale()),
                                           AsDouble(c.slopes)};
  const auto s = absolute ? Absolute(state_in) : state_in;
  const auto ds = absolute ? Absolute(dstate_out) : dstate_out;
  return {reference::LightningForward(shape, input(c.q), input(c.k), input(c.v), s),
          reference::LightningBackward(shape, input(c.q), input(c.k), input(c.v), input(c.dout), s,
                                       ds)};
}

// Double results, and the same sums with absolute values for all terms: what the error factor is
// relative to.
struct Bounded {
  Bounded(const LightningCase& c, const std::vector<double>& state_in,
          const std::vector<double>& dstate_out)
      : value(RunReference(c, /*absolute=*/false, state_in, dstate_out)),
        size(RunReference(c, /*absolute=*/true, state_in, dstate_out)) {}
  Expected value;
  Expected size;
};

// Rows [begin, end) of the results of `c` are those of one document of `tokens` tokens.
void ExpectRows(const LightningCase& c, const Bounded& expected, int64_t begin, int64_t tokens) {
  const double factor = ErrorFactor(c);
  const auto compare = [&](const Matrix& found, const std::vector<double>& value,
                           const std::vector<double>& magnitude) {
    ExpectClose(LightningCase::Rows(found, begin, begin + tokens), value,
                [&](size_t i) { return factor * magnitude[i]; });
  };
  compare(c.out, expected.value.forward.out, expected.size.forward.out);
  compare(c.dq, expected.value.backward.dq, expected.size.backward.dq);
  compare(c.dk, expected.value.backward.dk, expected.size.backward.dk);
  compare(c.dv, expected.value.backward.dv, expected.size.backward.dv);
}

void ExpectDocument(const LightningCase& c, const LightningCase& piece, int64_t begin,
                    const std::vector<double>& state_in, const std::vector<double>& dstate_out) {
  ExpectRows(c, Bounded(piece, state_in, dstate_out), begin, piece.t);
}

void ExpectOneDocument(const LightningCase& c) {
  const Bounded expected(c, c.state_in.values(), c.dstate_out.values());
  ExpectRows(c, expected, 0, c.t);
  const double factor = ErrorFactor(c);
  ExpectClose(c.state_out, expected.value.forward.state_out,
              [&](size_t i) { return factor * expected.size.forward.state_out[i]; });
  ExpectClose(c.dstate_in, expected.value.backward.dstate_in,
              [&](size_t i) { return factor * expected.size.backward.dstate_in[i]; });
}

TEST(LightningSlopes, GoldenValues) {
  // The released model's 32 heads: decay per head as its configuration document lists them.
  const std::vector<float> slopes = LightningSlopes(32);
  ASSERT_EQ(slopes.size(), 32U);
  EXPECT_FLOAT_EQ(slopes[0], 0.8408964152537145F);
  EXPECT_FLOAT_EQ(slopes[1], 0.7071067811865476F);
  EXPECT_FLOAT_EQ(slopes[2], 0.5946035575013605F);
  EXPECT_EQ(slopes[3], 0.5F);
  EXPECT_FLOAT_EQ(slopes[16], 0.052556025953357156F);
  EXPECT_FLOAT_EQ(slopes[30], 0.004645340292979379F);
  EXPECT_EQ(slopes[31], 1.0F / 256);
  // exp rounds once in double and the slope once in float: relative error 2^-24 * slope.
  EXPECT_NEAR(std::exp(-static_cast<double>(slopes[0])), 0.4313237049315922, 0x1p-24);
  EXPECT_NEAR(std::exp(-static_cast<double>(slopes[31])), 0.9961013694701175, 0x1p-24);
}

TEST(LightningSlopes, HeadCountsThatAreNoPowerOfTwo) {
  EXPECT_EQ(LightningSlopes(1), (std::vector<float>{0x1p-8F}));
  // Two heads: 2^-4, 2^-8; then the first of four heads' list, 2^-2.
  EXPECT_EQ(LightningSlopes(3), (std::vector<float>{0x1p-4F, 0x1p-8F, 0x1p-2F}));
  // Four heads: 2^-2, 2^-4, 2^-6, 2^-8; then every second of eight heads': 2^-1, 2^-3.
  EXPECT_EQ(LightningSlopes(6),
            (std::vector<float>{0x1p-2F, 0x1p-4F, 0x1p-6F, 0x1p-8F, 0x1p-1F, 0x1p-3F}));
}

TEST(LightningSlopes, AreThoseOfTheReference) {
  for (int64_t heads = 1; heads <= 100; ++heads) {
    const std::vector<float> slopes = LightningSlopes(heads);
    const std::vector<double> expected = reference::LightningSlopes(heads);
    EXPECT_EQ(std::vector<double>(slopes.begin(), slopes.end()), expected) << heads;
  }
}

TEST(LightningReference, BackwardMatchesComplexStep) {
  const reference::LightningShape shape = {5, 2, 3, 0.6, {0.7, 0.05}};
  std::mt19937 rng(5);
  std::vector<std::vector<double>> x;
  for (int i = 0; i < 4; ++i) x.push_back(Matrix::Random(5, 6, rng).values());
  const auto state = Matrix::Random(2, 9, rng).values();
  const auto dstate = Matrix::Random(2, 9, rng).values();
  std::vector<std::vector<Complex>> z;
  for (const auto& input : x) z.emplace_back(input.begin(), input.end());
  const std::vector<Complex> zstate(state.begin(), state.end());
  using Input = std::vector<Complex>;
  const auto loss = [&](const Input& q, const Input& k, const Input& v, const Input& s) {
    const auto result = reference::LightningForward(shape, q, k, v, s);
    Complex sum = 0;
    for (size_t i = 0; i < result.out.size(); ++i) sum += x[3][i] * result.out[i];
    for (size_t i = 0; i < dstate.size(); ++i) sum += dstate[i] * result.state_out[i];
    return sum;
  };
  const auto grad = reference::LightningBackward(shape, x[0], x[1], x[2], x[3], state, dstate);
  ExpectSameGradient(
      grad.dq, ComplexStep(x[0], [&](const Input& a) { return loss(a, z[1], z[2], zstate); }));
  ExpectSameGradient(
      grad.dk, ComplexStep(x[1], [&](const Input& a) { return loss(z[0], a, z[2], zstate); }));
  ExpectSameGradient(
      grad.dv, ComplexStep(x[2], [&](const Input& a) { return loss(z[0], z[1], a, zstate); }));
  ExpectSameGradient(grad.dstate_in,
                     ComplexStep(state, [&](const Input& a) { return loss(z[0], z[1], z[2], a); }));
}

class LightningLength : public ::testing::TestWithParam<int32_t> {};
INSTANTIATE_TEST_SUITE_P(Edges, LightningLength,
                         ::testing::Values(1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257));

TEST_P(LightningLength, MatchesRecurrence) {
  for (int64_t d : {8, 20, 64}) {
    KernelTest kernel;
    LightningCase c({0, GetParam()}, LightningSlopes(3), d);
    c.Run(kernel.ctx());
    ExpectOneDocument(c);
    for (const Matrix* result : c.Results()) EXPECT_TRUE(result->GapsUntouched());
    EXPECT_EQ(kernel.arena().used_bytes(), 0U);
  }
}

// The head width of the released model, with its fastest and its slowest head.
TEST(Lightning, HeadsOfTheReleasedModelMatchRecurrence) {
#ifdef SALA_SANITIZED  // one length with every kind of chunk: whole, last of one token
  const std::vector<int32_t> lengths = {129};
#else
  const std::vector<int32_t> lengths = {1, 31, 32, 63, 64, 65, 127, 128, 6145};
#endif
  for (const int32_t n : lengths) {
    KernelTest kernel;
    LightningCase c({0, n}, {LightningSlopes(32).front(), LightningSlopes(32).back()}, 128);
    c.Run(kernel.ctx());
    ExpectOneDocument(c);
  }
}

// The lengths around the sparse budget (6144) and switch (8192) of the released model, whose
// linear layers see the same documents.
TEST(Lightning, LongDocumentsMatchRecurrence) {
#ifdef SALA_SANITIZED  // the slow loops of the reference, once, with a last chunk of one token
  const std::vector<int32_t> lengths = {6145};
#else
  const std::vector<int32_t> lengths = {6143, 6144, 6145, 8191, 8192};
#endif
  for (const int32_t n : lengths) {
    KernelTest kernel;
    LightningCase c({0, n}, {LightningSlopes(32).front(), LightningSlopes(32).back()}, 16);
    c.Run(kernel.ctx());
    ExpectOneDocument(c);
  }
}

TEST_P(LightningLength, DecodeFollowsTheRecurrence) {
  KernelTest kernel;
  LightningCase c({0, GetParam()}, LightningSlopes(4), 16);
  const Expected expected = RunReference(c, false, c.state_in.values(), c.dstate_out.values());
  const Expected size = RunReference(c, true, c.state_in.values(), c.dstate_out.values());
  Matrix state = c.state_in;
  for (int64_t t = 0; t < c.t; ++t) {
    const auto row = [&](Matrix& x) { return x.tensor().Rows(t, t + 1); };
    const auto heads = [&](Matrix& x) { return Tensor(row(x).Data<float>(), {c.n, c.d}); };
    LightningDecode(kernel.ctx(), heads(c.q), heads(c.k), heads(c.v), c.slopes, c.scale(),
                    c.State(state), heads(c.out));
  }
  // Three roundings per token on the way through the state, then D products.
  const double factor = (3 * static_cast<double>(c.t) + static_cast<double>(c.d) + 4) * kF32Round;
  ExpectClose(c.out, expected.forward.out, [&](size_t i) { return factor * size.forward.out[i]; });
  ExpectClose(state, expected.forward.state_out,
              [&](size_t i) { return factor * size.forward.state_out[i]; });
}

TEST(Lightning, PackedDocumentsMatchSeparateRecurrences) {
  // Documents that start at a chunk's start (64, 192), end with one (128), one-token documents in
  // numbers, a last chunk of one token (257), an empty document.
  for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 64, 100, 128, 192, 257},
                                         {0, 1, 2, 3, 3, 4, 70, 71, 72, 200, 201},
                                         {0, 63, 64, 65, 129},
                                         {0, 130, 131}}) {
    KernelTest kernel;
    LightningCase c(cu, LightningSlopes(4), 16);
    c.Run(kernel.ctx(), /*with_states=*/false);
    for (size_t s = 0; s + 1 < cu.size(); ++s) {
      if (cu[s] < cu[s + 1]) ExpectDocument(c, c.Piece(cu[s], cu[s + 1]), cu[s], {}, {});
    }
  }
}

TEST(Lightning, StatesReachOnlyTheFirstAndTheLastDocument) {
  KernelTest kernel;
  const std::vector<int32_t> cu = {0, 70, 90, 200};
  LightningCase c(cu, LightningSlopes(4), 16);
  c.Run(kernel.ctx());
  ExpectDocument(c, c.Piece(0, 70), 0, c.state_in.values(), {});
  ExpectDocument(c, c.Piece(70, 90), 70, {}, {});
  ExpectDocument(c, c.Piece(90, 200), 90, {}, c.dstate_out.values());
  // What leaves is the last document's state, what comes back belongs to the first one.
  const auto last = RunReference(c.Piece(90, 200), false, {}, {}).forward.state_out;
  const auto last_size = RunReference(c.Piece(90, 200), true, {}, {}).forward.state_out;
  ExpectClose(c.state_out, last, [&](size_t i) { return ErrorFactor(c) * last_size[i]; });
  const auto in = c.state_in.values();
  const auto first = RunReference(c.Piece(0, 70), false, in, {}).backward.dstate_in;
  const auto first_size = RunReference(c.Piece(0, 70), true, in, {}).backward.dstate_in;
  ExpectClose(c.dstate_in, first, [&](size_t i) { return ErrorFactor(c) * first_size[i]; });
}

TEST(Lightning, NoTokensPassTheStatesThrough) {
  KernelTest kernel;
  LightningCase c({0}, LightningSlopes(2), 8);
  c.Run(kernel.ctx());
  EXPECT_TRUE(c.state_out.SameBits(c.state_in));
  EXPECT_TRUE(c.dstate_in.SameBits(c.dstate_out));
}

TEST(Lightning, SplitWithCarriedStateMatchesOnePass) {
  constexpr int32_t kTokens = 300;
  for (int32_t cut : {1, 63, 64, 65, 150, 299}) {
    KernelTest kernel;
    LightningCase whole({0, kTokens}, LightningSlopes(4), 16);
    whole.Run(kernel.ctx());
    LightningCase left = whole.Piece(0, cut);
    LightningCase right = whole.Piece(cut, kTokens);
    left.state_in = whole.state_in;
    left.dstate_out = whole.dstate_out;
    left.Run(kernel.ctx());  // its gradients wait for the right part
    right.state_in = left.state_out;
    right.dstate_out = whole.dstate_out;
    right.Run(kernel.ctx());
    left.dstate_out = right.dstate_in;
    left.Run(kernel.ctx());

    const Expected size =
        RunReference(whole, true, whole.state_in.values(), whole.dstate_out.values());
    const double factor = 2 * ErrorFactor(whole);  // both sides round
    const auto compare = [&](const Matrix& a, const Matrix& b, const Matrix& all,
                             const std::vector<double>& magnitude) {
      auto found = a.values();
      const auto tail = b.values();
      found.insert(found.end(), tail.begin(), tail.end());
      const auto expected = all.values();
      ASSERT_EQ(found.size(), expected.size());
      for (size_t i = 0; i < found.size(); ++i) {
        ASSERT_NEAR(found[i], expected[i], factor * magnitude[i]) << "cut " << cut << " at " << i;
      }
    };
    compare(left.out, right.out, whole.out, size.forward.out);
    compare(left.dq, right.dq, whole.dq, size.backward.dq);
    compare(left.dk, right.dk, whole.dk, size.backward.dk);
    compare(left.dv, right.dv, whole.dv, size.backward.dv);
    compare(right.state_out, Matrix(0, 1), whole.state_out, size.forward.state_out);
    compare(left.dstate_in, Matrix(0, 1), whole.dstate_in, size.backward.dstate_in);
  }
}

// LightningStates and LightningStateGradient on the tokens of `c`, into the poisoned results.
void RunStates(const Context& ctx, LightningCase& c, const ConstTensor& state_in, bool carried_in,
               const ConstTensor& dstate_out) {
  LightningStates(ctx, c.Heads(c.k), c.Heads(c.v), c.cu_seqlens, c.slopes, state_in,
                  c.State(c.state_out));
  LightningStateGradient(ctx, c.Heads(c.q), c.Heads(c.dout), c.cu_seqlens, c.slopes, c.scale(),
                         carried_in, dstate_out, c.State(c.dstate_in));
}

// On one grid of chunks the states alone are those of the full calls, to the bit: for one document,
// one that ends with the tokens, starts of documents on and off the grid, no tokens.
TEST(Lightning, StatesAloneHaveTheBitsOfTheFullCalls) {
  for (const auto& cu : {std::vector<int32_t>{0, 257},
                         {0, 0, 70, 90, 200},
                         {0, 64, 128},
                         {0, 128, 129},
                         {0, 1},
                         {0, 63},
                         {0, 200, 200},
                         {0},
                         {0, 0}}) {
    SCOPED_TRACE("packing of " + std::to_string(cu.back()));
    KernelTest kernel(2);
    LightningCase full(cu, LightningSlopes(3), 16);
    full.Run(kernel.ctx());
    LightningCase alone(cu, LightningSlopes(3), 16);
    RunStates(kernel.ctx(), alone, alone.State(alone.state_in), /*carried_in=*/true,
              alone.State(alone.dstate_out));
    EXPECT_TRUE(alone.state_out.SameBits(full.state_out));
    EXPECT_TRUE(alone.dstate_in.SameBits(full.dstate_in));
    EXPECT_EQ(kernel.arena().used_bytes(), 0U);
    // In place, as the full calls allow it.
    alone.state_out = alone.state_in;
    alone.dstate_in = alone.dstate_out;
    RunStates(kernel.ctx(), alone, alone.State(alone.state_out), true,
              alone.State(alone.dstate_in));
    EXPECT_TRUE(alone.state_out.SameBits(full.state_out));
    EXPECT_TRUE(alone.dstate_in.SameBits(full.dstate_in));
  }
}

// Nothing enters: an empty state and one of zeros are the same, and a document that begins at token
// 0 gives no gradient back.
TEST(Lightning, StatesOfADocumentThatBeginsWithTheTokens) {
  KernelTest kernel;
  LightningCase zero({0, 100}, LightningSlopes(3), 16);
  zero.state_in = Matrix::Filled(zero.n, zero.d * zero.d, 0.0F);
  zero.Run(kernel.ctx());
  LightningCase alone({0, 100}, LightningSlopes(3), 16);
  RunStates(kernel.ctx(), alone, {}, /*carried_in=*/false, alone.State(alone.dstate_out));
  EXPECT_TRUE(alone.state_out.SameBits(zero.state_out));
  for (const double x : alone.dstate_in.values()) ASSERT_EQ(x, 0.0);
  // Gradients of what enters do not depend on what entered.
  LightningCase other({0, 100}, LightningSlopes(3), 16);
  other.Run(kernel.ctx());
  EXPECT_TRUE(other.dstate_in.SameBits(zero.dstate_in));
}

// Ranges of packed tokens, as many ranks hold them: first the states from left to right and their
// gradients from right to left, then every range by itself.
TEST(Lightning, RangesMatchOneCall) {
  std::mt19937 rng(7);
  const auto below = [&rng](int32_t n) {
    return static_cast<int32_t>(rng() % static_cast<uint32_t>(n));
  };
  for (unsigned trial = 0; trial < 30; ++trial) {
    const int32_t tokens = 150 + below(200);
    std::vector<int32_t> cu = {0};
    while (cu.back() < tokens) {
      cu.push_back(std::min(tokens, cu.back() + 1 + below(trial % 3 == 0 ? 400 : 90)));
    }
    std::vector<int32_t> borders = {0, tokens};
    for (int32_t i = below(5); i > 0; --i) borders.push_back(below(tokens + 1));
    // Some borders are starts of documents, some ranges are short or empty.
    if (trial % 4 == 0) borders.push_back(cu[cu.size() / 2]);
    if (trial % 5 == 0) borders.push_back(std::min(tokens, borders.back() + below(3)));
    std::sort(borders.begin(), borders.end());
    std::string text = "borders";
    for (const int32_t b : borders) text += " " + std::to_string(b);
    text += ", documents";
    for (const int32_t b : cu) text += " " + std::to_string(b);
    SCOPED_TRACE(text);

    KernelTest kernel(2);
    LightningCase whole(cu, LightningSlopes(3), 16, trial);
    whole.Run(kernel.ctx());

    std::vector<LightningCase> parts;
    std::vector<bool> carried;
    for (size_t r = 0; r + 1 < borders.size(); ++r) {
      LightningCase part = whole.Piece(borders[r], borders[r + 1]);
      part.cu_seqlens = {0};
      for (const int32_t b : cu) {
        if (borders[r] < b && b < borders[r + 1]) part.cu_seqlens.push_back(b - borders[r]);
      }
      part.cu_seqlens.push_back(borders[r + 1] - borders[r]);
      // Whether the document before goes on: at both ends with what enters or leaves the whole,
      // elsewhere where no document starts just here.
      carried.push_back(borders[r] == 0 || borders[r] == tokens ||
                        !std::binary_search(cu.begin(), cu.end(), borders[r]));
      parts.push_back(part);
    }
    Matrix state = whole.state_in;
    for (size_t r = 0; r < parts.size(); ++r) {
      if (!carried[r]) state = Matrix::Filled(whole.n, whole.d * whole.d, 0.0F);
      parts[r].state_in = state;
      LightningStates(kernel.ctx(), parts[r].Heads(parts[r].k), parts[r].Heads(parts[r].v),
                      parts[r].cu_seqlens, parts[r].slopes, parts[r].State(parts[r].state_in),
                      parts[r].State(parts[r].state_out));
      state = parts[r].state_out;
    }
    Matrix gradient = whole.dstate_out;
    for (size_t r = parts.size(); r-- > 0;) {
      parts[r].dstate_out = gradient;
      LightningStateGradient(kernel.ctx(), parts[r].Heads(parts[r].q),
                             parts[r].Heads(parts[r].dout), parts[r].cu_seqlens, parts[r].slopes,
                             parts[r].scale(), carried[r], parts[r].State(parts[r].dstate_out),
                             parts[r].State(parts[r].dstate_in));
      gradient = parts[r].dstate_in;
      if (!carried[r]) gradient = Matrix::Filled(whole.n, whole.d * whole.d, 0.0F);
    }
    LightningCase joined = whole;
    joined.Poison();
    joined.state_out = parts.back().state_out;
    joined.dstate_in = parts.front().dstate_in;
    for (size_t r = 0; r < parts.size(); ++r) {
      LightningCase& part = parts[r];
      const Matrix states = part.state_out;
      const Matrix gradients = part.dstate_in;
      const Tensor none;
      LightningForward(kernel.ctx(), part.Heads(part.q), part.Heads(part.k), part.Heads(part.v),
                       part.cu_seqlens, part.slopes, part.scale(),
                       carried[r] ? part.State(part.state_in) : none, part.Heads(part.out),
                       part.State(part.state_out));
      LightningBackward(kernel.ctx(), part.Heads(part.q), part.Heads(part.k), part.Heads(part.v),
                        part.Heads(part.dout), part.cu_seqlens, part.slopes, part.scale(),
                        carried[r] ? part.State(part.state_in) : none, part.State(part.dstate_out),
                        part.Heads(part.dq), part.Heads(part.dk), part.Heads(part.dv),
                        carried[r] ? part.State(part.dstate_in) : none);
      EXPECT_TRUE(part.state_out.SameBits(states)) << "range " << r;
      EXPECT_TRUE(part.dstate_in.SameBits(gradients)) << "range " << r;
      for (const auto& [from, to] : {std::pair{&part.out, &joined.out},
                                     {&part.dq, &joined.dq},
                                     {&part.dk, &joined.dk},
                                     {&part.dv, &joined.dv}}) {
        for (int64_t t = 0; t < from->rows(); ++t) {
          for (int64_t i = 0; i < from->columns(); ++i) {
            to->at(borders[r] + t, i) = from->at(t, i);
          }
        }
      }
    }
    joined.more_chunks = static_cast<int64_t>(parts.size());  // the last one of each range
    for (size_t s = 0; s + 1 < cu.size(); ++s) {
      const bool first = s == 0;
      const bool last = s + 2 == cu.size();
      const LightningCase piece = whole.Piece(cu[s], cu[s + 1]);
      ExpectDocument(joined, piece, cu[s], first ? whole.state_in.values() : std::vector<double>(),
                     last ? whole.dstate_out.values() : std::vector<double>());
    }
    const Bounded last(whole.Piece(cu[cu.size() - 2], tokens),
                       cu.size() == 2 ? whole.state_in.values() : std::vector<double>(), {});
    ExpectClose(joined.state_out, last.value.forward.state_out,
                [&](size_t i) { return ErrorFactor(joined) * last.size.forward.state_out[i]; });
    const Bounded first(whole.Piece(0, cu[1]), whole.state_in.values(),
                        cu.size() == 2 ? whole.dstate_out.values() : std::vector<double>());
    ExpectClose(joined.dstate_in, first.value.backward.dstate_in,
                [&](size_t i) { return ErrorFactor(joined) * first.size.backward.dstate_in[i]; });
    if (HasFailure()) return;
  }
}

TEST(Lightning, ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens) {
  KernelTest kernel;
  const std::vector<int32_t> cu = {0, 90, 150, 151, 260};
  LightningCase before(cu, LightningSlopes(4), 16);
  before.Run(kernel.ctx());
  LightningCase after(cu, LightningSlopes(4), 16);
  constexpr int64_t kChanged = 120;
  for (Matrix* x : {&after.q, &after.k, &after.v, &after.dout}) x->at(kChanged, 3) += 1.0F;
  after.Run(kernel.ctx());
  for (const auto& [begin, end] : {std::pair{0, 90}, {150, 151}, {151, 260}}) {
    for (size_t i = 0; i < before.Results().size(); ++i) {
      EXPECT_TRUE(LightningCase::Rows(*before.Results()[i], begin, end)
                      .SameBits(LightningCase::Rows(*after.Results()[i], begin, end)))
          << "result " << i << " of the document at " << begin;
    }
  }
  EXPECT_TRUE(before.state_out.SameBits(after.state_out));
  EXPECT_TRUE(before.dstate_in.SameBits(after.dstate_in));
  EXPECT_TRUE(LightningCase::Rows(before.out, 90, kChanged)
                  .SameBits(LightningCase::Rows(after.out, 90, kChanged)));
  EXPECT_FALSE(LightningCase::Rows(before.out, kChanged, 150)
                   .SameBits(LightningCase::Rows(after.out, kChanged, 150)));
}

TEST(Lightning, BitsDoNotDependOnThreadsOrRuns) {
  const std::vector<int32_t> cu = {0, 90, 91, 300};
  LightningCase one(cu, LightningSlopes(6), 16);
  KernelTest single(1);
  one.Run(single.ctx());
  for (int threads : {1, 2, 5}) {
    KernelTest many(threads);
    LightningCase again(cu, LightningSlopes(6), 16);
    again.Run(many.ctx());
    for (size_t i = 0; i < one.Results().size(); ++i) {
      EXPECT_TRUE(one.Results()[i]->SameBits(*again.Results()[i])) << "result " << i;
    }
    EXPECT_TRUE(one.state_out.SameBits(again.state_out));
    EXPECT_TRUE(one.dstate_in.SameBits(again.dstate_in));
  }
}

TEST(Lightning, TokensPastTheDocumentsAreNeitherReadNorWritten) {
  KernelTest kernel;
  LightningCase longer({0, 100}, LightningSlopes(4), 16);
  LightningCase c = longer.Piece(0, 70);
  c.state_in = longer.state_in;
  c.dstate_out = longer.dstate_out;
  c.Run(kernel.ctx());
  for (Matrix* x : {&longer.q, &longer.k, &longer.v, &longer.dout}) {
    for (int64_t t = 70; t < 100; ++t) {
      for (int64_t i = 0; i < x->columns(); ++i) {
        x->at(t, i) = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
  longer.cu_seqlens = {0, 70};
  longer.Run(kernel.ctx());
  for (size_t i = 0; i < c.Results().size(); ++i) {
    EXPECT_TRUE(LightningCase::Rows(*longer.Results()[i], 0, 70).SameBits(*c.Results()[i]));
    for (double x : LightningCase::Rows(*longer.Results()[i], 70, 100).values()) {
      ASSERT_TRUE(std::isnan(x));
    }
  }
}

TEST(Lightning, NoDecayIsUnnormalisedCausalAttention) {
  KernelTest kernel;
  LightningCase c({0, 200}, {0.0F}, 8);
  c.Run(kernel.ctx(), /*with_states=*/false);
  const double factor = ErrorFactor(c);
  for (int64_t t = 0; t < c.t; ++t) {
    for (int64_t b = 0; b < c.d; ++b) {
      double sum = 0;
      double size = 0;
      for (int64_t j = 0; j <= t; ++j) {
        double dot = 0;
        double dot_size = 0;
        for (int64_t a = 0; a < c.d; ++a) {
          const double product = static_cast<double>(c.q.at(t, a)) * c.k.at(j, a);
          dot += product;
          dot_size += std::abs(product);
        }
        sum += c.scale() * dot * c.v.at(j, b);
        size += c.scale() * dot_size * std::abs(c.v.at(j, b));
      }
      ASSERT_NEAR(c.out.at(t, b), sum, factor * size);
    }
  }
}

TEST(Lightning, TotalDecayLeavesOnlyTheOwnToken) {
  KernelTest kernel;
  LightningCase c({0, 130}, {200.0F}, 8);  // lambda = e^-200 counts as 0
  c.Run(kernel.ctx());
  for (int64_t t = 0; t < c.t; ++t) {
    double dot = 0;
    double dot_size = 0;
    for (int64_t a = 0; a < c.d; ++a) {
      const double product = static_cast<double>(c.q.at(t, a)) * c.k.at(t, a);
      dot += product;
      dot_size += std::abs(product);
    }
    for (int64_t b = 0; b < c.d; ++b) {
      const double limit = (static_cast<double>(c.d) + 4) * kF32Round * c.scale() * dot_size *
                           std::abs(c.v.at(t, b));
      ASSERT_NEAR(c.out.at(t, b), c.scale() * dot * c.v.at(t, b), limit);
    }
  }
}

}  // namespace
}  // namespace sala::kernels
