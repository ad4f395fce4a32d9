#include "core/rng.h"

#include <cmath>
#include <numbers>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "core/elementary.h"
#include "core/hash.h"

namespace sala {
namespace {

using Uint128 = unsigned __int128;

// Constants of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: two
// multipliers, and Weyl increments from the golden ratio and sqrt(3) - 1 that step the key between
// rounds.
constexpr uint32_t kMultiplier0 = 0xD2511F53U;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57U;
constexpr uint32_t kWeyl0 = 0x9E3779B9U;
constexpr uint32_t kWeyl1 = 0xBB67AE85U;
constexpr int kRounds = 10;

}  // namespace

std::array<uint32_t, 4> Philox4x32(const std::array<uint32_t, 4>& counter,
                                   const std::array<uint32_t, 2>& key) {
  std::array<uint32_t, 4> c = counter;
  uint32_t k0 = key[0];
  uint32_t k1 = key[1];
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c[0];
    const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return c;
}

PhiloxStream::PhiloxStream(std::string_view name) : key_(Xxh3(name)) {}

void PhiloxStream::Seek(uint64_t draw) { draw_ = draw; }

uint64_t PhiloxStream::NextU64() {
  const uint64_t block = draw_ / 2;
  const auto words =
      Philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0},
                 {static_cast<uint32_t>(key_), static_cast<uint32_t>(key_ >> 32)});
  const size_t half = draw_ % 2 * 2;
  ++draw_;
  return words[half] | static_cast<uint64_t>(words[half + 1]) << 32;
}

uint64_t PhiloxStream::Bounded(uint64_t n) {
  SALA_CHECK(n >= 1) << "Bounded(0)";
  // Lemire, "Fast random integer generation in an interval", 2019: the high word of x * n is
  // uniform once the 2^64 mod n lowest values of the low word are rejected.
  Uint128 product = static_cast<Uint128>(NextU64()) * n;
  if (static_cast<uint64_t>(product) < n) {
    const uint64_t threshold = (0 - n) % n;
    while (static_cast<uint64_t>(product) < threshold)
      product = static_cast<Uint128>(NextU64()) * n;
  }
  return static_cast<uint64_t>(product >> 64);
}

double PhiloxStream::NextDouble() { return static_cast<double>(NextU64() >> 11) * 0x1p-53; }

double PhiloxStream::NextNormal() {
  const double u = 1.0 - NextDouble();  // in (0, 1]: the logarithm is finite
  const double angle = 2.0 * std::numbers::pi * NextDouble();
  return std::sqrt(-2.0 * PortableLog(u)) * PortableSinCos(angle).cos;
}

std::vector<int64_t> PhiloxStream::Permutation(int64_t n) {
  SALA_CHECK(n >= 0) << "permutation of " << n;
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[Bounded(i + 1)]);
  return order;
}

}  // namespace sala
