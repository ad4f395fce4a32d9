#include "recipes/gpu.h"

#include <algorithm>

namespace sala::recipes {

const std::vector<Gpu>& KnownGpus() {
  constexpr double kGiga = 1e9;
  constexpr double kTera = 1e12;
  // One network card of 400 Gbit/s (A100: 200) a GPU, as in the makers' own servers; single cards:
  // 100 Gbit/s shared by the host's GPUs would be common, 25 Gbit/s a GPU is assumed.
  constexpr double kNdr = 50 * kGiga;
  constexpr double kHdr = 25 * kGiga;
  constexpr double kEthernet = 3.125 * kGiga;
  constexpr double kPcie4 = 32 * kGiga;  // 16 lanes
  constexpr double kPcie5 = 64 * kGiga;
  static const std::vector<Gpu> gpus = {
      {"h200", "NVIDIA H200 SXM 141 GB", 141 * kGiga, 989 * kTera, 4800 * kGiga, 450 * kGiga, kNdr,
       8, "H200 data sheet (bf16 1,979 with sparsity, half without); NVLink 900 GB/s both ways"},
      {"h100", "NVIDIA H100 SXM 80 GB", 80 * kGiga, 989 * kTera, 3350 * kGiga, 450 * kGiga, kNdr, 8,
       "H100 data sheet (bf16 1,979 with sparsity, half without); NVLink 900 GB/s both ways"},
      {"a100", "NVIDIA A100 SXM 80 GB", 80 * kGiga, 312 * kTera, 2039 * kGiga, 300 * kGiga, kHdr, 8,
       "A100 data sheet; NVLink 600 GB/s both ways"},
      {"a100-40g", "NVIDIA A100 SXM 40 GB", 40 * kGiga, 312 * kTera, 1555 * kGiga, 300 * kGiga,
       kHdr, 8, "A100 data sheet; NVLink 600 GB/s both ways"},
      {"l40s", "NVIDIA L40S 48 GB", 48 * kGiga, 362 * kTera, 864 * kGiga, kPcie4, kEthernet, 8,
       "L40S data sheet (bf16 733 with sparsity, half without); PCIe 4"},
      {"rtx6000-ada", "NVIDIA RTX 6000 Ada 48 GB", 48 * kGiga, 364 * kTera, 960 * kGiga, kPcie4,
       kEthernet, 4, "Ada professional architecture paper; PCIe 4"},
      {"rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell 96 GB", 96 * kGiga, 503.8 * kTera,
       1792 * kGiga, kPcie5, kEthernet, 4, "RTX Blackwell PRO architecture paper; PCIe 5"},
      {"rtx4090", "NVIDIA GeForce RTX 4090 24 GB", 24 * kGiga, 165.2 * kTera, 1008 * kGiga, kPcie4,
       kEthernet, 4, "Ada architecture paper; PCIe 4"},
      {"rtx5090", "NVIDIA GeForce RTX 5090 32 GB", 32 * kGiga, 209.5 * kTera, 1792 * kGiga, kPcie5,
       kEthernet, 4, "RTX Blackwell architecture paper; PCIe 5"}};
  return gpus;
}

StatusOr<Gpu> GpuNamed(const std::string& name) {
  std::string names;
  for (const Gpu& gpu : KnownGpus()) {
    if (name == gpu.name) return gpu;
    names += (names.empty() ? "" : ", ") + std::string(gpu.name);
  }
  return MakeError(ExitCode::kUsage, "USAGE",
                   "--gpu: found '" + name + "', expected one of " + names);
}

}  // namespace sala::recipes
