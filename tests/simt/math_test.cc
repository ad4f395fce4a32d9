// The intrinsics of simt_math.h.
#include <gtest/gtest.h>
#include <simt.h>

#include <cmath>
#include <type_traits>

namespace {

TEST(Math, Bits) {
  EXPECT_EQ(__clz(0), 32);
  EXPECT_EQ(__clz(1), 31);
  EXPECT_EQ(__clz(-1), 0);
  EXPECT_EQ(__clzll(1), 63);
  EXPECT_EQ(__ffs(0), 0);
  EXPECT_EQ(__ffs(8), 4);
  EXPECT_EQ(__ffsll(1LL << 40), 41);
  EXPECT_EQ(__popc(0xf0f0U), 8);
  EXPECT_EQ(__popcll(~0ULL), 64);
  EXPECT_EQ(__brev(1U), 0x80000000U);
  EXPECT_EQ(__brev(0x12345678U), 0x1e6a2c48U);
  EXPECT_EQ(__brevll(1ULL), 1ULL << 63);
  EXPECT_EQ(__byte_perm(0x33221100U, 0x77665544U, 0x5140U), 0x55114400U);
  EXPECT_EQ(__byte_perm(0x80U, 0, 0x8888U), 0xffffffffU);
  EXPECT_EQ(__funnelshift_l(0x80000000U, 1U, 1), 3U);
  EXPECT_EQ(__funnelshift_r(2U, 1U, 1), 0x80000001U);
  EXPECT_EQ(__umulhi(0x80000000U, 6U), 3U);
  EXPECT_EQ(__mulhi(-2, 0x40000000), -1);
  EXPECT_EQ(__float_as_uint(1.0F), 0x3f800000U);
  EXPECT_EQ(__int_as_float(0x40000000), 2.0F);
}

TEST(Math, Numbers) {
  EXPECT_FLOAT_EQ(rsqrtf(4.0F), 0.5F);
  EXPECT_FLOAT_EQ(__expf(1.0F), 2.7182817F);
  EXPECT_FLOAT_EQ(exp2f(3.0F), 8.0F);
  EXPECT_FLOAT_EQ(__fdividef(1.0F, 4.0F), 0.25F);
  EXPECT_FLOAT_EQ(__frcp_rn(8.0F), 0.125F);
  EXPECT_EQ(__fmaf_rn(3.0F, 4.0F, 5.0F), 17.0F);
  const float value = 2.5F;
  float stored = 0.0F;
  __stcs(&stored, __ldg(&value) + __ldcs(&value));
  EXPECT_EQ(stored, 5.0F);
}

TEST(Math, MinAndMax) {
  EXPECT_EQ(min(3, -2), -2);
  EXPECT_EQ(max(3U, 2U), 3U);
  EXPECT_EQ(min(1.5F, 2.5F), 1.5F);
  EXPECT_EQ(max(NAN, 1.0F), 1.0F);
  EXPECT_EQ(min(INT64_C(5), INT64_C(6)), 5);
  static_assert(std::is_same_v<decltype(min(1, 2U)), unsigned>);
  static_assert(std::is_same_v<decltype(max(1.0F, 2.0)), double>);
  static_assert(std::is_same_v<decltype(max(1L, 2L)), long>);
}

TEST(Math, Bf16) {
  const auto bf = [](float x) { return __float2bfloat16(x); };
  const auto value = [](__nv_bfloat16 x) { return __bfloat162float(x); };
  EXPECT_EQ(value(__hfma(bf(3.0F), bf(5.0F), bf(1.0F))), 16.0F);
  // (1 + 2^-7)^2 = 1 + 2^-6 + 2^-14: the last term would be lost if the product were rounded.
  EXPECT_EQ(value(__hfma(bf(1.0078125F), bf(1.0078125F), bf(-1.015625F))), 0x1p-14F);
  const __nv_bfloat162 pair =
      __hfma2(__floats2bfloat162_rn(1.0F, 2.0F), __floats2bfloat162_rn(3.0F, 4.0F),
              __floats2bfloat162_rn(5.0F, 6.0F));
  EXPECT_EQ(value(pair.x), 8.0F);
  EXPECT_EQ(value(pair.y), 14.0F);
  EXPECT_EQ(value(h2exp(__floats2bfloat162_rn(0.0F, 1.0F)).y), 2.71875F);
  EXPECT_EQ(value(h2rcp(__floats2bfloat162_rn(4.0F, 1.0F)).x), 0.25F);
  EXPECT_EQ(value(hrsqrt(bf(16.0F))), 0.25F);
  // From CUDA's own headers.
  EXPECT_EQ(value(__hadd(bf(1.0F), bf(2.0F))), 3.0F);
  EXPECT_EQ(__bfloat1622float2(pair).y, 14.0F);
  EXPECT_EQ(make_float4(1, 2, 3, 4).w, 4.0F);
}

}  // namespace
