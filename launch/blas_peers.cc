#include "launch/blas_peers.h"

#include <dlfcn.h>

#include <cmath>

#include "core/rng.h"

namespace sala::launch {
namespace {

// ---- OpenBLAS: the C interface of BLAS, 32-bit sizes ----

using CblasSgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k,
                            float alpha, const float* a, int lda, const float* b, int ldb,
                            float beta, float* c, int ldc);
constexpr int kRowMajor = 101;
constexpr int kNoTranspose = 111;
constexpr int kTranspose = 112;

bool MultiplyOpenBlas(void* function, ProductForm form, int64_t m, int64_t n, int64_t k,
                      float alpha, const float* a, const float* b, float* c) {
  const bool ta = form == ProductForm::kTN;
  const bool tb = form == ProductForm::kNT;
  reinterpret_cast<CblasSgemm>(function)(
      kRowMajor, ta ? kTranspose : kNoTranspose, tb ? kTranspose : kNoTranspose,
      static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), alpha, a,
      static_cast<int>(ta ? m : k), b, static_cast<int>(tb ? k : n), 0.0F, c, static_cast<int>(n));
  return true;
}

// ---- oneDNN ----

using DnnlSgemm = int (*)(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k,
                          float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
                          float beta, float* c, int64_t ldc);
struct DnnlVersion {  // the head of dnnl_version_t
  int major, minor, patch;
};

bool MultiplyOneDnn(void* function, ProductForm form, int64_t m, int64_t n, int64_t k, float alpha,
                    const float* a, const float* b, float* c) {
  const bool ta = form == ProductForm::kTN;
  const bool tb = form == ProductForm::kNT;
  return reinterpret_cast<DnnlSgemm>(function)(ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, k, alpha, a,
                                               ta ? m : k, b, tb ? k : n, 0.0F, c, n) == 0;
}

// Whether a library gives the products of a small case: a wrong transposition or an interface of
// another integer size would otherwise pass for a fast library.
bool GivesRightNumbers(const BlasPeer& peer) {
  constexpr int64_t kM = 7;
  constexpr int64_t kN = 11;
  constexpr int64_t kK = 29;
  PhiloxStream rng("v1|1|bench||0|blas|");
  std::vector<float> a(kM * kK);
  std::vector<float> b(kN * kK);
  std::vector<float> c(kM * kN);
  for (std::vector<float>* x : {&a, &b}) {
    for (float& value : *x) value = static_cast<float>(rng.NextNormal());
  }
  for (const ProductForm form : {ProductForm::kNT, ProductForm::kNN, ProductForm::kTN}) {
    if (!peer.Multiply(form, kM, kN, kK, 0.5F, a.data(), b.data(), c.data())) return false;
    for (int64_t i = 0; i < kM; ++i) {
      for (int64_t j = 0; j < kN; ++j) {
        double sum = 0;
        double size = 0;
        for (int64_t k = 0; k < kK; ++k) {
          const double x =
              a[static_cast<size_t>(form == ProductForm::kTN ? k * kM + i : i * kK + k)];
          const double y =
              b[static_cast<size_t>(form == ProductForm::kNT ? j * kK + k : k * kN + j)];
          sum += x * y;
          size += std::abs(x * y);
        }
        // 29 roundings of 6e-8 at most; a wrong element differs by a term or more.
        if (std::abs(0.5 * sum - c[static_cast<size_t>(i * kN + j)]) > 1e-5 * size) return false;
      }
    }
  }
  return true;
}

void Add(const BlasPeer& peer, bool threads_set, BlasPeers* peers) {
  if (!threads_set) {
    peers->missing.push_back(peer.name() + ": its number of threads cannot be set");
  } else if (!GivesRightNumbers(peer)) {
    peers->missing.push_back(peer.name() + ": its products are not those of the operands");
  } else {
    peers->found.push_back(peer);
  }
}

// The first of `files` that loads; null and why not in `reason`.
void* Open(const std::vector<const char*>& files, std::string* reason) {
  for (const char* file : files) {
    if (void* handle = dlopen(file, RTLD_NOW | RTLD_LOCAL)) return handle;
    if (reason->empty()) *reason = dlerror();
  }
  return nullptr;
}

template <typename Function>
Function Symbol(void* handle, const char* name) {
  return reinterpret_cast<Function>(dlsym(handle, name));
}

void LoadOpenBlas(int threads, BlasPeers* peers) {
  std::string reason;
  void* handle = Open({"libopenblas.so.0", "libopenblas.so"}, &reason);
  void* product = handle != nullptr ? dlsym(handle, "cblas_sgemm") : nullptr;
  if (product == nullptr) {
    peers->missing.push_back("OpenBLAS: " + (reason.empty() ? "no cblas_sgemm in it" : reason));
    return;
  }
  std::string name = "OpenBLAS";
  if (const auto config = Symbol<const char* (*)()>(handle, "openblas_get_config")) {
    // "OpenBLAS 0.3.21 DYNAMIC_ARCH ...": name and version.
    const std::string text = config();
    name = text.substr(0, text.find(' ', text.find(' ') + 1));
  }
  const auto set = Symbol<void (*)(int)>(handle, "openblas_set_num_threads");
  if (set != nullptr) set(threads);
  Add({name, MultiplyOpenBlas, product}, set != nullptr, peers);
}

void LoadOneDnn(int threads, BlasPeers* peers) {
  std::string reason;
  void* handle = Open({"libdnnl.so.3", "libdnnl.so.2", "libdnnl.so"}, &reason);
  void* product = handle != nullptr ? dlsym(handle, "dnnl_sgemm") : nullptr;
  if (product == nullptr) {
    peers->missing.push_back("oneDNN: " + (reason.empty() ? "no dnnl_sgemm in it" : reason));
    return;
  }
  std::string name = "oneDNN";
  if (const auto version = Symbol<const DnnlVersion* (*)()>(handle, "dnnl_version")) {
    const DnnlVersion* v = version();
    name += " " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
            std::to_string(v->patch);
  }
  // The library's threads are OpenMP's.
  const auto set = Symbol<void (*)(int)>(handle, "omp_set_num_threads");
  if (set != nullptr) set(threads);
  Add({name, MultiplyOneDnn, product}, set != nullptr, peers);
}

}  // namespace

BlasPeers LoadBlasPeers(int threads) {
  BlasPeers peers;
  LoadOpenBlas(threads, &peers);
  LoadOneDnn(threads, &peers);
  return peers;
}

}  // namespace sala::launch
