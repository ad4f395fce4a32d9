#include "kernels/embedding/embedding.h"

#include "kernels/embedding/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

std::vector<int32_t> RandomTokens(int64_t n, int32_t vocabulary, std::mt19937& rng) {
  std::uniform_int_distribution<int32_t> pick(0, vocabulary - 1);
  std::vector<int32_t> tokens(static_cast<size_t>(n) + 1);  // never empty, so that data() is valid
  for (int32_t& t : tokens) t = pick(rng);
  return tokens;
}

TEST(Embedding, ForwardAndBackwardAgreeWithReference) {
  constexpr int32_t kVocabulary = 13;
  std::mt19937 rng(1);
  for (int64_t tokens : EdgeSizes()) {
    for (int64_t width : {1, 63, 130}) {
      std::vector<int32_t> id = RandomTokens(tokens, kVocabulary, rng);
      const sala::Tensor ids(id.data(), {tokens});
      Matrix weight = Matrix::Random(kVocabulary, width, rng, 2);
      Matrix out(tokens, width, 1);
      KernelTest test;
      EmbeddingForward(test.ctx(), ids, weight.tensor(), 12.0F, out.tensor());
      std::vector<double> expected(static_cast<size_t>(tokens * width));
      reference::EmbeddingForward(tokens, width, id.data(), weight.values().data(), 12.0,
                                  expected.data());
      // One product.
      ExpectClose(out, expected, [&](size_t i) { return kF32Round * std::abs(expected[i]); });
      EXPECT_TRUE(out.GapsUntouched());

      Matrix dout = Matrix::Random(tokens, width, rng, 4);
      Matrix dweight = Matrix::Random(kVocabulary, width, rng, 3);
      std::vector<double> expected_dw = dweight.values();
      std::vector<double> size = expected_dw;
      for (double& s : size) s = std::abs(s);
      auto magnitude = dout.values();
      for (double& d : magnitude) d = std::abs(d);
      reference::EmbeddingBackward(tokens, width, id.data(), dout.values().data(), 0.7,
                                   expected_dw.data());
      reference::EmbeddingBackward(tokens, width, id.data(), magnitude.data(), 0.7, size.data());
      EmbeddingBackward(test.ctx(), ids, dout.tensor(), 0.7F, dweight.tensor());
      // A product (and the rounding of 0.7 to float32) and at most one addition a token.
      ExpectClose(dweight, expected_dw,
                  [&](size_t i) { return static_cast<double>(tokens + 2) * kF32Round * size[i]; });
      EXPECT_TRUE(dweight.GapsUntouched());
    }
  }
}

// Each token lies in one rank's rows, so that the sum over the ranks has the bits of the whole
// table, and so has each rank's part of the gradient. The last rank's rows go beyond the table.
TEST(Embedding, PartsOfTheTableGiveTheWhole) {
  constexpr int32_t kVocabulary = 37;
  constexpr int64_t kWidth = 70;
  std::mt19937 rng(2);
  for (int64_t tokens : {0, 1, 33, 200}) {
    std::vector<int32_t> id = RandomTokens(tokens, kVocabulary, rng);
    const sala::Tensor ids(id.data(), {tokens});
    Matrix weight = Matrix::Random(kVocabulary, kWidth, rng);
    Matrix dout = Matrix::Random(tokens, kWidth, rng, 4);
    Matrix old_dweight = Matrix::Random(kVocabulary, kWidth, rng);
    Matrix out(tokens, kWidth);
    Matrix dweight = old_dweight;
    KernelTest test;
    EmbeddingForward(test.ctx(), ids, weight.tensor(), 12.0F, out.tensor());
    EmbeddingBackward(test.ctx(), ids, dout.tensor(), 0.7F, dweight.tensor());
    for (int64_t ranks : {1, 2, 3, 4}) {
      const int64_t rows = (kVocabulary + ranks - 1) / ranks;
      Matrix sum = Matrix::Filled(tokens, kWidth, 0);
      for (int64_t first = 0; first < rows * ranks; first += rows) {
        Matrix part = Matrix::Filled(rows, kWidth, 5.0F);
        Matrix part_gradient = Matrix::Filled(rows, kWidth, 5.0F, 1);
        const int64_t count = std::min<int64_t>(rows, kVocabulary - first);
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t i = 0; i < kWidth; ++i) {
            part.at(r, i) = weight.at(first + r, i);
            part_gradient.at(r, i) = old_dweight.at(first + r, i);
          }
        }
        Matrix part_out(tokens, kWidth, 1);
        EmbeddingForward(test.ctx(), ids, part.tensor(), 12.0F, part_out.tensor(), first);
        EmbeddingBackward(test.ctx(), ids, dout.tensor(), 0.7F, part_gradient.tensor(), first);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t i = 0; i < kWidth; ++i) sum.at(t, i) += part_out.at(t, i);
        }
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < kWidth; ++i) {
            ASSERT_EQ(part_gradient.at(r, i), r < count ? dweight.at(first + r, i) : 5.0F);
          }
        }
        EXPECT_TRUE(part_out.GapsUntouched() && part_gradient.GapsUntouched());
      }
      EXPECT_TRUE(sum.SameBits(out)) << ranks << " ranks";
    }
  }
}

TEST(EmbeddingDeathTest, RefusesTokensOutsideTheVocabulary) {
  KernelTest test;
  std::vector<int32_t> id = {0, 3};
  Matrix weight(3, 2), out(2, 2);
  EXPECT_DEATH(EmbeddingForward(test.ctx(), sala::Tensor(id.data(), {2}), weight.tensor(), 1.0F,
                                out.tensor()),
               "token 3 at 1, vocabulary 3");
  id = {0, -1};
  EXPECT_DEATH(EmbeddingForward(test.ctx(), sala::Tensor(id.data(), {2}), weight.tensor(), 1.0F,
                                out.tensor(), 3),
               "token -1 at 1");
}

}  // namespace
}  // namespace sala::kernels
