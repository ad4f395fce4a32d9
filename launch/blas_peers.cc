#include "launch/blas_peers.h"

#include <dlfcn.h>

#include <cstdlib>

namespace sala::launch {
namespace {

// ---- OpenBLAS: the C interface of BLAS, 32-bit sizes ----

using CblasSgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k,
                            float alpha, const float* a, int lda, const float* b, int ldb,
                            float beta, float* c, int ldc);
constexpr int kRowMajor = 101;
constexpr int kNoTranspose = 111;
constexpr int kTranspose = 112;

void MultiplyOpenBlas(void* function, ProductForm form, int64_t m, int64_t n, int64_t k,
                      float alpha, const float* a, const float* b, float* c) {
  const bool ta = form == ProductForm::kTN;
  const bool tb = form == ProductForm::kNT;
  reinterpret_cast<CblasSgemm>(function)(
      kRowMajor, ta ? kTranspose : kNoTranspose, tb ? kTranspose : kNoTranspose,
      static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), alpha, a,
      static_cast<int>(ta ? m : k), b, static_cast<int>(tb ? k : n), 0.0F, c, static_cast<int>(n));
}

// ---- oneDNN ----

using DnnlSgemm = int (*)(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k,
                          float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
                          float beta, float* c, int64_t ldc);
struct DnnlVersion {  // the head of dnnl_version_t
  int major, minor, patch;
};

void MultiplyOneDnn(void* function, ProductForm form, int64_t m, int64_t n, int64_t k, float alpha,
                    const float* a, const float* b, float* c) {
  const bool ta = form == ProductForm::kTN;
  const bool tb = form == ProductForm::kNT;
  reinterpret_cast<DnnlSgemm>(function)(ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, k, alpha, a,
                                        ta ? m : k, b, tb ? k : n, 0.0F, c, n);
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
  if (const auto set = Symbol<void (*)(int)>(handle, "openblas_set_num_threads")) set(threads);
  peers->found.emplace_back(name, MultiplyOpenBlas, product);
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
  if (const auto set = Symbol<void (*)(int)>(handle, "omp_set_num_threads")) set(threads);
  peers->found.emplace_back(name, MultiplyOneDnn, product);
}

}  // namespace

BlasPeers LoadBlasPeers(int threads) {
  BlasPeers peers;
  LoadOpenBlas(threads, &peers);
  LoadOneDnn(threads, &peers);
  return peers;
}

}  // namespace sala::launch
