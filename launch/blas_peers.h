// Matrix products of libraries that happen to be installed, as a yardstick of our own: loaded when
// a benchmark asks for them, used nowhere else.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sala::launch {

// How the operands of C = A B are stored; names as in kernels/gemm/gemm.h.
enum class ProductForm : uint8_t { kNT, kNN, kTN };

class BlasPeer {
 public:
  // C [m, n] = alpha * product over k, row-major f32 without gaps: NT A [m, k], B [n, k]; NN A
  // [m, k], B [k, n]; TN A [k, m], B [k, n]. False when the library reports an error.
  using Product = bool (*)(void* function, ProductForm form, int64_t m, int64_t n, int64_t k,
                           float alpha, const float* a, const float* b, float* c);

  BlasPeer(std::string name, Product product, void* function)
      : name_(std::move(name)), product_(product), function_(function) {}

  const std::string& name() const { return name_; }  // "OpenBLAS 0.3.21"
  bool Multiply(ProductForm form, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                const float* b, float* c) const {
    return product_(function_, form, m, n, k, alpha, a, b, c);
  }

 private:
  std::string name_;
  Product product_;
  void* function_;  // of the library
};

struct BlasPeers {
  std::vector<BlasPeer> found;
  std::vector<std::string> missing;  // "oneDNN: libdnnl.so.2: cannot open shared object file"
};

// OpenBLAS and oneDNN with `threads` threads each, as far as they are installed, can be told the
// number of threads and give the right numbers. The libraries stay loaded.
BlasPeers LoadBlasPeers(int threads);

}  // namespace sala::launch
