#include "kernels/common/instruction_set.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "core/check.h"

namespace sala::kernels {
namespace {

#if defined(__x86_64__)
#if defined(__clang__)  // does not know the levels by name; these features come with the others of
                        // a level
bool Level3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool Level4() {
  return Level3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#else
bool Level3() { return __builtin_cpu_supports("x86-64-v3") != 0; }
bool Level4() { return __builtin_cpu_supports("x86-64-v4") != 0; }
#endif
#endif

bool Supported(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx2) return Level3();
  if (set == InstructionSet::kAvx512) return Level4();
#endif
  return set == InstructionSet::kPortable;
}

std::string_view NameAskedFor() {
  const char* name = std::getenv("SALA_CPU");
  return name == nullptr ? "" : name;
}

InstructionSet Chosen() {
  const std::vector<InstructionSet> supported = SupportedInstructionSets();
  const auto named = std::find_if(supported.begin(), supported.end(),
                                  [](InstructionSet set) { return NameOf(set) == NameAskedFor(); });
  return named == supported.end() ? supported.back() : *named;
}

std::atomic<InstructionSet>& Current() {
  static std::atomic<InstructionSet> current{Chosen()};
  return current;
}

}  // namespace

std::string_view NameOf(InstructionSet set) {
  switch (set) {
    case InstructionSet::kPortable:
      return "portable";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<InstructionSet> SupportedInstructionSets() {
  std::vector<InstructionSet> sets;
  for (const InstructionSet set :
       {InstructionSet::kPortable, InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    if (Supported(set)) sets.push_back(set);
  }
  return sets;
}

std::string InstructionSetProblem() {
  const std::string asked(NameAskedFor());
  if (asked.empty()) return "";
  std::string names;
  for (const InstructionSet set : SupportedInstructionSets()) {
    if (NameOf(set) == asked) return "";
    names += (names.empty() ? "" : ", ") + std::string(NameOf(set));
  }
  return "environment variable SALA_CPU is '" + asked +
         "', expected one that this processor has: " + names +
         "; set one of them, or unset it for the best";
}

InstructionSet CurrentInstructionSet() { return Current().load(std::memory_order_relaxed); }

void SetInstructionSetForTesting(InstructionSet set) {
  SALA_CHECK(Supported(set)) << "this processor has no " << std::string(NameOf(set));
  Current().store(set, std::memory_order_relaxed);
}

}  // namespace sala::kernels
