// What this program is and where it runs, for --version and benchmark reports.
#pragma once

#include <string>

namespace sala::launch {

std::string Version();         // "0.1.0"
std::string Commit();          // git describe at configure time, or "unknown"
std::string BuildType();       // "Release"
std::string CpuDescription();  // "MODEL NAME, N logical CPUs, avx2 fma avx512f"

}  // namespace sala::launch
