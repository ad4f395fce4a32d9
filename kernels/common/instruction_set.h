// The instruction set that hot loops and matrix products use: the best one of the processor, or the
// one that the environment variable SALA_CPU names (portable, avx2, avx512). All give the same
// bits.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sala::kernels {

// kAvx2 and kAvx512 are the levels x86-64-v3 and x86-64-v4 of the System V ABI.
enum class InstructionSet : uint8_t { kPortable, kAvx2, kAvx512 };

std::string_view NameOf(InstructionSet set);
std::vector<InstructionSet> SupportedInstructionSets();  // by this processor, slowest first

// What is wrong with SALA_CPU, or "": it names none of them, or one that the processor lacks. The
// program asks at its start; such a value counts as unset.
std::string InstructionSetProblem();

InstructionSet CurrentInstructionSet();
void SetInstructionSetForTesting(InstructionSet set);  // not while a kernel runs

}  // namespace sala::kernels
