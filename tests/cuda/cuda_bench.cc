// Times of the CUDA kernels and of whole steps at the shapes of the 9B model, each beside what the
// device can do, measured in the same run. launch/gpu-bench runs this and makes the tables of
// docs/benchmarks; tests/cuda/bench has the parts.
//
//   cuda_bench [--sections limits,products,rows,mixers,steps,prefill] [--only TEXT] [--seconds S]
//              [--json FILE] [--smoke]
//
// The CUDA module is the one that SALA_CUDA_MODULE names, or libsala_cuda.so beside the program. On
// the emulator only --smoke is allowed: tiny shapes, which show that the program runs; its times
// say nothing.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "core/cuda_module.h"
#include "nlohmann/json.hpp"
#include "tests/cuda/bench/cases.h"

namespace sala::bench {
namespace {

struct Part {
  const char* name;
  void (*run)(Bench& bench);
};
constexpr Part kParts[] = {{"limits", &LimitCases}, {"products", &ProductCases},
                           {"rows", &TokenCases},   {"mixers", &MixerCases},
                           {"steps", &StepCases},   {"prefill", &PrefillCases}};

int Usage(const std::string& text) {
  std::string parts;
  for (const Part& part : kParts) parts += (parts.empty() ? "" : ",") + std::string(part.name);
  std::fprintf(
      stderr,
      "error: %s\nusage: cuda_bench [--sections %s] [--only TEXT] [--seconds S] [--json FILE] "
      "[--smoke]\n",
      text.c_str(), parts.c_str());
  return 2;
}

// The limits come first whatever else is asked for: other rows are read against them.
bool ReadSections(const std::string& list, std::vector<std::string>* sections) {
  std::istringstream text(list);
  for (std::string name; std::getline(text, name, ',');) {
    if (std::none_of(std::begin(kParts), std::end(kParts),
                     [&](const Part& part) { return name == part.name; }))
      return false;
    sections->push_back(name);
  }
  return !sections->empty();
}

int Main(int argc, char** argv) {
  Settings settings;
  std::vector<std::string> sections;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--smoke") {
      settings.smoke = true;
      continue;
    }
    if (i + 1 == argc) return Usage("'" + name + "' is unknown or needs a value");
    const std::string value = argv[++i];
    if (name == "--sections") {
      if (!ReadSections(value, &sections)) return Usage("unknown section in '" + value + "'");
    } else if (name == "--only") {
      settings.only = value;
    } else if (name == "--json") {
      settings.json = value;
    } else if (name == "--seconds") {
      settings.seconds = std::atof(value.c_str());
      if (settings.seconds <= 0) return Usage("--seconds " + value + " is not above 0");
    } else {
      return Usage("unknown option " + name);
    }
  }

  const auto module = LoadCudaModule();
  auto device = OpenCudaDevice({.host = "bench"});
  if (!module.ok() || !device.ok()) {
    std::fprintf(stderr, "error: %s\n",
                 MessageOf(module.ok() ? device.status() : module.status()).c_str());
    return 1;
  }
  const DeviceInfo& info = (*device)->info();
  if (info.emulated && !settings.smoke) return Usage("the module is emulated: add --smoke");
  const std::string only = settings.only;
  Bench bench(std::move(settings), **device);
  bench.Add({{"section", "device"},
             {"name", "device"},
             {"shape", info.name},
             {"tokens", 0},
             {"skipped", std::to_string(info.multiprocessors) + " multiprocessors, L2 " +
                             std::to_string(info.l2_bytes >> 20) + " MiB, memory " +
                             std::to_string(info.memory_bytes >> 20) + " MiB"},
             {"compute_capability", info.compute_capability},
             {"multiprocessors", info.multiprocessors},
             {"l2_bytes", info.l2_bytes},
             {"memory_bytes", info.memory_bytes},
             {"driver_version", info.driver_version},
             {"runtime_version", info.runtime_version},
             {"emulated", info.emulated},
             {"smoke", bench.smoke()},
             {"module", (*module)->build}});
  const bool all = sections.empty();
  for (const Part& part : kParts) {
    const bool asked =
        all || std::find(sections.begin(), sections.end(), part.name) != sections.end();
    if (asked || std::strcmp(part.name, "limits") == 0) part.run(bench);
  }
  std::printf("%d rows\n", bench.rows());
  return 0;
}

}  // namespace
}  // namespace sala::bench

int main(int argc, char** argv) {
  try {
    return sala::bench::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
