// safetensors_copy FROM TO: reads a safetensors file and writes its tensors again, for comparison
// with the official library (hf_parity.py).
#include <cctype>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "core/safetensors.h"

namespace sala {
namespace {

Status Copy(const std::string& from, const std::string& to) {
  SALA_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(from));
  std::vector<SafetensorsTensor> tensors;
  for (const SafetensorsEntry& entry : file.entries()) {
    std::string name;
    for (const char c : entry.dtype) name += static_cast<char>(std::tolower(c));
    SafetensorsTensor tensor{.name = entry.name, .shape = entry.shape, .data = file.Data(entry)};
    if (const std::optional<DType> dtype = ParseDType(name)) {
      tensor.dtype = *dtype;
    } else if (entry.dtype == "F16") {
      tensor.dtype = DType::kU16;
      tensor.type = entry.dtype;
    } else {
      return MakeError(ExitCode::kData, "ST-DTYPE", entry.name + " is " + entry.dtype);
    }
    tensors.push_back(tensor);
  }
  return WriteSafetensors(to, tensors, file.metadata());
}

}  // namespace
}  // namespace sala

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: safetensors_copy FROM TO\n");
    return static_cast<int>(sala::ExitCode::kUsage);
  }
  const sala::Status status = sala::Copy(argv[1], argv[2]);
  if (status.ok()) return 0;
  std::fprintf(stderr, "safetensors_copy: %s\n", sala::MessageOf(status).c_str());
  return static_cast<int>(sala::ExitCodeOf(status));
}
