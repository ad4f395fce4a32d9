#include "kernels/gemm/isa.h"

#include <algorithm>
#include <atomic>

#include "core/check.h"
#include "kernels/gemm/micro_kernel.h"

namespace sala::kernels {
namespace {

bool Supported(GemmIsa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case GemmIsa::kPortable:
      return true;
    case GemmIsa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case GemmIsa::kAvx512:
      return __builtin_cpu_supports("avx512f");
  }
#endif
  return isa == GemmIsa::kPortable;
}

std::atomic<GemmIsa>& Choice() {
  static std::atomic<GemmIsa> choice{SupportedGemmIsas().back()};
  return choice;
}

}  // namespace

std::string_view NameOf(GemmIsa isa) {
  switch (isa) {
    case GemmIsa::kPortable:
      return "portable";
    case GemmIsa::kAvx2:
      return "avx2";
    case GemmIsa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<GemmIsa> SupportedGemmIsas() {
  std::vector<GemmIsa> isas;
  for (GemmIsa isa : {GemmIsa::kPortable, GemmIsa::kAvx2, GemmIsa::kAvx512}) {
    if (Supported(isa)) isas.push_back(isa);
  }
  return isas;
}

GemmIsa CurrentGemmIsa() { return Choice().load(std::memory_order_relaxed); }

void SetGemmIsaForTesting(GemmIsa isa) {
  SALA_CHECK(Supported(isa)) << "this processor has no " << std::string(NameOf(isa));
  Choice().store(isa, std::memory_order_relaxed);
}

const MicroKernels& ActiveMicroKernels() {
  switch (CurrentGemmIsa()) {
    case GemmIsa::kAvx512:
      return kAvx512MicroKernels;
    case GemmIsa::kAvx2:
      return kAvx2MicroKernels;
    case GemmIsa::kPortable:
      break;
  }
  return kPortableMicroKernels;
}

}  // namespace sala::kernels
