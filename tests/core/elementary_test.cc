#include "core/elementary.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/rng.h"

namespace sala {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The distance to the exact value in units in its last place. The yardstick is the C library in 80
// bits, 2^-11 of a unit more exact.
double UnitsOff(double found, long double exact) {
  int exponent = 0;
  std::frexp(exact, &exponent);
  const long double unit = std::ldexp(1.0L, std::max(exponent - 53, -1074));
  return static_cast<double>(std::fabs(static_cast<long double>(found) - exact) / unit);
}

// The largest distance over many arguments in [low, high).
template <typename Found, typename Exact>
double Worst(double low, double high, const Found& found, const Exact& exact) {
  PhiloxStream rng("elementary");
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    const double x = low + (high - low) * rng.NextDouble();
    worst = std::max(worst, UnitsOff(found(x), exact(static_cast<long double>(x))));
  }
  return worst;
}

const auto kExactExp = [](long double x) { return std::exp(x); };
const auto kExactLog = [](long double x) { return std::log(x); };

TEST(Elementary, ExpAndLogAreOneUnitOffAtMost) {
  EXPECT_LE(Worst(-1, 1, PortableExp, kExactExp), 1);
  EXPECT_LE(Worst(-708, 709, PortableExp, kExactExp), 1);
  EXPECT_LE(Worst(-745, -708, PortableExp, kExactExp), 1);  // subnormal: rounded twice
  EXPECT_LE(Worst(-1022, 1024, PortableExp2, [](long double x) { return std::exp2(x); }), 1);
  EXPECT_LE(Worst(0.5, 2, PortableLog, kExactLog), 1);
  EXPECT_LE(Worst(0.9999, 1.0001, PortableLog, kExactLog), 1);
  EXPECT_LE(Worst(0, 1e300, PortableLog, kExactLog), 1);
  EXPECT_LE(Worst(0, 1e-310, PortableLog, kExactLog), 1);
}

TEST(Elementary, PowersAreOneUnitOffWhereTheyAreUsed) {
  // Rotary frequencies, corrections of AdamW, learning rates.
  for (const double base : {10000.0, 1e6, 0.9, 0.95, 0.999, 0.05}) {
    const double end = 16 / std::fabs(std::log(base));
    const double worst = Worst(
        -end, end, [=](double y) { return PortablePow(base, y); },
        [=](long double y) { return std::pow(static_cast<long double>(base), y); });
    EXPECT_LE(worst, 1) << base;
  }
  const double worst = Worst(
      -300, 300, [](double y) { return PortablePow(10, y); },
      [](long double y) { return std::pow(10.0L, y); });
  EXPECT_LE(worst, 10);
}

TEST(Elementary, AnglesAreOneUnitOffAtMost) {
  const auto sin = [](double x) { return PortableSinCos(x).sin; };
  const auto cos = [](double x) { return PortableSinCos(x).cos; };
  const auto exact_sin = [](long double x) { return std::sin(x); };
  const auto exact_cos = [](long double x) { return std::cos(x); };
  for (const double end : {0.7, 7.0, 1e6, 0x1p29}) {
    EXPECT_LE(Worst(-end, end, sin, exact_sin), 1) << end;
    EXPECT_LE(Worst(-end, end, cos, exact_cos), 1) << end;
  }
  // Near multiples of pi / 2, where nearly all bits of the angle cancel.
  for (int64_t n = 1; n < 100000; n += 7) {
    const auto x = static_cast<double>(1.57079632679489661923L * static_cast<long double>(n));
    EXPECT_LE(UnitsOff(sin(x), exact_sin(x)), 1) << n;
    EXPECT_LE(UnitsOff(cos(x), exact_cos(x)), 1) << n;
  }
}

TEST(Elementary, ExactAndSpecialValues) {
  EXPECT_EQ(PortableExp(0), 1);
  EXPECT_EQ(PortableExp(-kInfinity), 0);
  EXPECT_EQ(PortableExp(kInfinity), kInfinity);
  EXPECT_EQ(PortableExp(710), kInfinity);
  EXPECT_EQ(PortableExp(-746), 0);
  EXPECT_TRUE(std::isnan(PortableExp(std::nan(""))));
  for (int n = -1074; n < 1024; ++n) EXPECT_EQ(PortableExp2(n), std::ldexp(1.0, n)) << n;
  EXPECT_EQ(PortableExp2(1024), kInfinity);
  EXPECT_EQ(PortableExp2(-1076), 0);
  EXPECT_TRUE(std::isnan(PortableExp2(std::nan(""))));
  EXPECT_EQ(PortableLog(1), 0);
  EXPECT_EQ(PortableLog(0), -kInfinity);
  EXPECT_EQ(PortableLog(kInfinity), kInfinity);
  EXPECT_TRUE(std::isnan(PortableLog(-1)));
  EXPECT_TRUE(std::isnan(PortableLog(std::nan(""))));
  EXPECT_EQ(PortablePow(0, 3), 0);
  EXPECT_EQ(PortablePow(0, -3), kInfinity);
  EXPECT_EQ(PortablePow(0, 0), 1);
  EXPECT_EQ(PortablePow(1, 1e300), 1);
  EXPECT_EQ(PortablePow(7, 0), 1);
  EXPECT_EQ(PortablePow(0.5, 3), 0.125);
  EXPECT_EQ(PortablePow(0.5, 1e9), 0);
  EXPECT_EQ(PortablePow(kInfinity, 2), kInfinity);
  EXPECT_EQ(PortablePow(kInfinity, -2), 0);
  EXPECT_TRUE(std::isnan(PortablePow(-2, 2)));
  EXPECT_EQ(PortableSinCos(0).sin, 0);
  EXPECT_EQ(PortableSinCos(0).cos, 1);
  EXPECT_TRUE(std::isnan(PortableSinCos(kInfinity).sin));
  EXPECT_TRUE(std::isnan(PortableSinCos(std::nan("")).cos));
}

// Fixed by the definition of the operations: another compiler, processor or C library must not
// change them.
TEST(Elementary, KnownBits) {
  EXPECT_EQ(std::bit_cast<uint64_t>(PortableExp(-1.2345)), 0x3fd29f6b7bfe469dU);
  EXPECT_EQ(std::bit_cast<uint64_t>(PortableExp2(-0.4)), 0x3fe8406003b2ae5cU);
  EXPECT_EQ(std::bit_cast<uint64_t>(PortableLog(5.4321)), 0x3ffb13c437b1562dU);
  EXPECT_EQ(std::bit_cast<uint64_t>(PortablePow(10000, -0.71875)), 0x3f55d931bc235544U);
  EXPECT_EQ(std::bit_cast<uint64_t>(PortableSinCos(123456.75).sin), 0xbfefff56feed772bU);
  EXPECT_EQ(std::bit_cast<uint64_t>(PortableSinCos(123456.75).cos), 0x3f89fff2c9c4e6e3U);
}

TEST(ElementaryDeathTest, AnglesBeyondTheRange) { EXPECT_DEATH(PortableSinCos(1e9), "angle"); }

}  // namespace
}  // namespace sala
