// sala doctor: what this machine offers, and why the GPU path is not there where it is not.
#include <cstdio>
#include <memory>
#include <string>

#include "core/cuda_module.h"
#include "kernels/common/instruction_set.h"
#include "launch/build_info.h"
#include "launch/command.h"
#include "parallel/mpi_communicator.h"

namespace sala::launch {
namespace {

void Line(const char* name, const std::string& value) {
  std::printf("%-10s  %s\n", name, value.c_str());
}

std::string VersionText(int version) {  // 13020 -> "13.2"
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The devices the module sees, one line each, or why there is none.
Status ReportDevices(const CudaModuleInterface& module) {
  std::string why;
  const int devices = module.device_count(&why);
  if (devices == 0) {
    Line("GPU", "none: " + why);
    return MakeError(ExitCode::kDevice, "CUDA-NONE", "no CUDA device: " + why);
  }
  for (int i = 0; i < devices; ++i) {
    SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Device> device,
                          OpenCudaDevice({.index = i, .host = parallel::HostName()}));
    const DeviceInfo& info = device->info();
    Line("GPU", std::to_string(i) + ": " + info.name + ", compute capability " +
                    std::to_string(info.compute_capability / 10) + "." +
                    std::to_string(info.compute_capability % 10) + ", " +
                    std::to_string(info.multiprocessors) + " multiprocessors, " +
                    ByteText(static_cast<int64_t>(info.memory_bytes)) + " (" +
                    ByteText(static_cast<int64_t>(device->free_bytes())) + " free), driver " +
                    VersionText(info.driver_version) + ", runtime " +
                    VersionText(info.runtime_version) +
                    (info.emulated ? "; emulated on the CPU" : ""));
  }
  return OkStatus();
}

Status ReportCuda() {
  const auto module = LoadCudaModule();
  if (!module.ok()) {
    Line("CUDA", "not available");
    return module.status();
  }
  Line("CUDA",
       "module " + CudaModulePath() + ", " + (*module)->build + "; " + (*module)->libraries());
  return ReportDevices(**module);
}

Status Doctor(bool need_cuda) {
  Line("sala", Version() + " (" + Commit() + ", " + BuildType() + " build)");
  Line("host", parallel::HostName());
  Line("CPU", CpuDescription() + ", computes with " +
                  std::string(kernels::NameOf(kernels::CurrentInstructionSet())));
  Line("MPI", parallel::MpiLibraryVersion());
  Status cuda = ReportCuda();
  if (cuda.ok()) return cuda;
  if (need_cuda) return cuda;
  std::printf("\n%s\n", MessageOf(cuda).c_str());
  return OkStatus();
}

}  // namespace

void AddDoctorCommand(CommandLine& line) {
  auto need_cuda = std::make_shared<bool>(false);
  CLI::App* command = AddCommand(
      line.app, "doctor", "what this machine offers, and why there is no GPU where there is none",
      "sala doctor");
  command->add_flag("--need-cuda", *need_cuda, "fail (exit 71) where the GPU path does not work");
  line.OnUse(command, [need_cuda] { return Doctor(*need_cuda); });
}

}  // namespace sala::launch
