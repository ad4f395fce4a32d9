// What reads files that others wrote, as functions of bytes: launch/fuzz runs them under libFuzzer,
// fuzz_tests over their seeds and a few thousand mutations of them.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace sala::fuzz {

struct Target {
  std::string name;
  std::function<std::vector<std::string>()> seeds;  // inputs that are read without an error
  // True when the input was accepted. Must neither crash nor hang, nor ask for one piece of memory
  // above the input's size times 16 (and kFixedBytes).
  std::function<bool(std::string_view)> run;
};

const std::vector<Target>& Targets();

// What libraries ask for whatever the input: stream and file buffers of yaml-cpp and HDF5.
inline constexpr size_t kFixedBytes = 2U << 20U;

// The largest single piece of memory asked for since the last call of ResetLargestAllocation.
void ResetLargestAllocation();
size_t LargestAllocation();

}  // namespace sala::fuzz
