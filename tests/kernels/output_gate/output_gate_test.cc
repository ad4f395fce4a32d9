#include "kernels/output_gate/output_gate.h"

#include "kernels/output_gate/reference.h"
#include "tests/kernels/common/kernel_test.h"
#include "tests/kernels/common/rank_threads.h"

namespace sala::kernels {
namespace {

constexpr float kEps = 1e-6F;
constexpr double kEpsDouble = kEps;

struct Parts {
  bool norm;
  bool gate;
};
constexpr Parts kParts[] = {{true, true}, {true, false}, {false, true}};

class OutputGate : public testing::TestWithParam<Parts> {
 protected:
  std::mt19937 rng_{21};
};

TEST_P(OutputGate, AgreesWithReference) {
  const auto [norm, gate] = GetParam();
  for (int64_t tokens : EdgeSizes()) {
    const int64_t width = 45;
    Matrix o = Matrix::Random(tokens, width, rng_, 1);
    Matrix z = Matrix::Random(tokens, width, rng_, 2, 2.0F);
    Matrix dy = Matrix::Random(tokens, width, rng_, 3);
    Matrix weight = Matrix::Random(1, width, rng_);
    Matrix y(tokens, width, 1), rstd(1, tokens), dout(tokens, width, 2), dz(tokens, width, 3);
    Matrix dweight = Matrix::Random(1, width, rng_);
    const auto od = o.values();
    const auto zd = z.values();
    const auto dyd = dy.values();
    const auto wd = weight.values();
    const double* w_or_null = norm ? wd.data() : nullptr;
    const double* z_or_null = gate ? zd.data() : nullptr;
    std::vector<double> y_expected(od.size()), dout_expected(od.size()), dz_expected(od.size());
    auto dw_expected = dweight.values();
    double dw_size = 1;
    reference::OutputGateForward(tokens, width, od.data(), w_or_null, z_or_null, kEpsDouble,
                                 y_expected.data());
    reference::OutputGateBackward(tokens, width, dyd.data(), od.data(), w_or_null, z_or_null,
                                  kEpsDouble, dout_expected.data(), dz_expected.data(),
                                  dw_expected.data());
    KernelTest test;
    const sala::Tensor w = norm ? weight.vector() : sala::Tensor();
    const sala::Tensor gate_tensor = gate ? z.tensor() : sala::Tensor();
    OutputGateForward(test.ctx(), o.tensor(), w, gate_tensor, kEps, y.tensor(), rstd.vector());
    OutputGateBackward(test.ctx(), dy.tensor(), o.tensor(), w, gate_tensor, rstd.vector(),
                       dout.tensor(), gate ? dz.tensor() : sala::Tensor(),
                       norm ? dweight.vector() : sala::Tensor());
    // rstd, two products, sigmoid (6 roundings, vector_math_test.cc), product.
    ExpectClose(y, y_expected,
                [&](size_t i) { return 10.1 * kF32Round * std::abs(y_expected[i]); });
    // One row's largest terms stand for the sum of the terms of each element: first and second term
    // of the norm's backward.
    std::vector<double> size(od.size());
    for (int64_t t = 0; t < tokens; ++t) {
      const auto row = static_cast<size_t>(t * width);
      double mean = 0;
      const double r = norm ? rstd.at(0, t) : 1;
      for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
        mean += std::abs(dyd[row + i] * wd[i] * od[row + i]) / static_cast<double>(width);
      }
      for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
        size[row + i] =
            norm ? std::abs(r * wd[i] * dyd[row + i]) + r * r * r * mean * std::abs(od[row + i])
                 : std::abs(dyd[row + i]);
        dw_size = std::max(dw_size, std::abs(dyd[row + i] * od[row + i] * r));
      }
    }
    // The norm's backward (10 roundings, rms_norm_test.cc) after sigmoid and a product.
    ExpectClose(dout, dout_expected, [&](size_t i) { return 17 * kF32Round * size[i]; });
    if (gate) {
      // 1 - s may cancel for s near 1: its error is that of s itself, so relative to |dy n| s.
      ExpectClose(dz, dz_expected, [&](size_t i) {
        const double n = reference::Sigmoid(zd[i]) == 0 ? 0 : y_expected[i];
        return 20 * kF32Round * std::abs(dyd[i] * n);
      });
    }
    if (norm) {
      // Sigmoid and 4 products a term, then an addition for each token and piece.
      const int64_t pieces = tokens / 32;
      ExpectClose(dweight, dw_expected, [&](size_t) {
        return static_cast<double>(12 + tokens + pieces) * kF32Round *
               static_cast<double>(tokens + 4) * dw_size;
      });
    }
    EXPECT_TRUE(y.GapsUntouched() && dout.GapsUntouched() && dz.GapsUntouched());
  }
}

TEST_P(OutputGate, ReferenceBackwardEqualsComplexStep) {
  const auto [norm, gate] = GetParam();
  constexpr int64_t kT = 2;
  constexpr int64_t kW = 5;
  using C = std::complex<double>;
  const auto o = Matrix::Random(kT, kW, rng_).values();
  const auto z = Matrix::Random(kT, kW, rng_).values();
  const auto w = Matrix::Random(1, kW, rng_).values();
  const auto dy = Matrix::Random(kT, kW, rng_).values();
  const auto loss = [&, norm = norm, gate = gate](const std::vector<C>& oc,
                                                  const std::vector<C>& wc,
                                                  const std::vector<C>& zc) {
    std::vector<C> y(oc.size());
    reference::OutputGateForward<C>(kT, kW, oc.data(), norm ? wc.data() : nullptr,
                                    gate ? zc.data() : nullptr, kEpsDouble, y.data());
    C sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
    return sum;
  };
  const std::vector<C> oc(o.begin(), o.end());
  const std::vector<C> zc(z.begin(), z.end());
  const std::vector<C> wc(w.begin(), w.end());
  std::vector<double> dout(o.size()), dz(z.size()), dw(w.size());
  reference::OutputGateBackward(kT, kW, dy.data(), o.data(), norm ? w.data() : nullptr,
                                gate ? z.data() : nullptr, kEpsDouble, dout.data(), dz.data(),
                                norm ? dw.data() : nullptr);
  ExpectSameGradient(dout, ComplexStep(o, [&](const auto& x) { return loss(x, wc, zc); }));
  if (gate) ExpectSameGradient(dz, ComplexStep(z, [&](const auto& x) { return loss(oc, wc, x); }));
  if (norm) ExpectSameGradient(dw, ComplexStep(w, [&](const auto& x) { return loss(oc, x, zc); }));
}

Matrix ColumnsOf(const Matrix& from, int64_t begin, int64_t end, int64_t gap) {
  Matrix m(from.rows(), end - begin, gap);
  for (int64_t r = 0; r < from.rows(); ++r) {
    for (int64_t c = begin; c < end; ++c) m.at(r, c - begin) = from.at(r, c);
  }
  return m;
}

void PutColumns(const Matrix& part, int64_t begin, Matrix& whole) {
  for (int64_t r = 0; r < part.rows(); ++r) {
    for (int64_t c = 0; c < part.columns(); ++c) whole.at(r, begin + c) = part.at(r, c);
  }
}

// 45 columns, of which the ranks have unequal parts.
TEST_P(OutputGate, RanksWithPartsOfTheWidthGiveTheWhole) {
  const auto [norm, gate] = GetParam();
  const int64_t width = 45;
  for (int64_t tokens : {0, 1, 33, 70}) {
    Matrix o = Matrix::Random(tokens, width, rng_);
    // Rows whose squares leave float32: the sum of some ranks, and every single one.
    for (int64_t t = 4; t < tokens; t += 5) {
      for (int64_t i = 0; i < width; ++i) o.at(t, i) *= t % 2 == 0 ? 0x1p62F : 0x1p67F;
    }
    Matrix z = Matrix::Random(tokens, width, rng_, 0, 2.0F);
    Matrix dy = Matrix::Random(tokens, width, rng_);
    Matrix weight = Matrix::Random(1, width, rng_);
    Matrix old_dweight = Matrix::Random(1, width, rng_);
    const auto od = o.values();
    const auto zd = z.values();
    const auto dyd = dy.values();
    const auto wd = weight.values();
    std::vector<double> y_expected(od.size()), dout_expected(od.size()), dz_expected(od.size());
    auto dw_expected = old_dweight.values();
    const double* w_or_null = norm ? wd.data() : nullptr;
    const double* z_or_null = gate ? zd.data() : nullptr;
    reference::OutputGateForward(tokens, width, od.data(), w_or_null, z_or_null, kEpsDouble,
                                 y_expected.data());
    reference::OutputGateBackward(tokens, width, dyd.data(), od.data(), w_or_null, z_or_null,
                                  kEpsDouble, dout_expected.data(), dz_expected.data(),
                                  dw_expected.data());
    for (int64_t ranks : {1, 2, 3, 4}) {
      Matrix y(tokens, width), dout(tokens, width), dz(tokens, width), dweight = old_dweight;
      std::vector<Matrix> rstds(static_cast<size_t>(ranks), Matrix(1, tokens));
      RankThreads threads(ranks);
      threads.Run([&, norm = norm, gate = gate](const RankExchange& exchange) {
        const int64_t begin = width * exchange.rank / ranks;
        const int64_t end = width * (exchange.rank + 1) / ranks;
        Matrix my_o = ColumnsOf(o, begin, end, 1), my_z = ColumnsOf(z, begin, end, 2);
        Matrix my_dy = ColumnsOf(dy, begin, end, 3), my_weight = ColumnsOf(weight, begin, end, 0);
        Matrix my_y(tokens, end - begin, 1), my_dout(tokens, end - begin, 2);
        Matrix my_dz(tokens, end - begin, 3), my_dweight = ColumnsOf(old_dweight, begin, end, 0);
        Matrix& rstd = rstds[static_cast<size_t>(exchange.rank)];
        KernelTest test(exchange.rank == 1 ? 3 : 1);
        const sala::Tensor w = norm ? my_weight.vector() : sala::Tensor();
        const sala::Tensor gate_tensor = gate ? my_z.tensor() : sala::Tensor();
        const WidthShard shard = {width, &exchange};
        OutputGateForward(test.ctx(), my_o.tensor(), w, gate_tensor, kEps, my_y.tensor(),
                          rstd.vector(), shard);
        OutputGateBackward(test.ctx(), my_dy.tensor(), my_o.tensor(), w, gate_tensor, rstd.vector(),
                           my_dout.tensor(), gate ? my_dz.tensor() : sala::Tensor(),
                           norm ? my_dweight.vector() : sala::Tensor(), shard);
        EXPECT_EQ(test.arena().used_bytes(), 0U);
        EXPECT_TRUE(my_y.GapsUntouched() && my_dout.GapsUntouched() && my_dz.GapsUntouched());
        // Each rank has columns of its own.
        PutColumns(my_y, begin, y);
        PutColumns(my_dout, begin, dout);
        PutColumns(my_dz, begin, dz);
        PutColumns(my_dweight, begin, dweight);
      });
      const std::vector<int64_t> one_float_a_token = {tokens, tokens};
      EXPECT_EQ(threads.sizes(), norm && tokens > 0 ? one_float_a_token : std::vector<int64_t>());
      for (const Matrix& rstd : rstds) EXPECT_TRUE(rstd.SameBits(rstds[0]));

      // The bounds of AgreesWithReference, where each rank's sum has one rounding more: of the
      // squares, half of which reaches r; of the dots.
      ExpectClose(y, y_expected,
                  [&](size_t i) { return 10.6 * kF32Round * std::abs(y_expected[i]); });
      double dw_size = 1;
      std::vector<double> size(od.size());
      for (int64_t t = 0; t < tokens; ++t) {
        const auto row = static_cast<size_t>(t * width);
        double mean = 0;
        const double r = norm ? rstds[0].at(0, t) : 1;
        for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
          mean += std::abs(dyd[row + i] * wd[i] * od[row + i]) / static_cast<double>(width);
        }
        for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
          size[row + i] =
              norm ? std::abs(r * wd[i] * dyd[row + i]) + r * r * r * mean * std::abs(od[row + i])
                   : std::abs(dyd[row + i]);
          dw_size = std::max(dw_size, std::abs(dyd[row + i] * od[row + i] * r));
        }
      }
      ExpectClose(dout, dout_expected, [&](size_t i) { return 18 * kF32Round * size[i]; });
      if (gate) {
        ExpectClose(dz, dz_expected,
                    [&](size_t i) { return 20.5 * kF32Round * std::abs(dyd[i] * y_expected[i]); });
      }
      if (norm) {
        const int64_t pieces = tokens / 32;
        ExpectClose(dweight, dw_expected, [&](size_t) {
          return static_cast<double>(13 + tokens + pieces) * kF32Round *
                 static_cast<double>(tokens + 4) * dw_size;
        });
      }
    }
  }
}

TEST(OutputGateDeathTest, RefusesAWidthThatDoesNotFit) {
  Matrix o = Matrix::Filled(2, 4, 1), weight = Matrix::Filled(1, 4, 1), y(2, 4), rstd(1, 2);
  KernelTest test;
  const auto run = [&](const WidthShard& shard) {
    OutputGateForward(test.ctx(), o.tensor(), weight.vector(), {}, kEps, y.tensor(), rstd.vector(),
                      shard);
  };
  const RankExchange exchange = {.rank = 0, .ranks = 2, .gather = [](auto&&...) {}};
  EXPECT_DEATH(run({.width = 8}), "4 columns of 8 without an exchange");
  EXPECT_DEATH(run({.width = 3, .exchange = &exchange}), "4 columns of 3");
}

INSTANTIATE_TEST_SUITE_P(Parts, OutputGate, testing::ValuesIn(kParts), [](const auto& instance) {
  return std::string(instance.param.norm ? "Norm" : "") + (instance.param.gate ? "Gate" : "");
});

}  // namespace
}  // namespace sala::kernels
