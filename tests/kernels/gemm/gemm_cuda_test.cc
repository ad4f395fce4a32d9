#include <cstdio>
#include <cstdlib>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/reference.h"
#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {
namespace {

using GemmCuda = CudaKernelTest;

enum class Form : uint8_t { kNT, kNN, kTN };
constexpr Form kForms[] = {Form::kNT, Form::kNN, Form::kTN};

void Multiply(Form form, const Context& ctx, const ConstTensor& a, const ConstTensor& b,
              const sala::Tensor& c, const GemmOptions& options) {
  const auto run = form == Form::kNT ? &GemmNT : form == Form::kNN ? &GemmNN : &GemmTN;
  run(ctx, a, b, c, options);
}

// Elements that bring a row to a multiple of 8.
int64_t Padding(int64_t columns) { return (8 - columns % 8) % 8; }

struct Shape {
  int64_t m, n, k;
};

// One product on random operands, and what it must give.
class Problem {
 public:
  Problem(Form form, const Shape& shape, DType c_dtype, std::mt19937& rng, int64_t gap = 0)
      : form_(form),
        s_(shape),
        c_dtype_(c_dtype),
        a_(form == Form::kTN ? RandomBf16(s_.k, s_.m, rng) : RandomBf16(s_.m, s_.k, rng)),
        b_(form == Form::kNT ? RandomBf16(s_.n, s_.k, rng) : RandomBf16(s_.k, s_.n, rng)),
        c_(RandomBf16(s_.m, s_.n, rng)),
        device_a_(DType::kBF16, a_, Padding(a_.columns()) + gap),
        device_b_(DType::kBF16, b_, Padding(b_.columns()) + 2 * gap),
        device_c_(c_dtype, s_.m, s_.n, Padding(s_.n) + 3 * gap) {}

  void Run(const Context& ctx, const GemmOptions& options) {
    if (options.write == Write::kAccumulate) UploadC();
    Launch(ctx, options);
  }
  void UploadC() { device_c_.Upload(c_); }
  void Launch(const Context& ctx, const GemmOptions& options) {
    Multiply(form_, ctx, device_a_.tensor(), device_b_.tensor(), device_c_.tensor(), options);
  }

  // Products of bfloat16 numbers are exact in float32. A sum of K of them is off by at most K
  // roundings relative to the sum of absolute terms; tensor cores cut off instead of rounding, once
  // for several terms, which the 8 allows for where K is small. Then alpha and the old C are
  // applied, and the result is rounded to C's type; what is added to a bf16 C is rounded to bf16
  // first.
  void ExpectRight(const GemmOptions& options) const {
    SCOPED_TRACE(std::string(form_ == Form::kNT   ? "NT"
                             : form_ == Form::kNN ? "NN"
                                                  : "TN") +
                 " m " + std::to_string(s_.m) + " n " + std::to_string(s_.n) + " k " +
                 std::to_string(s_.k) + " into " + (c_dtype_ == DType::kBF16 ? "bf16" : "f32") +
                 ", alpha " + std::to_string(options.alpha) +
                 (options.write == Write::kAccumulate ? ", added" : ""));
    const auto a = a_.values();
    const auto b = b_.values();
    const auto alpha = static_cast<double>(options.alpha);
    std::vector<double> expected = c_.values();
    std::vector<double> size(expected.size());
    for (double& x : size) x = 0;
    const auto absolute = [](std::vector<double> x) {
      for (double& v : x) v = std::abs(v);
      return x;
    };
    Reference(alpha, a, b, &expected, options.write);
    Reference(std::abs(alpha), absolute(a), absolute(b), &size, Write::kOverwrite);
    const std::vector<double> old = c_.values();
    const bool bf16 = c_dtype_ == DType::kBF16;
    const double rounding = bf16 ? 1.01 * kBf16Round : kF32Round;
    const double rounding_of_added = bf16 && options.write == Write::kAccumulate ? kBf16Round : 0.0;
    ExpectClose(device_c_.Download(), expected, [&](size_t i) {
      return static_cast<double>(s_.k + 8) * kF32Round * size[i] +
             2 * kF32Round * (size[i] + std::abs(old[i])) + rounding * std::abs(expected[i]) +
             rounding_of_added * std::abs(expected[i] - old[i]);
    });
    EXPECT_TRUE(device_c_.GapsUntouched());
  }

  const DeviceMatrix& c() const { return device_c_; }

 private:
  void Reference(double alpha, const std::vector<double>& a, const std::vector<double>& b,
                 std::vector<double>* c, Write write) const {
    const bool tn = form_ == Form::kTN;
    const bool nt = form_ == Form::kNT;
    reference::Gemm(s_.m, s_.n, s_.k, alpha, a.data(), tn ? 1 : s_.k, tn ? s_.m : 1, b.data(),
                    nt ? 1 : s_.n, nt ? s_.k : 1, c->data(), s_.n, write);
  }

  Form form_;
  Shape s_;
  DType c_dtype_;
  Matrix a_, b_, c_;
  DeviceMatrix device_a_, device_b_, device_c_;
};

TEST_F(GemmCuda, AgreesWithReference) {
  std::mt19937 rng(1);
  const std::vector<Shape> shapes = {{1, 1, 8},    {1, 65, 16},    {7, 5, 24},
                                     {64, 64, 64}, {65, 33, 8},    {129, 7, 136},
                                     {31, 129, 5}, {16, 24, 2048}, {128, 96, 72}};
  for (const Shape& shape : shapes) {
    for (const Form form : kForms) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        for (const GemmOptions& options :
             {GemmOptions{}, GemmOptions{-0.75F, Write::kOverwrite},
              GemmOptions{1.0F, Write::kAccumulate}, GemmOptions{0.3F, Write::kAccumulate}}) {
          Problem p(form, shape, dtype, rng, shape.k % 16 == 0 ? 8 : 0);
          p.Run(ctx(), options);
          p.ExpectRight(options);
        }
      }
    }
  }
}

// One row lies nowhere but in itself: its stride is not looked at.
TEST_F(GemmCuda, SingleRowsNeedNoStride) {
  std::mt19937 rng(2);
  const Matrix a = RandomBf16(1, 8, rng);
  const Matrix b = RandomBf16(8, 5, rng);
  const DeviceMatrix device_a(DType::kBF16, a);
  const DeviceMatrix device_b(DType::kBF16, b, 3);
  const DeviceMatrix c(DType::kF32, 1, 5);
  GemmNN(ctx(), device_a.tensor(), device_b.tensor(), c.tensor());
  const DeviceMatrix same(DType::kF32, 1, 5, 3);
  GemmNN(ctx(), device_a.tensor(), device_b.tensor(), same.tensor());
  EXPECT_TRUE(c.Download().SameBits(same.Download()));
  EXPECT_TRUE(c.GapsUntouched());
}

TEST_F(GemmCuda, ZeroSizes) {
  std::mt19937 rng(3);
  for (const Form form : kForms) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const Shape& shape : {Shape{0, 9, 8}, Shape{9, 0, 8}, Shape{0, 0, 0}, Shape{9, 11, 0}}) {
        for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
          Problem p(form, shape, dtype, rng, 8);
          p.Run(ctx(), {.write = write});
          p.ExpectRight({.write = write});
        }
      }
    }
  }
}

// Products that differ in one of the things a plan depends on, in turns.
TEST_F(GemmCuda, PlansAreKeptApart) {
  std::mt19937 rng(4);
  std::vector<Problem> problems;
  for (const Form form : kForms) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const int64_t gap : {0, 8, 16}) {
        problems.emplace_back(form, Shape{24, 24, 24}, dtype, rng, gap);
      }
    }
  }
  problems.emplace_back(Form::kNT, Shape{24, 24, 16}, DType::kF32, rng);
  problems.emplace_back(Form::kNT, Shape{24, 16, 24}, DType::kF32, rng);
  problems.emplace_back(Form::kNT, Shape{16, 24, 24}, DType::kF32, rng);
  for (int turn = 0; turn < 2; ++turn) {
    for (Problem& p : problems) {
      const GemmOptions options = {1.5F, turn == 0 ? Write::kOverwrite : Write::kAccumulate};
      p.Run(ctx(), options);
      p.ExpectRight(options);
    }
  }
}

TEST_F(GemmCuda, RepeatsToTheBit) {
  std::mt19937 rng(5);
  for (const Form form : kForms) {
    Problem p(form, {72, 40, 264}, DType::kF32, rng);
    p.Launch(ctx(), {});
    const auto first = p.c().Bytes();
    for (int i = 0; i < 3; ++i) {
      p.Launch(ctx(), {});
      EXPECT_EQ(p.c().Bytes(), first);
    }
  }
}

// Timing the suggestions must not add them up in C.
TEST_F(GemmCuda, TimedChoiceGivesTheSameProduct) {
  auto opened = OpenCudaDevice({.host = "test", .deterministic = false});
  ASSERT_TRUE(opened.ok());
  const std::unique_ptr<Device> timed = std::move(opened).value();
  Arena scratch(size_t{1} << 20, timed.get());
  const Context context = {DeviceKind::kCuda, nullptr, &scratch, timed.get()};
  std::mt19937 rng(6);
  for (const Form form : kForms) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
        for (int64_t gap : {0, 8}) {
          Problem p(form, {33, 24, 48}, dtype, rng, gap);
          for (int turn = 0; turn < 2; ++turn) {  // planned, then from the plan
            if (write == Write::kAccumulate) p.UploadC();
            TestDevice().Synchronize();  // the two devices have streams of their own
            p.Launch(context, {.write = write});
            timed->Synchronize();
            p.ExpectRight({.write = write});
          }
        }
      }
    }
  }
}

// A dry run calls neither device nor library and needs the same work space.
TEST_F(GemmCuda, DryRunCountsTheWorkSpace) {
  auto opened = OpenCudaDevice({.host = "test", .dry = true});
  ASSERT_TRUE(opened.ok());
  const std::unique_ptr<Device> dry = std::move(opened).value();
  Arena scratch(size_t{1} << 20, dry.get());
  Arena memory(size_t{1} << 20, dry.get());
  const Context context = {DeviceKind::kCuda, nullptr, &scratch, dry.get()};
  const sala::Tensor x = memory.New(DType::kBF16, {16, 32});
  const sala::Tensor w = memory.New(DType::kBF16, {24, 32});
  GemmNT(context, x, w, memory.New(DType::kBF16, {16, 24}));
  GemmNT(context, x.Columns(0, 0), w.Columns(0, 0), memory.New(DType::kBF16, {16, 24}));
  EXPECT_EQ(scratch.used_bytes(), 0U);
  EXPECT_EQ(scratch.peak_bytes(), size_t{64} << 20);  // a dry device is an sm_90
}

using GemmCudaDeathTest = GemmCuda;

TEST_F(GemmCudaDeathTest, WrongOperandsAreRefused) {
  const DeviceMatrix a(DType::kBF16, 8, 16), b(DType::kBF16, 8, 16), c(DType::kF32, 8, 8);
  const DeviceMatrix odd(DType::kBF16, 8, 15), wide(DType::kF32, 8, 16);
  EXPECT_DEATH(GemmNT(ctx(), a.tensor(), odd.tensor(), c.tensor()), "expected \\[8, 16\\] bf16");
  EXPECT_DEATH(GemmNT(ctx(), wide.tensor(), b.tensor(), c.tensor()), "expected \\[8, 16\\] bf16");
  EXPECT_DEATH(GemmNT(ctx(), odd.tensor(), odd.tensor(), c.tensor()), "multiples of 16 bytes");
  EXPECT_DEATH(GemmNT(ctx(), a.tensor().Columns(1, 9), b.tensor().Columns(0, 8), c.tensor()),
               "multiples of 16 bytes");
}

// The emulator lets the first product fail, in a process of its own.
TEST_F(GemmCudaDeathTest, FailureOfTheLibraryIsADeviceError) {
  if (!TestDevice().info().emulated) GTEST_SKIP() << "needs the emulator's failures";
  const DeviceMatrix a(DType::kBF16, 8, 16), b(DType::kBF16, 24, 16), c(DType::kF32, 8, 24);
  const auto fail = [&] {
    try {
      GemmNT(ctx(), a.tensor(), b.tensor(), c.tensor());
    } catch (const DeviceError& error) {
      std::fprintf(stderr, "%s: %s\n", error.code().c_str(), error.what());
      std::exit(3);
    }
    std::exit(0);
  };
  setenv("SALA_SIMT_FAIL", "matmul:1", 1);
  EXPECT_EXIT(fail(), ::testing::ExitedWithCode(3),
              "CUDA-FAILED: GemmNT \\[8, 16\\] bf16, \\[24, 16\\] bf16 -> \\[8, 24\\] f32: "
              "cublasLtMatmul: .*CUBLAS_STATUS_EXECUTION_FAILED.*, rank 0 on test");
  unsetenv("SALA_SIMT_FAIL");
}

}  // namespace
}  // namespace sala::kernels
