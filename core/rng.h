// Philox4x32-10, a counter-based random number generator (Salmon et al., SC 2011): the n-th number
// of a stream is a pure function of (key, n), so nothing about random numbers is state that a
// checkpoint must save.
//
//   PhiloxStream rng("v1|1234|short_decay|web|0|shard_order|");
//   uint64_t draw = rng.NextU64();
//   std::vector<int64_t> order = rng.Permutation(10);
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace sala {

// One block of four 32-bit words.
std::array<uint32_t, 4> Philox4x32(const std::array<uint32_t, 4>& counter,
                                   const std::array<uint32_t, 2>& key);

class PhiloxStream {
 public:
  // Key: XXH3-64 of the name, low word first. Names: "v1|SEED|STAGE|VIEW|EPOCH|PURPOSE|EXTRA".
  explicit PhiloxStream(std::string_view name);
  explicit PhiloxStream(uint64_t key) : key_(key) {}

  uint64_t key() const { return key_; }
  void Seek(uint64_t draw);      // the next NextU64() is draw number `draw`
  uint64_t NextU64();            // block b gives two: (w0 | w1 << 32), (w2 | w3 << 32)
  uint64_t Bounded(uint64_t n);  // uniform in [0, n), Lemire multiply-and-reject; n >= 1
  double NextDouble();           // uniform in [0, 1), 53 bits
  double NextNormal();  // standard normal, Box-Muller on two NextDouble (one of the pair is used)
  std::vector<int64_t> Permutation(int64_t n);  // Fisher-Yates from the top, j = Bounded(i + 1)

 private:
  uint64_t key_;
  uint64_t draw_ = 0;
};

}  // namespace sala
