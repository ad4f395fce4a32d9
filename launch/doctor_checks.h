// What `sala doctor` looks at: each check says what it found, whether that will do, and what to do
// where it will not.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"

namespace sala::launch {

enum class Health : uint8_t {
  kOk,
  kInfo,  // nothing to judge, or a part that need not be there
  kWarning,
  kFails,
};

struct DoctorRow {
  std::string name;
  Health health = Health::kOk;
  std::string found;
  std::string remedy = {};                 // with kWarning and kFails, and kInfo where there is one
  ExitCode exit_code = ExitCode::kDevice;  // with kFails
};

DoctorRow CheckCpu();
DoctorRow CheckThreads();  // of the process: affinity and the control group's quota
DoctorRow CheckMemory();   // free, and the control group's limit
// Two ranks under mpirun exchange a sum (`sala doctor --as-rank` is the rank); left out where this
// process has a launcher itself.
DoctorRow CheckMpi();
DoctorRow CheckHdf5(const std::string& directory);  // a file written and read back
// Free space, and the rate of writing (with fsync) and reading back 128 MiB.
DoctorRow CheckDisk(const std::string& directory);
DoctorRow CheckClock(const std::string& directory);  // against the file system's, and NTP
DoctorRow CheckFiles();                              // open files this process may have
std::vector<DoctorRow> CheckCuda(bool needed);

// The rank that CheckMpi starts: sums over the job and prints one line.
Status DoctorRank(int* argc, char*** argv);

}  // namespace sala::launch
