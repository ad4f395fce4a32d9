#include "core/elementary.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/check.h"

namespace sala {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ln2: 32 bits, so that a product with an exponent is exact, and the 53 after them; likewise 53 and
// 53.
constexpr double kLn2Short = 0x1.62e42feep-1;
constexpr double kLn2ShortRest = 0x1.a39ef35793c76p-33;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kLn2Rest = 0x1.abc9e3b39803fp-56;
constexpr double kInverseLn2 = 0x1.71547652b82fep+0;
// pi / 2 in pieces of 24 bits, so that a product with an integer below 2^29 is exact, and the rest.
constexpr double kHalfPi[] = {0x1.921fb4p+0, 0x1.4442dp-24, 0x1.846988p-48, 0x1.8cc516p-72,
                              0x1.01b839a25204ap-96};
constexpr double kInverseHalfPi = 0x1.45f306dc9c883p-1;

// high + low, with low at most half a unit in the last place of high.
struct Pair {
  double high;
  double low;
};

Pair TwoSum(double a, double b) {
  const double sum = a + b;
  const double from_b = sum - a;
  return {sum, (a - (sum - from_b)) + (b - from_b)};
}

Pair TwoProduct(double a, double b) {
  const double product = a * b;
  return {product, std::fma(a, b, -product)};
}

double Nearest(double x) { return std::floor(x + 0.5); }

// 2^n e^r for |r| <= 0.35: the Taylor polynomial of degree 13, whose remainder r^14 / 14! is below
// 2^-57.
double ScaledExp(const Pair& r, double n) {
  const double x = r.high;
  double p = 1.0 / 6227020800;
  for (const double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                         1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5}) {
    p = p * x + c;
  }
  const Pair sum = TwoSum(1.0, x);
  return std::ldexp(sum.high + (sum.low + (p * x * x + r.low * (1.0 + x))), static_cast<int>(n));
}

double ExpOfPair(const Pair& x) {
  if (std::isnan(x.high)) return x.high;
  if (x.high > 709.79) return kInfinity;
  if (x.high < -745.14) return 0;
  const double n = Nearest(x.high * kInverseLn2);
  const Pair r = TwoSum(x.high - n * kLn2Short, -n * kLn2ShortRest);
  return ScaledExp(TwoSum(r.high, r.low + x.low), n);
}

// Of a finite x above 0, to 2^-59: x = 2^k m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh(s)
// = 2 (s + s^3 / 3 + s^5 / 5 + ...) with s = (m - 1) / (m + 1). |s| < 0.172, so the term after s^23
// is below 2^-65 of the sum.
Pair LogPair(double x) {
  int k = 0;
  double m = std::frexp(x, &k);
  if (m < 0.70710678118654752) {
    m *= 2;
    --k;
  }
  const double f = m - 1;
  const Pair divisor = TwoSum(2.0, f);
  const double s = f / divisor.high;
  const double s_low = (std::fma(-s, divisor.high, f) - s * divisor.low) / divisor.high;
  const double z = s * s;
  double p = 1.0 / 23;
  for (const double c : {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9,
                         1.0 / 7, 1.0 / 5, 1.0 / 3}) {
    p = p * z + c;
  }
  const Pair sum = TwoSum(k * kLn2Short, 2 * s);
  return TwoSum(sum.high, sum.low + (2 * s * z * p + (2 * s_low + k * kLn2ShortRest)));
}

}  // namespace

double PortableExp(double x) { return ExpOfPair({x, 0}); }

double PortableExp2(double x) {
  if (std::isnan(x)) return x;
  if (x >= 1024) return kInfinity;
  if (x < -1075) return 0;
  const double n = Nearest(x);
  Pair r = TwoProduct(x - n, kLn2);
  r.low += (x - n) * kLn2Rest;
  return ScaledExp(r, n);
}

double PortableLog(double x) {
  if (x == 0) return -kInfinity;
  if (!(x > 0)) return kNaN;
  return x == kInfinity ? x : LogPair(x).high;
}

double PortablePow(double x, double y) {
  if (y == 0 || x == 1) return 1;
  if (x == 0) return y > 0 ? 0 : kInfinity;
  if (!(x > 0) || std::isnan(y)) return kNaN;
  if (x == kInfinity) return y > 0 ? x : 0;
  const Pair log = LogPair(x);
  Pair power = TwoProduct(y, log.high);
  power.low += y * log.low;
  return ExpOfPair(power);
}

SinCos PortableSinCos(double x) {
  if (!(std::fabs(x) < kInfinity)) return {kNaN, kNaN};
  SALA_CHECK(std::fabs(x) <= 0x1p29) << "angle " << x;
  // x = n pi / 2 + r with |r| <= pi / 4, r in two parts.
  const double n = Nearest(x * kInverseHalfPi);
  Pair r{x, 0};
  for (const double piece : kHalfPi) {
    const Pair difference = TwoSum(r.high, -n * piece);
    r = TwoSum(difference.high, difference.low + r.low);
  }
  // Taylor polynomials of degree 17 and 16: their remainders r^19 / 19! and r^18 / 18! are below
  // 2^-58 of the results.
  const double z = r.high * r.high;
  double p = 1.0 / 355687428096000;
  for (const double c : {-1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880,
                         -1.0 / 5040, 1.0 / 120, -1.0 / 6}) {
    p = p * z + c;
  }
  const double sin = r.high + (r.high * z * p + r.low * (1 - 0.5 * z));
  double q = 1.0 / 20922789888000;
  for (const double c :
       {-1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24}) {
    q = q * z + c;
  }
  const Pair lower = TwoSum(1.0, -0.5 * z);
  const double cos = lower.high + (lower.low + (z * z * q - r.high * r.low));
  switch (static_cast<int64_t>(n) & 3) {
    case 0:
      return {sin, cos};
    case 1:
      return {cos, -sin};
    case 2:
      return {-sin, -cos};
    default:
      return {-cos, sin};
  }
}

}  // namespace sala
