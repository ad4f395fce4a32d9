#include "kernels/gemm/gemm.h"

#include <string>
#include <tuple>

#include "kernels/common/instruction_set.h"
#include "kernels/gemm/reference.h"
#include "kernels/gemm/serial.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

enum class Form : uint8_t { kNT, kNN, kTN };
constexpr Form kForms[] = {Form::kNT, Form::kNN, Form::kTN};

struct Case {
  int64_t m, n, k;
};

struct Operands {
  Matrix a, b;
};

Operands RandomOperands(Form form, const Case& s, std::mt19937& rng, int64_t gap) {
  return {
      form == Form::kTN ? Matrix::Random(s.k, s.m, rng, gap) : Matrix::Random(s.m, s.k, rng, gap),
      form == Form::kNT ? Matrix::Random(s.n, s.k, rng, gap) : Matrix::Random(s.k, s.n, rng, gap)};
}

void Multiply(Form form, const Context& ctx, const ConstTensor& a, const ConstTensor& b,
              const Tensor& c, const GemmOptions& options) {
  switch (form) {
    case Form::kNT:
      GemmNT(ctx, a, b, c, options);
      break;
    case Form::kNN:
      GemmNN(ctx, a, b, c, options);
      break;
    case Form::kTN:
      GemmTN(ctx, a, b, c, options);
      break;
  }
}

// The contract's order written out: one float chain of fused multiply-adds.
std::vector<float> Chain(Form form, const Case& s, const Operands& x, const Matrix& c,
                         const GemmOptions& options) {
  std::vector<float> out;
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < s.k; ++k) {
        sum = std::fma(form == Form::kTN ? x.a.at(k, i) : x.a.at(i, k),
                       form == Form::kNT ? x.b.at(j, k) : x.b.at(k, j), sum);
      }
      sum = options.alpha * sum;
      if (options.write == Write::kAccumulate) sum = sum + c.at(i, j);
      out.push_back(sum);
    }
  }
  return out;
}

class Gemm : public testing::Test {
 protected:
  ~Gemm() override { SetInstructionSetForTesting(SupportedInstructionSets().back()); }
  std::mt19937 rng_{7};
};

const Case kCases[] = {{1, 1, 1},       {0, 5, 3},       {5, 0, 3},     {3, 4, 0},
                       {1, 33, 64},     {2, 16, 31},     {6, 16, 8},    {7, 17, 9},
                       {12, 32, 5},     {13, 47, 33},    {64, 64, 64},  {128, 16, 64},
                       {65, 15, 127},   {97, 129, 63},   {33, 8, 257},  {31, 200, 600},
                       {100, 193, 513}, {129, 31, 1030}, {965, 5, 390}, {13, 520, 390}};

TEST_F(Gemm, EveryFormAndInstructionSetFollowsTheOneChainOrder) {
  for (InstructionSet set : SupportedInstructionSets()) {
    SetInstructionSetForTesting(set);
    for (Form form : kForms) {
      for (const Case& s : kCases) {
        for (Write write : {Write::kOverwrite, Write::kAccumulate}) {
          for (int64_t gap : {0, 5}) {
            SCOPED_TRACE(std::string(NameOf(set)) + " form " +
                         std::to_string(static_cast<int>(form)) + " " + std::to_string(s.m) + "x" +
                         std::to_string(s.n) + "x" + std::to_string(s.k));
            Operands x = RandomOperands(form, s, rng_, gap);
            Matrix c = write == Write::kAccumulate ? Matrix::Random(s.m, s.n, rng_, gap)
                                                   : Matrix(s.m, s.n, gap);
            const GemmOptions options{.alpha = gap == 0 ? 1.0F : 0.3F, .write = write};
            const std::vector<float> expected = Chain(form, s, x, c, options);
            KernelTest test;
            Multiply(form, test.ctx(), x.a.tensor(), x.b.tensor(), c.tensor(), options);
            const auto found = c.values<float>();
            ASSERT_TRUE(found.empty() || std::memcmp(found.data(), expected.data(),
                                                     found.size() * sizeof(float)) == 0);
            ASSERT_TRUE(c.GapsUntouched());
            ASSERT_EQ(test.arena().used_bytes(), 0U);
          }
        }
      }
    }
  }
}

TEST_F(Gemm, AgreesWithTheDoubleReference) {
  const Case s{53, 71, 700};
  Operands x = RandomOperands(Form::kNT, s, rng_, 3);
  Matrix c(s.m, s.n);
  KernelTest test;
  GemmNT(test.ctx(), x.a.tensor(), x.b.tensor(), c.tensor());
  const auto a = x.a.values();
  const auto b = x.b.values();
  std::vector<double> expected(static_cast<size_t>(s.m * s.n));
  reference::Gemm(s.m, s.n, s.k, 1.0, a.data(), s.k, 1, b.data(), 1, s.k, expected.data(), s.n,
                  Write::kOverwrite);
  // k roundings, each at most kF32Round of a partial sum, which is at most sum |a b|.
  ExpectClose(c, expected, [&](size_t e) {
    const size_t i = e / static_cast<size_t>(s.n);
    const size_t j = e % static_cast<size_t>(s.n);
    double size = 0;
    for (size_t k = 0; k < static_cast<size_t>(s.k); ++k) {
      size += std::abs(a[i * static_cast<size_t>(s.k) + k] * b[j * static_cast<size_t>(s.k) + k]);
    }
    return static_cast<double>(s.k) * kF32Round * size;
  });
}

TEST_F(Gemm, SlicesHaveTheBitsOfTheWhole) {
  const Case s{201, 150, 300};
  KernelTest test;
  for (Form form : kForms) {
    Operands x = RandomOperands(form, s, rng_, 0);
    Matrix whole(s.m, s.n);
    Multiply(form, test.ctx(), x.a.tensor(), x.b.tensor(), whole.tensor(), {});
    Matrix cut(s.m, s.n);
    for (auto [r0, r1] : {std::pair<int64_t, int64_t>{0, 1}, {1, 70}, {70, 201}}) {
      for (auto [c0, c1] : {std::pair<int64_t, int64_t>{0, 7}, {7, 100}, {100, 150}}) {
        Multiply(form, test.ctx(),
                 form == Form::kTN ? x.a.tensor().Columns(r0, r1) : x.a.tensor().Rows(r0, r1),
                 form == Form::kNT ? x.b.tensor().Rows(c0, c1) : x.b.tensor().Columns(c0, c1),
                 cut.tensor().Rows(r0, r1).Columns(c0, c1), {});
      }
    }
    EXPECT_TRUE(whole.SameBits(cut)) << "form " << static_cast<int>(form);
  }
}

TEST_F(Gemm, ThreadsDoNotChangeBits) {
  for (const Case& s : {Case{700, 90, 270}, Case{90, 700, 270}, Case{1, 1, 1}}) {
    for (Form form : kForms) {
      Operands x = RandomOperands(form, s, rng_, 0);
      const Matrix old = Matrix::Random(s.m, s.n, rng_);
      Matrix one = old;
      Matrix three = old;
      KernelTest serial(1);
      KernelTest threaded(3);
      const GemmOptions options{.alpha = 0.7F, .write = Write::kAccumulate};
      Multiply(form, serial.ctx(), x.a.tensor(), x.b.tensor(), one.tensor(), options);
      Multiply(form, threaded.ctx(), x.a.tensor(), x.b.tensor(), three.tensor(), options);
      EXPECT_TRUE(one.SameBits(three)) << "form " << static_cast<int>(form);
    }
  }
}

TEST_F(Gemm, SerialFormsStayInsideTheirWorkspace) {
  constexpr float kGuard = 12345.0F;
  for (InstructionSet set : SupportedInstructionSets()) {
    SetInstructionSetForTesting(set);
    for (const Case& s : kCases) {
      for (Form form : kForms) {
        Operands x = RandomOperands(form, s, rng_, 0);
        Matrix c = Matrix::Filled(s.m, s.n, 0);
        const int64_t room = GemmSerialWorkspace(s.m, s.n, s.k);
        std::vector<float> workspace(static_cast<size_t>(room) + 64, kGuard);
        const auto run = form == Form::kNT   ? GemmSerialNT
                         : form == Form::kNN ? GemmSerialNN
                                             : GemmSerialTN;
        run(s.m, s.n, s.k, 1.0F, x.a.tensor().Data<float>(), x.a.columns(),
            x.b.tensor().Data<float>(), x.b.columns(), c.tensor().Data<float>(), s.n,
            Write::kAccumulate, workspace.data());
        for (size_t i = static_cast<size_t>(room); i < workspace.size(); ++i) {
          ASSERT_EQ(workspace[i], kGuard) << s.m << "x" << s.n << "x" << s.k;
        }
      }
    }
  }
}

TEST(GemmDeathTest, RefusesShapesThatDoNotFit) {
  KernelTest test;
  Matrix a(3, 4), b(5, 6), c(3, 5);
  EXPECT_DEATH(GemmNT(test.ctx(), a.tensor(), b.tensor(), c.tensor()), "expected \\[5, 4\\]");
}

}  // namespace
}  // namespace sala::kernels
