// Operations on no tokens: a rank may hold none. Each must do nothing: sums keep what they hold,
// overwriting products over no tokens write zeros.
#pragma once

#include <vector>

#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/embedding/embedding.h"
#include "kernels/gemm/gemm.h"
#include "kernels/kl_divergence/kl_divergence.h"
#include "kernels/mse/mse.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/tensor_ops/tensor_ops.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {

class ZeroRows {
 public:
  static constexpr int64_t kWidth = 32;

  explicit ZeroRows(const Context& ctx) : ctx_(ctx), scope_(*ctx.scratch) {}

  void Products() {
    for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
      const GemmOptions options = {.alpha = 2.0F, .write = write};
      // y = x W^T and dx = dy W of no tokens.
      GemmNT(ctx_, Half({0, kWidth}), Half({16, kWidth}), Half({0, 16}), options);
      GemmNN(ctx_, Half({0, 16}), Half({16, kWidth}), Half({0, kWidth}), options);
      // dW = dy^T x: a sum over no tokens.
      const Tensor sum = Ones({16, kWidth});
      GemmTN(ctx_, Half({0, 16}), Half({0, kWidth}), sum, options);
      ExpectAll(sum, write == Write::kAccumulate ? 1.0F : 0.0F);
    }
  }

  void Norms() {
    const Tensor weight = Half({kWidth});
    RmsNormForward(ctx_, Rows(), weight, kEps, Rows(), Float({0}));
    RmsNormResidualForward(ctx_, Rows(), Rows(), 0.5F, weight, kEps, Rows(), Rows(), Float({0}));
    for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
      const Tensor dweight = Ones({kWidth});
      RmsNormBackward(ctx_, Rows(), Rows(), weight, Float({0}), Rows(), write, dweight);
      ExpectAll(dweight, 1.0F);
      RmsNormBackward(ctx_, Rows(), Rows(), weight, Float({0}), Rows(), write, {});
    }
  }

  void HeadNormsAndRotations() {
    const Tensor weight = Half({16});
    const Tensor cos = Float({0, 8});
    const Tensor sin = Float({0, 8});
    RopeTable(ctx_, Integers(), 16, 10000.0F, cos, sin);
    QkNormRopeForward(ctx_, Heads(), weight, kEps, cos, sin, Heads(), Float({0, 2}));
    QkNormRopeForward(ctx_, Heads(), {}, kEps, cos, sin, Heads(), {});
    const Tensor dweight = Ones({16});
    QkNormRopeBackward(ctx_, Heads(), Heads(), weight, Float({0, 2}), cos, sin, Heads(), dweight);
    ExpectAll(dweight, 1.0F);
    QkNormRopeBackward(ctx_, Heads(), Heads(), {}, {}, cos, sin, Heads(), {});
  }

  void Gates() {
    SwiGluForward(ctx_, Rows(), Rows(), Rows());
    SwiGluBackward(ctx_, Rows(), Rows(), Rows(), Rows(), Rows());
    const Tensor weight = Half({kWidth});
    OutputGateForward(ctx_, Rows(), weight, Rows(), kEps, Rows(), Float({0}));
    const Tensor dweight = Ones({kWidth});
    OutputGateBackward(ctx_, Rows(), Rows(), weight, Rows(), Float({0}), Rows(), Rows(), dweight);
    ExpectAll(dweight, 1.0F);
    OutputGateForward(ctx_, Rows(), {}, Rows(), kEps, Rows(), {});
    OutputGateBackward(ctx_, Rows(), Rows(), {}, Rows(), {}, Rows(), Rows(), {});
  }

  void WholeTensors() {
    Cast(ctx_, Float({0}), Half({0}));
    Cast(ctx_, Half({0}), Float({0}));
    Cast(ctx_, ConstTensor(nullptr, DType::kF32, {0}, ctx_.device), Float({0}));
    Add(ctx_, Float({0}), Float({0}));
    Add(ctx_, Rows(), Rows());
  }

  void Embeddings() {
    EmbeddingForward(ctx_, Integers(), Half({5, kWidth}), 2.0F, Rows());
    const Tensor dweight = Ones({5, kWidth});
    EmbeddingBackward(ctx_, Integers(), Rows(), 2.0F, dweight);
    ExpectAll(dweight, 1.0F);
  }

  void Losses() {
    const Tensor weight = Half({16, kWidth});
    const Tensor dweight = Ones({16, kWidth});
    const CrossEntropyResult entropy =
        CrossEntropy(ctx_, Rows(), weight, Integers(), {}, Float({0}), Rows(), dweight);
    EXPECT_EQ(entropy.loss_sum, 0.0);
    EXPECT_EQ(entropy.targets, 0);
    const KlDivergenceResult divergence =
        KlDivergence(ctx_, Rows(), weight, Rows(), weight, {}, Rows(), dweight);
    EXPECT_EQ(divergence.loss_sum, 0.0);
    EXPECT_EQ(divergence.tokens, 0);
    ExpectAll(dweight, 1.0F);
    const MseResult error = MeanSquaredError(ctx_, Rows(), Rows(), 1.0F, Rows());
    EXPECT_EQ(error.squared_error, 0.0);
    EXPECT_EQ(error.elements, 0);
  }

 private:
  static constexpr float kEps = 1e-6F;

  Tensor Half(std::initializer_list<int64_t> shape) {
    return ctx_.scratch->NewZeroed(ctx_.activation(), shape);
  }
  Tensor Float(std::initializer_list<int64_t> shape) {
    return ctx_.scratch->NewZeroed(DType::kF32, shape);
  }
  Tensor Rows() { return Half({0, kWidth}); }
  Tensor Heads() { return Rows().AsHeads(2, kWidth / 2); }
  Tensor Integers() { return ctx_.scratch->New(DType::kI32, {0}); }

  Tensor Ones(std::initializer_list<int64_t> shape) {
    const Tensor x = Float(shape);
    const std::vector<float> ones(static_cast<size_t>(x.numel()), 1.0F);
    if (ctx_.cuda()) {
      ctx_.gpu->Upload(x.raw(), ones.data(), ones.size() * sizeof(float));
    } else {
      std::copy(ones.begin(), ones.end(), x.Data<float>());
    }
    return x;
  }
  void ExpectAll(const Tensor& x, float value) {
    std::vector<float> found(static_cast<size_t>(x.numel()));
    if (ctx_.cuda()) {
      ctx_.gpu->Download(found.data(), x.raw(), found.size() * sizeof(float));
    } else {
      std::copy_n(x.Data<float>(), found.size(), found.begin());
    }
    for (const float v : found) ASSERT_EQ(v, value);
  }

  Context ctx_;
  ArenaScope scope_;
};

}  // namespace sala::kernels
