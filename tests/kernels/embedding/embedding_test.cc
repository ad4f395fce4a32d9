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

TEST(EmbeddingDeathTest, RefusesTokensOutsideTheVocabulary) {
  KernelTest test;
  std::vector<int32_t> id = {0, 3};
  Matrix weight(3, 2), out(2, 2);
  EXPECT_DEATH(EmbeddingForward(test.ctx(), sala::Tensor(id.data(), {2}), weight.tensor(), 1.0F,
                                out.tensor()),
               "token 3 at 1, vocabulary 3");
}

}  // namespace
}  // namespace sala::kernels
