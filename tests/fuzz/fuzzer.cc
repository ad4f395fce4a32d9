// The libFuzzer program of launch/fuzz. SALA_FUZZ_TARGET names the target; with SALA_FUZZ_SEEDS its
// seeds are written there first.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "tests/fuzz/targets.h"

namespace {

const sala::fuzz::Target* chosen = nullptr;

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  const char* name = std::getenv("SALA_FUZZ_TARGET");
  for (const sala::fuzz::Target& target : sala::fuzz::Targets()) {
    if (name != nullptr && target.name == name) chosen = &target;
  }
  if (chosen == nullptr) {
    std::fprintf(stderr, "SALA_FUZZ_TARGET names no target; there are:");
    for (const sala::fuzz::Target& target : sala::fuzz::Targets())
      std::fprintf(stderr, " %s", target.name.c_str());
    std::fprintf(stderr, "\n");
    std::exit(64);
  }
  const char* directory = std::getenv("SALA_FUZZ_SEEDS");
  int number = 0;
  for (const std::string& seed : chosen->seeds()) {
    if (directory == nullptr) break;
    std::ofstream(std::string(directory) + "/seed-" + std::to_string(number++), std::ios::binary)
        << seed;
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  sala::fuzz::ResetLargestAllocation();
  chosen->run({reinterpret_cast<const char*>(bytes), size});
  if (sala::fuzz::LargestAllocation() > 16 * size + sala::fuzz::kFixedBytes) {
    std::fprintf(stderr, "%zu bytes of memory asked for at once, the input has %zu\n",
                 sala::fuzz::LargestAllocation(), size);
    std::abort();
  }
  return 0;
}
