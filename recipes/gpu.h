// GPUs as their makers describe them, for plans of machines that are not here. Published peak
// numbers, nothing measured.
#pragma once

#include <string>
#include <vector>

#include "core/status.h"

namespace sala::recipes {

struct Gpu {
  const char* name;  // as on the command line
  const char* full_name;
  double memory_bytes;  // as advertised, 1 GB = 1e9 bytes
  double bf16_flops;    // a second: dense bfloat16 products, float32 sums, no sparsity
  double memory_rate;   // bytes a second of its own memory
  double link_rate;     // bytes a second to others of its host, one direction
  double network_rate;  // bytes a second to other hosts, one direction: an assumption
  int per_host;         // an assumption where the maker sells single cards
  const char* source;
};

const std::vector<Gpu>& KnownGpus();

// USAGE (64) with the known names.
StatusOr<Gpu> GpuNamed(const std::string& name);

}  // namespace sala::recipes
