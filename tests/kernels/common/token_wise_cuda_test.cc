// Promises of every token-wise operation on a GPU: a token's result depends on no other token, bit
// for bit, and the same inputs give the same bits again, sums over tokens included.
#include <functional>
#include <string>

#include "kernels/embedding/embedding.h"
#include "kernels/mse/mse.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/swiglu/swiglu.h"
#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {
namespace {

using TokenWiseCuda = CudaKernelTest;

const int64_t kTokens = kSlowBuild ? 33 : 129;
constexpr int64_t kHeads = 3;
constexpr int64_t kHeadDim = 32;
constexpr int64_t kWidth = kHeads * kHeadDim;
constexpr float kEps = 1e-6F;
constexpr int64_t kVocabulary = 40;

struct Inputs {
  std::vector<Matrix> rows;  // three of [kTokens, kWidth]
  Matrix weight;             // [1, kWidth]
  std::vector<int32_t> tokens;
};

// `rows` [kTokens, ...] are outputs per token, `sums` those added over tokens.
struct Outputs {
  std::vector<Matrix> rows;
  std::vector<Matrix> sums;
};

// One operation forward and backward. `Rows` is DeviceMatrix or FarMatrix.
struct Operation {
  const char* name;
  std::function<Outputs(const Context&, const Inputs&)> run, run_far;
};

DeviceMatrix Sums(int64_t width) { return {DType::kF32, Matrix::Filled(1, width, 0.5F)}; }
template <typename Rows>
sala::Tensor Heads(const Rows& m) {
  return m.heads(kHeads, kHeadDim);
}
constexpr DType kHalf = DType::kBF16;

template <typename Rows>
Outputs RunRmsNorm(const Context& ctx, const Inputs& in) {
  const Rows a(kHalf, in.rows[0]), b(kHalf, in.rows[1]), dy(kHalf, in.rows[2]);
  const DeviceMatrix weight(kHalf, in.weight), rstd(DType::kF32, 1, kTokens),
      dweight = Sums(kWidth);
  const Rows sum(kHalf, kTokens, kWidth), y(kHalf, kTokens, kWidth), dx(kHalf, kTokens, kWidth);
  RmsNormResidualForward(ctx, a.tensor(), b.tensor(), 0.3F, weight.vector(), kEps, sum.tensor(),
                         y.tensor(), rstd.vector());
  RmsNormBackward(ctx, dy.tensor(), sum.tensor(), weight.vector(), rstd.vector(), dx.tensor(),
                  Write::kOverwrite, dweight.vector());
  return {{sum.Download(), y.Download(), dx.Download()}, {dweight.Download()}};
}

template <typename Rows>
Outputs RunOutputGate(const Context& ctx, const Inputs& in) {
  const Rows o(kHalf, in.rows[0]), z(kHalf, in.rows[1]), dy(kHalf, in.rows[2]);
  const DeviceMatrix weight(kHalf, in.weight), rstd(DType::kF32, 1, kTokens),
      dweight = Sums(kWidth);
  const Rows y(kHalf, kTokens, kWidth), dout(kHalf, kTokens, kWidth), dz(kHalf, kTokens, kWidth);
  OutputGateForward(ctx, o.tensor(), weight.vector(), z.tensor(), kEps, y.tensor(), rstd.vector());
  OutputGateBackward(ctx, dy.tensor(), o.tensor(), weight.vector(), z.tensor(), rstd.vector(),
                     dout.tensor(), dz.tensor(), dweight.vector());
  return {{y.Download(), dout.Download(), dz.Download()}, {dweight.Download()}};
}

template <typename Rows>
Outputs RunGateAlone(const Context& ctx, const Inputs& in) {
  const Rows o(kHalf, in.rows[0]), z(kHalf, in.rows[1]), dy(kHalf, in.rows[2]);
  const Rows y(kHalf, kTokens, kWidth), dout(kHalf, kTokens, kWidth), dz(kHalf, kTokens, kWidth);
  OutputGateForward(ctx, o.tensor(), {}, z.tensor(), kEps, y.tensor(), {});
  OutputGateBackward(ctx, dy.tensor(), o.tensor(), {}, z.tensor(), {}, dout.tensor(), dz.tensor(),
                     {});
  return {{y.Download(), dout.Download(), dz.Download()}, {}};
}

template <typename Rows>
Outputs RunQkNormRope(const Context& ctx, const Inputs& in) {
  const Rows x(kHalf, in.rows[0]), dy(kHalf, in.rows[2]);
  const Rows cos(DType::kF32, kTokens, kHeadDim / 2), sin(DType::kF32, kTokens, kHeadDim / 2);
  const Rows y(kHalf, kTokens, kWidth), dx(kHalf, kTokens, kWidth),
      rstd(DType::kF32, kTokens, kHeads);
  const DeviceMatrix weight(kHalf, in.weight), dweight = Sums(kHeadDim);
  const DeviceIntegers positions(in.tokens);
  RopeTable(ctx, positions.tensor(), kHeadDim, 10000.0F, cos.tensor(), sin.tensor());
  const sala::Tensor w = weight.vector().Rows(0, kHeadDim);
  QkNormRopeForward(ctx, Heads(x), w, kEps, cos.tensor(), sin.tensor(), Heads(y), rstd.tensor());
  QkNormRopeBackward(ctx, Heads(dy), Heads(x), w, rstd.tensor(), cos.tensor(), sin.tensor(),
                     Heads(dx), dweight.vector());
  return {{y.Download(), rstd.Download(), dx.Download()}, {dweight.Download()}};
}

template <typename Rows>
Outputs RunSwiGlu(const Context& ctx, const Inputs& in) {
  const Rows gate(kHalf, in.rows[0]), up(kHalf, in.rows[1]), dy(kHalf, in.rows[2]);
  const Rows y(kHalf, kTokens, kWidth), dgate(kHalf, kTokens, kWidth), dup(kHalf, kTokens, kWidth);
  SwiGluForward(ctx, gate.tensor(), up.tensor(), y.tensor());
  SwiGluBackward(ctx, dy.tensor(), gate.tensor(), up.tensor(), dgate.tensor(), dup.tensor());
  return {{y.Download(), dgate.Download(), dup.Download()}, {}};
}

template <typename Rows>
Outputs RunMeanSquaredError(const Context& ctx, const Inputs& in) {
  const Rows y(kHalf, in.rows[0]), target(kHalf, in.rows[1]), dy(kHalf, kTokens, kWidth);
  const MseResult result = MeanSquaredError(ctx, y.tensor(), target.tensor(), 0.5F, dy.tensor());
  Matrix sums(1, 3);
  sums.at(0, 0) = static_cast<float>(result.squared_error);
  sums.at(0, 1) = static_cast<float>(result.target_sum);
  sums.at(0, 2) = static_cast<float>(result.target_square);
  return {{dy.Download()}, {sums}};
}

template <typename Rows>
Outputs RunEmbedding(const Context& ctx, const Inputs& in) {
  Matrix table(kVocabulary, kWidth);
  for (int64_t v = 0; v < kVocabulary; ++v) {
    for (int64_t i = 0; i < kWidth; ++i) table.at(v, i) = in.weight.at(0, (i + v) % kWidth);
  }
  const Rows weight(kHalf, table), dout(kHalf, in.rows[2]), out(kHalf, kTokens, kWidth),
      dweight(DType::kF32, Matrix::Filled(kVocabulary, kWidth, 0.5F));
  const DeviceIntegers tokens(in.tokens);
  EmbeddingForward(ctx, tokens.tensor(), weight.tensor(), 3.0F, out.tensor());
  EmbeddingBackward(ctx, tokens.tensor(), dout.tensor(), 3.0F, dweight.tensor());
  return {{out.Download()}, {dweight.Download()}};
}

const std::vector<Operation>& Operations() {
#define SALA_OPERATION(name, run) \
  { name, run<DeviceMatrix>, run<FarMatrix> }
  static const std::vector<Operation> operations = {
      SALA_OPERATION("RmsNorm", RunRmsNorm),
      SALA_OPERATION("OutputGate", RunOutputGate),
      SALA_OPERATION("gate alone", RunGateAlone),
      SALA_OPERATION("QkNormRope", RunQkNormRope),
      SALA_OPERATION("SwiGlu", RunSwiGlu),
      SALA_OPERATION("MeanSquaredError", RunMeanSquaredError),
      SALA_OPERATION("Embedding", RunEmbedding),
  };
#undef SALA_OPERATION
  return operations;
}

Inputs RandomInputs() {
  std::mt19937 rng(101);
  Inputs in = {{}, RandomBf16(1, kWidth, rng), {}};
  for (int i = 0; i < 3; ++i) in.rows.push_back(RandomBf16(kTokens, kWidth, rng));
  for (int64_t t = 0; t < kTokens; ++t) {
    in.tokens.push_back(static_cast<int32_t>(t * t % kVocabulary));
  }
  return in;
}

void ExpectSameBits(const char* name, const Outputs& first, const Outputs& second) {
  for (size_t i = 0; i < first.rows.size(); ++i) {
    EXPECT_TRUE(first.rows[i].SameBits(second.rows[i])) << name << ", output " << i;
  }
  for (size_t i = 0; i < first.sums.size(); ++i) {
    EXPECT_TRUE(first.sums[i].SameBits(second.sums[i])) << name << ", sum " << i;
  }
}

TEST_F(TokenWiseCuda, TheSameInputsGiveTheSameBits) {
  const Inputs in = RandomInputs();
  for (const Operation& operation : Operations()) {
    ExpectSameBits(operation.name, operation.run(ctx(), in), operation.run(ctx(), in));
  }
}

TEST_F(TokenWiseCuda, RowsMayLieFarApart) {
  if (!FarMatrix::Possible()) GTEST_SKIP() << "no such memory here";
  const Inputs in = RandomInputs();
  for (const Operation& operation : Operations()) {
    ExpectSameBits(operation.name, operation.run(ctx(), in), operation.run_far(ctx(), in));
  }
}

TEST_F(TokenWiseCuda, ATokenChangesNoOther) {
  const Inputs in = RandomInputs();
  for (const Operation& operation : Operations()) {
    const Outputs before = operation.run(ctx(), in);
    for (int64_t changed : {int64_t{0}, int64_t{17}, kTokens - 1}) {
      Inputs other = in;
      for (Matrix& m : other.rows) {
        for (int64_t i = 0; i < kWidth; ++i) m.at(changed, i) = -2.0F * m.at(changed, i) + 1.0F;
      }
      other.tokens[static_cast<size_t>(changed)] = kVocabulary - 1;  // no square: it was another
      const Outputs after = operation.run(ctx(), other);
      for (size_t i = 0; i < before.rows.size(); ++i) {
        const Matrix& a = before.rows[i];
        const Matrix& b = after.rows[i];
        for (int64_t t = 0; t < kTokens; ++t) {
          bool same = true;
          for (int64_t c = 0; c < a.columns(); ++c) same = same && a.at(t, c) == b.at(t, c);
          ASSERT_EQ(same, t != changed) << operation.name << ", output " << i << ", token " << t;
        }
      }
    }
  }
}

}  // namespace
}  // namespace sala::kernels
