#include "kernels/output_gate/output_gate.h"
#include "kernels/output_gate/reference.h"
#include "tests/kernels/common/cuda_bounds.h"
#include "tests/kernels/common/rank_replay.h"

namespace sala::kernels {
namespace {

using OutputGateCuda = CudaKernelTest;

constexpr float kEps = 1e-5F;

// A sum over a row passes at most 32 values in a thread, 5 steps of a butterfly and 16 warps.
constexpr double kRowSum = 32 + 5 + 16;
// rstd: half of that, mean, eps, root and quotient.
constexpr double kRstd = kRowSum / 2 + 4;

struct Case {
  int64_t tokens, width;
  bool norm, gate;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const auto& [norm, gate] : {std::pair{true, true}, {true, false}, {false, true}}) {
    for (int64_t tokens : EdgeSizes()) {
      if (kSlowBuild && tokens > 1 && tokens != 33) continue;
      for (int64_t width : {8, 72, 520}) {
        if (!kSlowBuild || width == 72 || tokens == 1) cases.push_back({tokens, width, norm, gate});
      }
    }
    cases.push_back({2, 8200, norm, gate});
    if (kSlowBuild) continue;
    cases.push_back({33, 4104, norm, gate});  // more packs than a grid has threads
    cases.push_back({2, 16384, norm, gate});
  }
  return cases;
}

struct Inputs {
  Inputs(const Case& c, std::mt19937& rng)
      : o(RandomBf16(c.tokens, c.width, rng, 2.0F)),
        z(RandomBf16(c.tokens, c.width, rng, 3.0F)),
        weight(RandomBf16(1, c.width, rng)),
        dy(RandomBf16(c.tokens, c.width, rng)),
        old_dweight(Matrix::Random(1, c.width, rng)) {
    // Rows so small that epsilon counts.
    for (int64_t t = 1; t < c.tokens; t += 3) {
      for (int64_t i = 0; i < c.width; ++i) o.at(t, i) *= 0x1p-9F;
    }
  }
  // The rows without a small factor times `factor`; of every second one the first half only.
  void Enlarge(float factor) {
    for (int64_t t = 0; t < o.rows(); ++t) {
      const int64_t columns = t % 2 == 0 ? o.columns() : o.columns() / 2;
      for (int64_t i = 0; t % 3 != 1 && i < columns; ++i) o.at(t, i) *= factor;
    }
  }
  Matrix o, z, weight, dy, old_dweight;
};

// Factors of o whose squares leave float32. Of 520 columns on four ranks: in the sum of the ranks
// only (each has 2^127), in the sums of some, in every square, and near the largest number.
constexpr float kLargeFactors[] = {0x1p59F, 0x1p60F, 0x1p67F, 0x1p120F};

struct Outputs {
  Outputs(int64_t tokens, int64_t width)
      : y(tokens, width), rstd(1, tokens), dout(y), dz(y), dweight(1, width) {}
  Matrix y, rstd, dout, dz, dweight;
};

// Both passes over all columns.
Outputs Compute(const Context& ctx, const Case& c, const Inputs& in) {
  const DeviceMatrix dev_o(DType::kBF16, in.o, 8), dev_z(DType::kBF16, in.z, 24),
      dev_w(DType::kBF16, in.weight), dev_dy(DType::kBF16, in.dy, 8);
  const DeviceMatrix y(DType::kBF16, c.tokens, c.width, 16), rstd(DType::kF32, 1, c.tokens),
      dout(DType::kBF16, c.tokens, c.width, 8), dz(DType::kBF16, c.tokens, c.width, 16),
      dweight(DType::kF32, in.old_dweight);
  const ConstTensor w = c.norm ? ConstTensor(dev_w.vector()) : ConstTensor();
  const ConstTensor z = c.gate ? ConstTensor(dev_z.tensor()) : ConstTensor();
  OutputGateForward(ctx, dev_o.tensor(), w, z, kEps, y.tensor(), rstd.vector());
  OutputGateBackward(ctx, dev_dy.tensor(), dev_o.tensor(), w, z, rstd.vector(), dout.tensor(),
                     c.gate ? dz.tensor() : sala::Tensor(),
                     c.norm ? dweight.vector() : sala::Tensor());
  EXPECT_TRUE(y.GapsUntouched() && dout.GapsUntouched() && dz.GapsUntouched());
  if (c.norm) {
    const DeviceMatrix frozen(DType::kBF16, c.tokens, c.width, 8);
    OutputGateBackward(ctx, dev_dy.tensor(), dev_o.tensor(), w, z, rstd.vector(), frozen.tensor(),
                       c.gate ? dz.tensor() : sala::Tensor(), {});
    EXPECT_EQ(frozen.Bytes(), dout.Bytes());
  }
  Outputs out(c.tokens, c.width);
  out.y = y.Download();
  out.rstd = rstd.Download();
  out.dout = dout.Download();
  out.dz = dz.Download();
  out.dweight = dweight.Download();
  return out;
}

// `ranks`: that have added their sums over a row in float32.
void ExpectRight(const Case& c, const Inputs& in, const Outputs& out, int64_t ranks) {
  const int64_t tokens = c.tokens;
  const int64_t width = c.width;
  const auto od = in.o.values();
  const auto zd = in.z.values();
  const auto wd = in.weight.values();
  const auto dyd = in.dy.values();
  const double* wp = c.norm ? wd.data() : nullptr;
  const double* zp = c.gate ? zd.data() : nullptr;
  const double row_sum = kRowSum + static_cast<double>(ranks - 1);
  const double rstd = kRstd + static_cast<double>(ranks - 1) / 2;
  std::vector<double> expected(od.size()), expected_dout(od.size()), expected_dz(od.size());
  std::vector<double> expected_dw = in.old_dweight.values();
  reference::OutputGateForward(tokens, width, od.data(), wp, zp, kEps, expected.data());
  reference::OutputGateBackward(tokens, width, dyd.data(), od.data(), wp, zp, kEps,
                                expected_dout.data(), expected_dz.data(),
                                c.norm ? expected_dw.data() : nullptr);
  ExpectClose(out.y, expected, RoundedOnce(expected));

  if (c.norm) {
    std::vector<double> expected_rstd;
    for (int64_t t = 0; t < tokens; ++t) {
      double square = 0;
      for (int64_t i = 0; i < width; ++i) {
        square += od[static_cast<size_t>(t * width + i)] * od[static_cast<size_t>(t * width + i)];
      }
      expected_rstd.push_back(1 / std::sqrt(square / static_cast<double>(width) + kEps));
    }
    ExpectClose(out.rstd, expected_rstd,
                [&](size_t t) { return rstd * kF32Round * expected_rstd[t]; });
  }

  // The sums of the terms' absolute values.
  std::vector<double> dout_size(od.size()), dz_size(od.size());
  std::vector<double> dw_size = Absolute(in.old_dweight.values());
  for (int64_t t = 0; t < tokens; ++t) {
    const double r = c.norm ? out.rstd.at(0, t) : 1.0;
    double mean = 0;
    const auto dn = [&](int64_t i) {
      const auto at = static_cast<size_t>(t * width + i);
      return std::abs(dyd[at] * (c.gate ? reference::Sigmoid(zd[at]) : 1.0));
    };
    const auto weight_at = [&](int64_t i) {
      return c.norm ? std::abs(wd[static_cast<size_t>(i)]) : 1.0;
    };
    for (int64_t i = 0; i < width; ++i) {
      mean += dn(i) * weight_at(i) * std::abs(od[static_cast<size_t>(t * width + i)]) / width;
    }
    for (int64_t i = 0; i < width; ++i) {
      const auto at = static_cast<size_t>(t * width + i);
      dout_size[at] =
          r * weight_at(i) * dn(i) + (c.norm ? r * r * r * mean : 0.0) * std::abs(od[at]);
      // 1 - s loses digits where s is near 1: relative to s itself.
      dz_size[at] = r * weight_at(i) * dn(i) * std::abs(od[at]);
      dw_size[static_cast<size_t>(i)] += dn(i) * std::abs(od[at]) * r;
    }
  }
  // As in RMSNorm, with the sigmoid's error (2^-16, 256 roundings of float32, cuda_math.h) where
  // there is a gate; in the sum over the row all terms may have it.
  const double sigmoid = c.gate ? 256 : 0;
  ExpectClose(out.dout, expected_dout,
              RoundedOnce(expected_dout, dout_size, 2 * sigmoid + row_sum + 3 * rstd + 10));
  if (c.gate) {
    ExpectClose(out.dz, expected_dz, RoundedOnce(expected_dz, dz_size, 2 * sigmoid + rstd + 6));
  } else {
    EXPECT_TRUE(std::isnan(tokens > 0 ? out.dz.at(0, 0) : NAN));
  }
  if (c.norm) {
    ExpectClose(out.dweight, expected_dw, [&](size_t i) {
      return (sigmoid + rstd + 3 + static_cast<double>(tokens) + 33) * kF32Round * dw_size[i];
    });
  } else {
    EXPECT_TRUE(out.dweight.SameBits(in.old_dweight));
  }
}

TEST_F(OutputGateCuda, AgreesWithReference) {
  std::mt19937 rng(31);
  for (const Case& c : Cases()) {
    const Inputs in(c, rng);
    ExpectRight(c, in, Compute(ctx(), c, in), 1);
  }
}

TEST_F(OutputGateCuda, LargeInputsAgreeWithReference) {
  std::mt19937 rng(34);
  for (const bool gate : {true, false}) {
    for (const int64_t width : {520, 8200}) {  // two packs a thread, and four
      if (kSlowBuild && width != 520) continue;
      for (const float factor : kLargeFactors) {
        const Case c = {6, width, true, gate};
        Inputs in(c, rng);
        in.Enlarge(factor);
        ExpectRight(c, in, Compute(ctx(), c, in), 1);
      }
    }
  }
}

// ---- cut over ranks ----

Matrix ColumnsOf(const Matrix& from, int64_t begin, int64_t end) {
  Matrix m(from.rows(), end - begin);
  for (int64_t r = 0; r < from.rows(); ++r) {
    for (int64_t i = begin; i < end; ++i) m.at(r, i - begin) = from.at(r, i);
  }
  return m;
}

void PutColumns(const Matrix& part, int64_t begin, Matrix& whole) {
  for (int64_t r = 0; r < part.rows(); ++r) {
    for (int64_t i = 0; i < part.columns(); ++i) whole.at(r, begin + i) = part.at(r, i);
  }
}

// As Compute, the columns on ranks that have unequal parts of them.
Outputs ComputeOnRanks(const Context& ctx, const Case& c, const Inputs& in, int64_t ranks) {
  Outputs out(c.tokens, c.width);
  std::vector<Matrix> rstds(static_cast<size_t>(ranks), Matrix(1, 1));
  RankReplay replay(ranks);
  // The backward pass gets the rstd of the forward pass, which needs what was exchanged there.
  replay.Run(3, [&](const RankExchange& exchange) {
    const int64_t begin = c.width / 8 * exchange.rank / ranks * 8;
    const int64_t end = c.width / 8 * (exchange.rank + 1) / ranks * 8;
    const int64_t columns = end - begin;
    const DeviceMatrix o(DType::kBF16, ColumnsOf(in.o, begin, end), 8),
        dev_z(DType::kBF16, ColumnsOf(in.z, begin, end), 24),
        dev_w(DType::kBF16, ColumnsOf(in.weight, begin, end)),
        dy(DType::kBF16, ColumnsOf(in.dy, begin, end), 8);
    const DeviceMatrix y(DType::kBF16, c.tokens, columns, 16), rstd(DType::kF32, 1, c.tokens),
        dout(DType::kBF16, c.tokens, columns, 8), dz(DType::kBF16, c.tokens, columns, 16),
        dweight(DType::kF32, ColumnsOf(in.old_dweight, begin, end));
    const ConstTensor w = c.norm ? ConstTensor(dev_w.vector()) : ConstTensor();
    const ConstTensor z = c.gate ? ConstTensor(dev_z.tensor()) : ConstTensor();
    const WidthShard shard = {c.width, &exchange};
    OutputGateForward(ctx, o.tensor(), w, z, kEps, y.tensor(), rstd.vector(), shard);
    OutputGateBackward(ctx, dy.tensor(), o.tensor(), w, z, rstd.vector(), dout.tensor(),
                       c.gate ? dz.tensor() : sala::Tensor(),
                       c.norm ? dweight.vector() : sala::Tensor(), shard);
    EXPECT_TRUE(y.GapsUntouched() && dout.GapsUntouched() && dz.GapsUntouched());
    PutColumns(y.Download(), begin, out.y);
    PutColumns(dout.Download(), begin, out.dout);
    PutColumns(dz.Download(), begin, out.dz);
    PutColumns(dweight.Download(), begin, out.dweight);
    rstds[static_cast<size_t>(exchange.rank)] = rstd.Download();
  });
  out.rstd = rstds[0];
  if (c.norm) {
    for (const Matrix& rstd : rstds) EXPECT_TRUE(rstd.SameBits(rstds[0]));
  }
  const std::vector<int64_t> one_float_a_token = {c.tokens, c.tokens};
  EXPECT_EQ(replay.sizes(), c.norm && c.tokens > 0 ? one_float_a_token : std::vector<int64_t>());
  return out;
}

TEST_F(OutputGateCuda, RanksWithPartsOfTheWidth) {
  std::mt19937 rng(32);
  for (const auto& [norm, gate] : {std::pair{true, true}, {true, false}, {false, true}}) {
    for (const int64_t ranks : {1, 2, 3, 4}) {
      for (const int64_t tokens : {0, 1, 33}) {
        if (kSlowBuild && (tokens == 33 || ranks == 3)) continue;
        const Case c = {tokens, 72, norm, gate};
        const Inputs in(c, rng);
        ExpectRight(c, in, ComputeOnRanks(ctx(), c, in, ranks), ranks);
      }
    }
    if (kSlowBuild) continue;
    const Case wide = {3, 16400, norm, gate};  // more columns than one GPU takes, 8200 and 4 packs
    const Inputs in(wide, rng);
    ExpectRight(wide, in, ComputeOnRanks(ctx(), wide, in, 2), 2);
  }
}

TEST_F(OutputGateCuda, LargeInputsOnRanks) {
  std::mt19937 rng(35);
  for (const float factor : kLargeFactors) {
    const Case c = {6, 520, true, true};
    Inputs in(c, rng);
    in.Enlarge(factor);
    ExpectRight(c, in, ComputeOnRanks(ctx(), c, in, 4), 4);
  }
}

TEST_F(OutputGateCuda, OneRankHasTheBitsOfNone) {
  std::mt19937 rng(33);
  const Case c = {9, 520, true, true};
  for (const float factor : {1.0F, 0x1p67F}) {
    Inputs in(c, rng);
    in.Enlarge(factor);
    const Outputs none = Compute(ctx(), c, in), one = ComputeOnRanks(ctx(), c, in, 1);
    EXPECT_TRUE(one.y.SameBits(none.y));
    EXPECT_TRUE(one.rstd.SameBits(none.rstd));
    EXPECT_TRUE(one.dout.SameBits(none.dout));
    EXPECT_TRUE(one.dz.SameBits(none.dz));
    EXPECT_TRUE(one.dweight.SameBits(none.dweight));
  }
}

// Gates far from zero: sigmoid must end at 0 and 1, not at NaN.
TEST_F(OutputGateCuda, SaturatesWithoutOverflow) {
  Matrix o = Matrix::Filled(1, 8, 2.0F), z(1, 8), dy = Matrix::Filled(1, 8, 1.0F);
  const std::vector<float> gates = {-3e38F, -1000.0F, -100.0F, -80.0F,
                                    80.0F,  100.0F,   1000.0F, 3e38F};
  for (int64_t i = 0; i < 8; ++i) z.at(0, i) = gates[static_cast<size_t>(i)];
  const DeviceMatrix dev_o(DType::kBF16, o), dev_z(DType::kBF16, z), dev_dy(DType::kBF16, dy);
  const DeviceMatrix y(DType::kBF16, 1, 8), dout(DType::kBF16, 1, 8), dz(DType::kBF16, 1, 8);
  OutputGateForward(ctx(), dev_o.tensor(), {}, dev_z.tensor(), kEps, y.tensor(), {});
  OutputGateBackward(ctx(), dev_dy.tensor(), dev_o.tensor(), {}, dev_z.tensor(), {}, dout.tensor(),
                     dz.tensor(), {});
  const Matrix found = y.Download(), found_do = dout.Download(), found_dz = dz.Download();
  for (int64_t i = 0; i < 8; ++i) {
    const double limit = i < 4 ? 0.0 : 1.0;
    EXPECT_NEAR(found.at(0, i), 2.0 * limit, 1e-30);
    EXPECT_NEAR(found_do.at(0, i), limit, 1e-30);
    EXPECT_NEAR(found_dz.at(0, i), 0.0, 1e-30);
  }
}

}  // namespace
}  // namespace sala::kernels
