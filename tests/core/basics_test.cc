// Status, dtypes, tensors, arena and thread pool.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/arena.h"
#include "core/buffer.h"
#include "core/context.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/exception.h"
#include "core/rng.h"
#include "core/status.h"
#include "core/tensor.h"

namespace sala {
namespace {

TEST(Status, CarriesCodeExitCodeAndText) {
  const Status status = MakeError(ExitCode::kIo, "CKPT-SAVE", "disk full");
  EXPECT_EQ(MessageOf(status), "CKPT-SAVE: disk full");
  EXPECT_EQ(ErrorCodeOf(status), "CKPT-SAVE");
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kIo);
  const Status annotated = Annotate(status, "rank 3");
  EXPECT_EQ(MessageOf(annotated), "CKPT-SAVE: rank 3: disk full");
  EXPECT_EQ(ErrorCodeOf(annotated), "CKPT-SAVE");
  EXPECT_EQ(ExitCodeOf(annotated), ExitCode::kIo);
  EXPECT_TRUE(Annotate(OkStatus(), "x").ok());
  EXPECT_EQ(ExitCodeOf(OkStatus()), ExitCode::kOk);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("foreign")), ExitCode::kInternal);
  EXPECT_EQ(ErrorCodeOf(absl::InternalError("foreign")), "");
}

TEST(Status, MacrosReturnEarly) {
  const auto half = [](int n) -> StatusOr<int> {
    if (n % 2 != 0) return MakeError(ExitCode::kData, "ODD", "odd");
    return n / 2;
  };
  const auto quarter = [&](int n) -> StatusOr<int> {
    SALA_ASSIGN_OR_RETURN(const int h, half(n));
    SALA_RETURN_IF_ERROR(half(h).status());
    return h / 2;
  };
  EXPECT_EQ(quarter(8).value(), 2);
  EXPECT_EQ(ErrorCodeOf(quarter(3).status()), "ODD");
  EXPECT_EQ(ErrorCodeOf(quarter(6).status()), "ODD");
}

TEST(Exceptions, BecomeErrorsOfTheCatalogue) {
  const auto expect = [](const Status& status, ExitCode exit_code, const std::string& text) {
    EXPECT_EQ(ExitCodeOf(status), exit_code);
    EXPECT_THAT(MessageOf(status), ::testing::StartsWith(text));
  };
  expect(ErrorOf(DeviceError("CUDA-FAILED", "Add [2]: no")), ExitCode::kDevice,
         "CUDA-FAILED: Add [2]: no");
  expect(ErrorOf(std::bad_alloc()), ExitCode::kDevice, "HOST-MEMORY: ");
  expect(ErrorOf(std::runtime_error("a\nb")), ExitCode::kInternal, "INTERNAL: a\\nb; this is");
}

TEST(Exceptions, MemoryThatTheSystemDoesNotHave) {
#ifdef SALA_SANITIZED
  GTEST_SKIP() << "a sanitizer's allocator ends the process itself";
#endif
  constexpr size_t kTooMuch = size_t{1} << 60;  // more than addresses of 57 bits reach
  for (const auto& ask : std::vector<std::function<void()>>{
           [] { Buffer buffer(kTooMuch); }, [] { Arena(size_t{1} << 20).Allocate(kTooMuch); }}) {
    try {
      ask();
      ADD_FAILURE() << "memory was given";
    } catch (const std::exception& error) {
      const Status status = ErrorOf(error);
      EXPECT_EQ(ErrorCodeOf(status), "HOST-MEMORY");
      EXPECT_THAT(MessageOf(status),
                  ::testing::AllOf(::testing::HasSubstr(std::to_string(kTooMuch) + " bytes"),
                                   ::testing::HasSubstr("ask for less")));
    }
  }
}

TEST(CheckDeathTest, EndsWithTheInternalExitCode) {
  EXPECT_EXIT(SALA_CHECK(1 + 1 == 3) << "detail", ::testing::ExitedWithCode(70),
              "sala: error: INTERNAL: .*basics_test.cc:[0-9]+: check failed on rank 0@localhost: "
              "1 \\+ 1 == 3 detail");
}

TEST(BF16, AllPatternsRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    BF16 value;
    value.bits = static_cast<uint16_t>(bits);
    const auto wide = static_cast<float>(value);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(BF16(wide))));
      EXPECT_EQ(BF16(wide).bits, bits | 0x40U) << "NaN keeps sign and payload, made quiet";
    } else {
      ASSERT_EQ(BF16(wide).bits, bits);
    }
  }
}

TEST(BF16, RoundsToNearestTiesToEven) {
  const auto rounded = [](uint32_t bits) { return BF16(std::bit_cast<float>(bits)).bits; };
  EXPECT_EQ(rounded(0x3f800000), 0x3f80);
  EXPECT_EQ(rounded(0x3f807fff), 0x3f80) << "below half";
  EXPECT_EQ(rounded(0x3f808000), 0x3f80) << "tie, even below";
  EXPECT_EQ(rounded(0x3f808001), 0x3f81) << "above half";
  EXPECT_EQ(rounded(0x3f818000), 0x3f82) << "tie, even above";
  EXPECT_EQ(rounded(0xbf818000), 0xbf82) << "the sign plays no part";
  EXPECT_EQ(rounded(0x7f7fffff), 0x7f80) << "overflow to infinity";
  EXPECT_EQ(rounded(0x7f800001), 0x7fc0) << "a NaN whose payload is cut stays a NaN";
  EXPECT_EQ(rounded(0x00008000), 0x0000) << "subnormal tie";
  EXPECT_EQ(rounded(0x00018000), 0x0002);
}

TEST(DType, NamesAndSizes) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF64, DType::kI32, DType::kI64, DType::kU8,
                      DType::kU16}) {
    EXPECT_EQ(ParseDType(NameOf(dtype)), dtype);
  }
  EXPECT_EQ(SizeOf(DType::kBF16), 2U);
  EXPECT_EQ(SizeOf(DType::kI64), 8U);
  EXPECT_FALSE(ParseDType("f16").has_value());
}

TEST(Tensor, Views) {
  std::vector<float> data(2 * 12);
  std::iota(data.begin(), data.end(), 0.0F);
  const Tensor whole(data.data(), {2, 12});
  const Tensor middle = whole.Columns(4, 10);
  EXPECT_EQ(middle.Row<float>(1)[0], 16);
  EXPECT_FALSE(middle.contiguous());
  const ConstTensor heads = middle.AsHeads(3, 2);
  EXPECT_EQ(heads.rank(), 3);
  EXPECT_EQ(heads.stride(0), 12);
  EXPECT_EQ(heads.Row<float>(1)[heads.stride(1) * 2 + 1], 21);
  EXPECT_EQ(whole.Rows(1, 2).Data<float>()[0], 12);
  EXPECT_EQ(whole.Reshape({4, 6}).Row<float>(3)[5], 23);
  EXPECT_EQ(ShapeText(whole), "[2, 12] f32");
  EXPECT_EXIT(whole.Data<double>(), ::testing::ExitedWithCode(70), "holds f32, asked for f64");
}

TEST(Arena, ScopesGiveBackAndBlocksAreReused) {
  Arena arena(1024);
  const Tensor kept = arena.NewZeroed(DType::kF32, {4});
  EXPECT_EQ(kept.Data<float>()[3], 0);
  const size_t used = arena.used_bytes();
  void* first = nullptr;
  for (int round = 0; round < 3; ++round) {
    const ArenaScope scope(arena);
    void* pointer = arena.Allocate(100);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pointer) % 64, 0U);
    if (round == 0) first = pointer;
    EXPECT_EQ(pointer, first);
    arena.Allocate(5000);  // larger than a block
    arena.Allocate(1);
  }
  EXPECT_EQ(arena.used_bytes(), used);
  EXPECT_EQ(arena.peak_bytes(), 64U + 128 + 5056 + 64);
  const size_t reserved = arena.reserved_bytes();
  {
    const ArenaScope scope(arena);
    arena.Allocate(100);
    arena.Allocate(5000);
  }
  EXPECT_EQ(arena.reserved_bytes(), reserved) << "a step that repeats reserves nothing new";
}

TEST(ThreadPool, EveryIndexOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 7, 100, 1001}) {
      for (int64_t grain : {1, 3, 64, 5000}) {
        std::vector<int> hits(static_cast<size_t>(n));
        pool.For(n, grain, [&](int64_t begin, int64_t end) {
          EXPECT_EQ(begin % grain, 0);
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
        });
        EXPECT_EQ(std::count(hits.begin(), hits.end(), 1), n)
            << threads << " " << n << " " << grain;
      }
    }
  }
}

TEST(ThreadPool, SumsHaveTheSameBitsForAnyNumberOfThreads) {
  PhiloxStream rng(5);
  std::vector<float> values(10007);
  for (float& value : values) value = static_cast<float>(rng.NextNormal());
  const int64_t n = static_cast<int64_t>(values.size());
  constexpr int64_t kGrain = 100;
  const auto sum_with = [&](int threads) {
    ThreadPool pool(threads);
    std::vector<float> partial(static_cast<size_t>((n + kGrain - 1) / kGrain));
    pool.For(n, kGrain, [&](int64_t begin, int64_t end) {
      float sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += values[static_cast<size_t>(i)];
      partial[static_cast<size_t>(begin / kGrain)] = sum;
    });
    return std::accumulate(partial.begin(), partial.end(), 0.0F);
  };
  const auto expected = std::bit_cast<uint32_t>(sum_with(1));
  for (int threads : {2, 3, 8})
    EXPECT_EQ(std::bit_cast<uint32_t>(sum_with(threads)), expected) << threads;
}

}  // namespace
}  // namespace sala
