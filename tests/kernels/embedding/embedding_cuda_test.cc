#include "kernels/embedding/embedding.h"

#include <tuple>

#include "kernels/embedding/reference.h"
#include "tests/kernels/common/cuda_bounds.h"

namespace sala::kernels {
namespace {

using EmbeddingCuda = CudaKernelTest;

std::vector<int32_t> RandomTokens(int64_t n, int32_t vocabulary, std::mt19937& rng) {
  std::uniform_int_distribution<int32_t> pick(0, vocabulary - 1);
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int32_t& t : tokens) t = pick(rng);
  return tokens;
}

struct Case {
  std::vector<int32_t> tokens;
  int32_t vocabulary;
  int64_t width;
};

// The number of digits of the sort follows from the vocabulary: one, two and three of them. Tiles
// of the sort are 2048 tokens, pieces of a row 256 columns.
std::vector<Case> Cases(std::mt19937& rng) {
  std::vector<Case> cases;
  for (int64_t n : EdgeSizes()) {
    if (kSlowBuild && n > 1 && n != 65) continue;
    cases.push_back({RandomTokens(n, 13, rng), 13, 72});
  }
  cases.push_back({RandomTokens(300, 1, rng), 1, 8});  // one id
  cases.push_back({{0, 255, 256, 65535, 65536, 65537, 256, 0, 65536, 65791, 65537}, 65792, 8});
  cases.push_back({RandomTokens(2049, 300, rng), 300, 8});
  if (kSlowBuild) return cases;
  cases.push_back({RandomTokens(70, 9, rng), 9, 520});
  cases.push_back({RandomTokens(2100, 40, rng), 40, 72});  // more packs than a grid has threads
  cases.push_back({RandomTokens(6200, 70000, rng), 70000, 8});
  cases.push_back({RandomTokens(2048, 257, rng), 257, 8});
  // Half of the tokens are one id, spread over several tiles.
  Case skewed = {RandomTokens(5000, 500, rng), 500, 16};
  for (size_t i = 0; i < skewed.tokens.size(); i += 2) skewed.tokens[i] = 77;
  cases.push_back(skewed);
  return cases;
}

TEST_F(EmbeddingCuda, ForwardAgreesWithReference) {
  std::mt19937 rng(51);
  for (const Case& c : Cases(rng)) {
    const auto tokens = static_cast<int64_t>(c.tokens.size());
    const Matrix weight = RandomBf16(c.vocabulary, c.width, rng);
    const DeviceMatrix w(DType::kBF16, weight, 8), out(DType::kBF16, tokens, c.width, 16);
    const DeviceIntegers ids(c.tokens);
    EmbeddingForward(ctx(), ids.tensor(), w.tensor(), 12.0F, out.tensor());
    std::vector<double> expected(static_cast<size_t>(tokens * c.width));
    reference::EmbeddingForward(tokens, c.width, c.tokens.data(), weight.values().data(), 12.0,
                                expected.data());
    ExpectClose(out.Download(), expected, RoundedOnce(expected));
    EXPECT_TRUE(out.GapsUntouched());
  }
}

// The same products and sums in the same order: the bits of the CPU form, which is held against the
// double reference in its own test; rows without a token keep what they had.
TEST_F(EmbeddingCuda, BackwardHasTheBitsOfTheCpuForm) {
  std::mt19937 rng(52);
  for (const Case& c : Cases(rng)) {
    const auto tokens = static_cast<int64_t>(c.tokens.size());
    Matrix dout = RandomBf16(tokens, c.width, rng);
    Matrix dweight = Matrix::Random(c.vocabulary, c.width, rng);
    const DeviceMatrix dev_dout(DType::kBF16, dout, 8), dev_dweight(DType::kF32, dweight, 4);
    const DeviceIntegers ids(c.tokens);
    EmbeddingBackward(ctx(), ids.tensor(), dev_dout.tensor(), 0.7F, dev_dweight.tensor());

    std::vector<int32_t> host_ids = c.tokens;
    host_ids.push_back(0);  // never empty, so that data() is valid
    KernelTest host;
    EmbeddingBackward(host.ctx(), sala::Tensor(host_ids.data(), {tokens}), dout.tensor(), 0.7F,
                      dweight.tensor());
    EXPECT_TRUE(dev_dweight.Download().SameBits(dweight))
        << tokens << " tokens, vocabulary " << c.vocabulary << ", width " << c.width;
    EXPECT_TRUE(dev_dweight.GapsUntouched());
  }
}

// Parts of the table, with tokens before and behind them; the last part goes beyond the table. 64
// and 256 rows: tokens outside have a digit of their own in the sort.
TEST_F(EmbeddingCuda, PartsOfTheTableGiveTheWhole) {
  constexpr int64_t kWidth = 72;
  std::mt19937 rng(53);
  for (const auto& [vocabulary, rows, tokens] :
       {std::tuple{37, 10, 65}, {250, 64, 300}, {500, 256, 0}, {700, 256, 2100}}) {
    if (kSlowBuild && tokens > 300) continue;
    const std::vector<int32_t> id = RandomTokens(tokens, vocabulary, rng);
    const DeviceIntegers ids(id);
    const Matrix weight = RandomBf16(vocabulary, kWidth, rng);
    const Matrix old_dweight = Matrix::Random(vocabulary, kWidth, rng);
    const DeviceMatrix w(DType::kBF16, weight), out(DType::kBF16, tokens, kWidth);
    const DeviceMatrix dout(DType::kBF16, RandomBf16(tokens, kWidth, rng), 8);
    const DeviceMatrix dweight(DType::kF32, old_dweight);
    EmbeddingForward(ctx(), ids.tensor(), w.tensor(), 12.0F, out.tensor());
    EmbeddingBackward(ctx(), ids.tensor(), dout.tensor(), 0.7F, dweight.tensor());
    const Matrix whole = out.Download(), whole_gradient = dweight.Download();
    for (int64_t first = 0; first < vocabulary; first += rows) {
      Matrix part(rows, kWidth), part_gradient(rows, kWidth);  // NaN behind the table
      for (int64_t r = 0; r < std::min<int64_t>(rows, vocabulary - first); ++r) {
        for (int64_t i = 0; i < kWidth; ++i) {
          part.at(r, i) = weight.at(first + r, i);
          part_gradient.at(r, i) = old_dweight.at(first + r, i);
        }
      }
      const DeviceMatrix part_w(DType::kBF16, part, 8), part_out(DType::kBF16, tokens, kWidth, 16);
      const DeviceMatrix part_dw(DType::kF32, part_gradient, 4);
      EmbeddingForward(ctx(), ids.tensor(), part_w.tensor(), 12.0F, part_out.tensor(), first);
      EmbeddingBackward(ctx(), ids.tensor(), dout.tensor(), 0.7F, part_dw.tensor(), first);
      const Matrix found = part_out.Download(), found_gradient = part_dw.Download();
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t row = id[static_cast<size_t>(t)] - first;
        for (int64_t i = 0; i < kWidth; ++i) {
          ASSERT_EQ(found.at(t, i), row >= 0 && row < rows ? whole.at(t, i) : 0.0F);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < kWidth; ++i) {
          if (first + r < vocabulary) {
            ASSERT_EQ(found_gradient.at(r, i), whole_gradient.at(first + r, i));
          } else {
            ASSERT_TRUE(std::isnan(found_gradient.at(r, i)));
          }
        }
      }
      EXPECT_TRUE(part_out.GapsUntouched() && part_dw.GapsUntouched());
    }
  }
}

}  // namespace
}  // namespace sala::kernels
