// Two promises of every token-wise operation: a token's result depends on no other token, bit for
// bit, and the number of threads changes nothing.
#include <functional>
#include <string>

#include "kernels/embedding/embedding.h"
#include "kernels/mse/mse.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/swiglu/swiglu.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

constexpr int64_t kTokens = 129;
constexpr int64_t kHeads = 3;
constexpr int64_t kHeadDim = 16;
constexpr int64_t kWidth = kHeads * kHeadDim;
constexpr float kEps = 1e-6F;

// x: four inputs [kTokens, kWidth]; weight [1, kWidth]. `rows` [kTokens, ...] are outputs per
// token, `sums` those added over tokens.
struct Outputs {
  std::vector<Matrix> rows;
  std::vector<Matrix> sums;
};
struct Operation {
  const char* name;
  std::function<Outputs(const Context&, std::vector<Matrix>& x, Matrix& weight)> run;
};

Matrix Rows() { return Matrix(kTokens, kWidth); }
Matrix Sums(int64_t width) { return Matrix::Filled(1, width, 0.5F); }
sala::Tensor Heads(Matrix& m) { return m.tensor().AsHeads(kHeads, kHeadDim); }

Outputs RunRmsNorm(const Context& ctx, std::vector<Matrix>& x, Matrix& weight) {
  Outputs out{{Rows(), Rows(), Matrix(1, kTokens), Rows()}, {Sums(kWidth)}};
  RmsNormResidualForward(ctx, x[0].tensor(), x[1].tensor(), 0.3F, weight.vector(), kEps,
                         out.rows[0].tensor(), out.rows[1].tensor(), out.rows[2].vector());
  RmsNormBackward(ctx, x[2].tensor(), out.rows[0].tensor(), weight.vector(), out.rows[2].vector(),
                  out.rows[3].tensor(), Write::kOverwrite, out.sums[0].vector());
  out.rows.erase(out.rows.begin() + 2);  // rstd is no [kTokens, ...] matrix
  return out;
}

Outputs RunOutputGate(const Context& ctx, std::vector<Matrix>& x, Matrix& weight) {
  Outputs out{{Rows(), Rows(), Rows()}, {Sums(kWidth)}};
  Matrix rstd(1, kTokens);
  OutputGateForward(ctx, x[0].tensor(), weight.vector(), x[1].tensor(), kEps, out.rows[0].tensor(),
                    rstd.vector());
  OutputGateBackward(ctx, x[2].tensor(), x[0].tensor(), weight.vector(), x[1].tensor(),
                     rstd.vector(), out.rows[1].tensor(), out.rows[2].tensor(),
                     out.sums[0].vector());
  return out;
}

Outputs RunQkNormRope(const Context& ctx, std::vector<Matrix>& x, Matrix& weight) {
  Outputs out{{Rows(), Rows(), Matrix(kTokens, kHeads)}, {Sums(kHeadDim)}};
  const sala::Tensor w = weight.vector().Columns(0, kHeadDim);
  const sala::Tensor cos = x[2].tensor().Columns(0, kHeadDim / 2);
  const sala::Tensor sin = x[3].tensor().Columns(0, kHeadDim / 2);
  QkNormRopeForward(ctx, Heads(x[0]), w, kEps, cos, sin, Heads(out.rows[0]), out.rows[2].tensor());
  QkNormRopeBackward(ctx, Heads(x[1]), Heads(x[0]), w, out.rows[2].tensor(), cos, sin,
                     Heads(out.rows[1]), out.sums[0].vector());
  return out;
}

Outputs RunSwiGlu(const Context& ctx, std::vector<Matrix>& x, Matrix& /*weight*/) {
  Outputs out{{Rows(), Rows(), Rows()}, {}};
  SwiGluForward(ctx, x[0].tensor(), x[1].tensor(), out.rows[0].tensor());
  SwiGluBackward(ctx, x[2].tensor(), x[0].tensor(), x[1].tensor(), out.rows[1].tensor(),
                 out.rows[2].tensor());
  return out;
}

Outputs RunMse(const Context& ctx, std::vector<Matrix>& x, Matrix& /*weight*/) {
  Outputs out{{Rows()}, {Matrix(1, 1)}};
  out.sums[0].at(0, 0) = static_cast<float>(
      MeanSquaredError(ctx, x[0].tensor(), x[1].tensor(), 0.7F, out.rows[0].tensor())
          .squared_error);
  return out;
}

Outputs RunEmbedding(const Context& ctx, std::vector<Matrix>& x, Matrix& /*weight*/) {
  std::vector<int32_t> tokens;
  for (int32_t t = 0; t < kTokens; ++t) tokens.push_back(t * 5 % 11);
  const sala::Tensor id(tokens.data(), {kTokens});
  Outputs out{{}, {Matrix::Filled(11, kWidth, 0.25F)}};
  EmbeddingBackward(ctx, id, x[0].tensor(), 1.5F, out.sums[0].tensor());
  return out;
}

const Operation kOperations[] = {{"rms_norm", RunRmsNorm},
                                 {"output_gate", RunOutputGate},
                                 {"qk_norm_rope", RunQkNormRope},
                                 {"swiglu", RunSwiGlu},
                                 {"mse", RunMse},
                                 {"embedding", RunEmbedding}};

struct Inputs {
  explicit Inputs(int seed) {
    std::mt19937 rng(static_cast<uint32_t>(seed));
    for (int i = 0; i < 4; ++i) x.push_back(Matrix::Random(kTokens, kWidth, rng, 2));
    weight = Matrix::Random(1, kWidth, rng);
  }
  std::vector<Matrix> x;
  Matrix weight{1, 1};
};

TEST(TokenWise, ThreadsDoNotChangeBits) {
  for (const Operation& operation : kOperations) {
    SCOPED_TRACE(operation.name);
    Inputs inputs(5);
    KernelTest one(1);
    KernelTest three(3);
    const Outputs a = operation.run(one.ctx(), inputs.x, inputs.weight);
    const Outputs b = operation.run(three.ctx(), inputs.x, inputs.weight);
    for (size_t i = 0; i < a.rows.size(); ++i) EXPECT_TRUE(a.rows[i].SameBits(b.rows[i])) << i;
    for (size_t i = 0; i < a.sums.size(); ++i) EXPECT_TRUE(a.sums[i].SameBits(b.sums[i])) << i;
    EXPECT_EQ(one.arena().used_bytes(), 0U);
  }
}

TEST(TokenWise, ATokenTouchesNoOther) {
  constexpr int64_t kChanged = 40;
  for (const Operation& operation : kOperations) {
    SCOPED_TRACE(operation.name);
    Inputs inputs(6);
    KernelTest test;
    const Outputs before = operation.run(test.ctx(), inputs.x, inputs.weight);
    for (Matrix& x : inputs.x) {
      for (int64_t c = 0; c < kWidth; ++c) x.at(kChanged, c) = 3.0F - x.at(kChanged, c);
    }
    const Outputs after = operation.run(test.ctx(), inputs.x, inputs.weight);
    for (size_t i = 0; i < before.rows.size(); ++i) {
      for (int64_t t = 0; t < kTokens; ++t) {
        bool same = true;
        for (int64_t c = 0; c < before.rows[i].columns(); ++c) {
          same = same && before.rows[i].at(t, c) == after.rows[i].at(t, c);
        }
        ASSERT_EQ(same, t != kChanged) << "output " << i << ", token " << t;
      }
    }
  }
}

}  // namespace
}  // namespace sala::kernels
