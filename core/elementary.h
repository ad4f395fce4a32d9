// Elementary functions of float64 whose bits are the same on every machine. A C library picks a
// variant by the processor and changes its last bits between versions, so what ends in a loss, a
// parameter or a choice uses these (tests/structure keeps std::exp and its like out). IEEE
// additions, products, quotients and std::fma, which is exactly defined, and nothing else.
//
// Each is at most one unit in the last place off. Loops over float arrays have the functions of
// kernels/common/vector_math.h.
#pragma once

namespace sala {

struct SinCos {
  double sin;
  double cos;
};

// 0 below -745.14, infinite above 709.79, rounded to subnormal numbers gradually.
double PortableExp(double x);
double PortableExp2(double x);
// -inf of 0, NaN below.
double PortableLog(double x);
// x^y for x >= 0, NaN below. One unit in the last place for |y log x| <= 16, ten up to the ends of
// the range.
double PortablePow(double x, double y);
// |x| <= 2^29, or NaN for both of an infinity or a NaN; it is an error beyond.
SinCos PortableSinCos(double x);

}  // namespace sala
