#include "core/cuda_module.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "core/file.h"

namespace sala {
namespace {

constexpr char kLibrary[] = "libsala_cuda.so";
constexpr size_t kDigits = 12;  // of a checksum, in messages

std::string ProgramFolder() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path));
  if (length <= 0) return ".";
  const std::string name(path, static_cast<size_t>(length));
  return name.substr(0, name.rfind('/'));
}

// What to try, best first. A path that was asked for by name is the only candidate.
std::vector<std::string> Candidates() {
  const char* named = std::getenv("SALA_CUDA_MODULE");
  if (named != nullptr && *named != '\0') return {named};
  const std::string folder = ProgramFolder();
  return {folder + "/" + kLibrary, folder + "/../lib/" + kLibrary, kLibrary};
}

struct Loaded {
  Status status = OkStatus();
  const CudaModuleInterface* module = nullptr;
  std::string path;
};

Status Problem(const std::string& text) {
  return MakeError(ExitCode::kDevice, "CUDA-MODULE",
                   text + "; the CPU path (device: cpu) needs no module");
}

Loaded TryLoad() {
  Loaded loaded;
  std::string tried;
  for (const std::string& path : Candidates()) {
    // Never unloaded: tensors and devices refer to its code until the process ends.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* why = dlerror();
      // The loader's text for a file that is not there says no more than its name does.
      const bool absent = path.find('/') != std::string::npos && !PathExists(path);
      tried += (tried.empty() ? "" : ", ") +
               (absent ? path + ": no such file" : std::string(why == nullptr ? path : why));
      continue;
    }
    const auto entry = reinterpret_cast<CudaModuleEntry>(dlsym(library, kCudaModuleEntry));
    if (entry == nullptr) {
      loaded.status = Problem(path + ": is not a sala CUDA module (no " + kCudaModuleEntry + ")");
      return loaded;
    }
    const CudaModuleInterface* module = entry();
    if (std::strcmp(module->interface, SALA_CUDA_INTERFACE) != 0) {
      loaded.status =
          Problem(path + ": was built with another version of sala (interface " +
                  std::string(module->interface).substr(0, kDigits) + ", this program's is " +
                  std::string(SALA_CUDA_INTERFACE).substr(0, kDigits) + "); build both together");
      return loaded;
    }
    loaded.module = module;
    loaded.path = path;
    return loaded;
  }
  loaded.status = Problem("the CUDA module could not be loaded: " + tried);
  return loaded;
}

const Loaded& TheModule() {
  static const Loaded loaded = TryLoad();
  return loaded;
}

}  // namespace

StatusOr<const CudaModuleInterface*> LoadCudaModule() {
  const Loaded& loaded = TheModule();
  if (!loaded.status.ok()) return loaded.status;
  return loaded.module;
}

std::string CudaModulePath() { return TheModule().path; }

StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options) {
  SALA_ASSIGN_OR_RETURN(const CudaModuleInterface* module, LoadCudaModule());
  try {
    if (!options.dry) {
      std::string why;
      const int devices = module->device_count(&why);
      if (devices == 0) {
        return MakeError(ExitCode::kDevice, "CUDA-NONE",
                         "no CUDA device: " + why + "; use device: cpu, or see sala doctor");
      }
      if (options.index >= devices) {
        return MakeError(ExitCode::kDevice, "CUDA-NONE",
                         "device " + std::to_string(options.index) + " of " +
                             std::to_string(devices) + " was asked for (they count from 0)");
      }
    }
    return std::unique_ptr<Device>(module->open_device(options));
  } catch (const DeviceError& error) {
    return MakeError(ExitCode::kDevice, error.code(), error.what());
  }
}

}  // namespace sala
