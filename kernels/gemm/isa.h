// Which instruction set the GEMM uses. The best one of the processor is taken by default; all give
// the same bits.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace sala::kernels {

enum class GemmIsa : uint8_t { kPortable, kAvx2, kAvx512 };

std::string_view NameOf(GemmIsa isa);
std::vector<GemmIsa> SupportedGemmIsas();  // by this processor, slowest first
GemmIsa CurrentGemmIsa();
void SetGemmIsaForTesting(GemmIsa isa);  // not while a product runs

}  // namespace sala::kernels
