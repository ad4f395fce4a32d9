#include "launch/doctor_checks.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/timex.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <sstream>
#include <thread>

#include "core/clock.h"
#include "core/cuda_module.h"
#include "core/file.h"
#include "core/hdf5.h"
#include "kernels/common/instruction_set.h"
#include "launch/build_info.h"
#include "launch/child.h"
#include "launch/command.h"
#include "parallel/mpi_communicator.h"

namespace sala::launch {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

std::string FirstWordOf(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

// A file of our own in the directory, gone when the object is.
class ProbeFile {
 public:
  explicit ProbeFile(const std::string& directory)
      : path_(directory + "/.sala-doctor-" + std::to_string(getpid())) {}
  ProbeFile(const ProbeFile&) = delete;
  ProbeFile& operator=(const ProbeFile&) = delete;
  ~ProbeFile() { unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

DoctorRow Unwritable(const std::string& name, const std::string& directory,
                     const std::string& why) {
  return {.name = name,
          .health = Health::kFails,
          .found = directory + ": " + why,
          .remedy = "name a directory that can be written: sala doctor --dir DIR",
          .exit_code = ExitCode::kIo};
}

// Kinds of file systems that matter here; the numbers are Linux's.
std::string FileSystemName(int64_t type) {
  struct Row {
    int64_t type;
    const char* name;
  };
  constexpr std::array<Row, 8> kRows = {{{0xef53, "ext4"},
                                         {0x58465342, "xfs"},
                                         {0x9123683e, "btrfs"},
                                         {0x01021994, "tmpfs"},
                                         {0x794c7630, "overlay"},
                                         {0x6969, "nfs"},
                                         {0x0bd00bd0, "lustre"},
                                         {0x2fc12fc1, "zfs"}}};
  for (const Row& row : kRows) {
    if (row.type == type) return row.name;
  }
  return Format("file system 0x%llx", static_cast<unsigned long long>(type));
}

struct DiskRates {
  double write = 0, read = 0;  // bytes a second
};

StatusOr<DiskRates> MeasureDisk(const std::string& path, int64_t bytes) {
  const auto failed = [&path] {
    return MakeError(ExitCode::kIo, "FILE-WRITE", path + ": " + std::strerror(errno));
  };
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return failed();
  // Not zeros: some file systems store none of those.
  std::vector<char> block(static_cast<size_t>(4 * kMiB));
  for (size_t i = 0; i < block.size(); ++i) block[i] = static_cast<char>(i * 2654435761U >> 13);
  DiskRates rates;
  double start = ClockSeconds();
  bool good = true;
  for (int64_t done = 0; good && done < bytes; done += static_cast<int64_t>(block.size()))
    good = write(fd, block.data(), block.size()) == static_cast<ssize_t>(block.size());
  good = good && fsync(fd) == 0;
  rates.write = static_cast<double>(bytes) / (ClockSeconds() - start);
  if (!good) {
    const Status status = failed();
    close(fd);
    return status;
  }
  // Out of the page cache, as far as the kernel follows the advice.
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  start = ClockSeconds();
  int64_t got = 0;
  while (got < bytes) {
    const ssize_t n = pread(fd, block.data(), block.size(), got);
    if (n <= 0) break;
    got += n;
  }
  rates.read = static_cast<double>(got) / (ClockSeconds() - start);
  const Status status = got < bytes ? failed() : OkStatus();
  close(fd);
  if (!status.ok()) return status;
  return rates;
}

std::string VersionText(int version) {  // 13020 -> "13.2"
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What mpirun printed last, which is where the reason stands.
std::string LastLines(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    if (line.find_first_not_of(" -") != std::string::npos) lines.push_back(line);
  }
  std::string text;
  for (size_t i = lines.size() > 3 ? lines.size() - 3 : 0; i < lines.size(); ++i)
    text += (text.empty() ? "" : " ") + lines[i];
  return Printable(text);
}

constexpr char kRankSays[] = "sala doctor: two ranks agree";

}  // namespace

DoctorRow CheckCpu() {
  const kernels::InstructionSet set = kernels::CurrentInstructionSet();
  DoctorRow row{.name = "CPU",
                .found = CpuDescription() + "; computes with " + std::string(kernels::NameOf(set))};
  if (set == kernels::InstructionSet::kPortable) {
    row.health = Health::kWarning;
    row.remedy =
        "plain loops are 40 to 100 times slower: unset SALA_CPU, or use a CPU with AVX2 and FMA";
  }
  return row;
}

DoctorRow CheckThreads() {
  const auto logical = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  CPU_ZERO(&set);
  const int usable = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : logical;
  DoctorRow row{.name = "threads",
                .found = std::to_string(usable) + " of " + std::to_string(logical) +
                         " logical CPUs may be used"};
  // "max 100000" or "200000 100000": time a period may use, and the period.
  std::ifstream quota_file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (quota_file >> quota >> period && quota != "max" && period > 0) {
    const double cpus = std::strtod(quota.c_str(), nullptr) / period;
    row.found += Format(", the container's share is %.1f", cpus);
    if (cpus + 0.5 < usable) {
      row.health = Health::kWarning;
      row.remedy =
          Format("set run.threads and the number of ranks so that their product is at most %d",
                 std::max(1, static_cast<int>(cpus)));
    }
  } else if (usable < logical) {
    row.health = Health::kWarning;
    row.remedy =
        "the process is bound to some CPUs: with mpirun use --bind-to none "
        "(OMPI_MCA_hwloc_base_binding_policy=none)";
  }
  return row;
}

DoctorRow CheckMemory() {
  std::ifstream file("/proc/meminfo");
  int64_t total = 0;
  int64_t available = 0;
  std::string name;
  for (int64_t kib = 0; file >> name >> kib; file.ignore(256, '\n')) {
    if (name == "MemTotal:") total = kib << 10;
    if (name == "MemAvailable:") available = kib << 10;
  }
  DoctorRow row{.name = "memory", .found = ByteText(available) + " free of " + ByteText(total)};
  const std::string limit = FirstWordOf("/sys/fs/cgroup/memory.max");
  if (!limit.empty() && limit != "max") {
    const auto bytes = static_cast<int64_t>(std::strtoll(limit.c_str(), nullptr, 10));
    const std::string used = FirstWordOf("/sys/fs/cgroup/memory.current");
    available =
        std::min(available, bytes - static_cast<int64_t>(std::strtoll(used.c_str(), nullptr, 10)));
    row.found += ", the container's limit is " + ByteText(bytes);
  }
  if (available < (int64_t{2} << 30)) {
    row.health = Health::kWarning;
    row.remedy = "close other programs, or see what a run needs with `sala plan CONFIG`";
  }
  return row;
}

DoctorRow CheckMpi() {
  DoctorRow row{.name = "MPI", .found = parallel::MpiLibraryVersion()};
  if (!parallel::BuiltWithMpi()) {
    row.health = Health::kInfo;
    row.remedy = "built without MPI: one rank only; install libopenmpi-dev and build again";
    return row;
  }
  if (parallel::LaunchedByMpi()) {
    row.health = Health::kInfo;
    row.found += "; this process has a launcher, so launching was not tried";
    return row;
  }
  const std::string mpirun = FindInPath("mpirun");
  if (mpirun.empty()) {
    row.health = Health::kFails;
    row.found += "; mpirun was not found in PATH";
    row.remedy = "install openmpi-bin (of the version the program was built with)";
    return row;
  }
  const auto program = OwnProgram();
  const ProbeFile output("/tmp");
  constexpr double kPatience = 30;  // a network interface that answers nobody makes mpirun wait
  const double start = ClockSeconds();
  const auto too_long = [start] { return ClockSeconds() - start > kPatience; };
  const auto code = !program.ok()
                        ? StatusOr<int>(program.status())
                        : RunChild({.words = {mpirun, "-np", "2", *program, "doctor", "--as-rank"},
                                    .output = output.path(),
                                    .stop_when = ""},
                                   too_long);
  const auto text = ReadFile(output.path());
  if (code.ok() && *code == 0 && text.ok() && text->find(kRankSays) != std::string::npos) {
    row.found += "; mpirun -np 2 works";
    return row;
  }
  row.health = Health::kFails;
  if (too_long()) {
    row.found += Format("; mpirun -np 2 did not end in %.0f s", kPatience);
    row.remedy =
        "Open MPI may wait for a network interface: name one that works, as with "
        "OMPI_MCA_btl_tcp_if_include=lo on one machine";
    row.health = Health::kFails;
    return row;
  }
  row.found += "; mpirun -np 2 ends with " +
               (code.ok() ? "exit code " + std::to_string(*code) + ": " + LastLines(output.path())
                          : MessageOf(code.status()));
  row.remedy = geteuid() == 0
                   ? "as root: export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; "
                     "with fewer than two cores also OMPI_MCA_rmaps_base_oversubscribe=1"
                   : "with fewer than two cores: export OMPI_MCA_rmaps_base_oversubscribe=1; else "
                     "see mpirun's words";
  return row;
}

Status DoctorRank(int* argc, char*** argv) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<parallel::MpiSession> mpi,
                        parallel::MpiSession::Start(argc, argv));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<parallel::Communicator> world, mpi->World());
  std::array<double, 1> sum = {1.0};
  SALA_RETURN_IF_ERROR(world->AllReduce(sum, parallel::Reduce::kSum));
  if (mpi->size() == 2 && sum[0] == 2.0) {
    if (mpi->rank() == 0) std::printf("%s\n", kRankSays);
    return OkStatus();
  }
  return MakeError(ExitCode::kDevice, "COMM-FAILED",
                   "a sum over the ranks is " + std::to_string(sum[0]) + " for " +
                       std::to_string(mpi->size()) + " ranks, expected 2 for 2");
}

DoctorRow CheckHdf5(const std::string& directory) {
  const std::string version = Hdf5LibraryVersion();
  const ProbeFile probe(directory);
  const std::vector<uint32_t> values = {1, 2, 3};
  const auto write = [&]() -> Status {
    SALA_ASSIGN_OR_RETURN(Hdf5Writer file, Hdf5Writer::Create(probe.path()));
    SALA_RETURN_IF_ERROR(file.WriteDataset("/probe", Hdf5Type::kU32, {3}, values.data()));
    SALA_RETURN_IF_ERROR(file.Close());
    return OkStatus();
  };
  const Status status = write();
  if (!status.ok()) return Unwritable("HDF5", directory, version + ": " + MessageOf(status));
  return {.name = "HDF5", .found = version + "; a file was written"};
}

DoctorRow CheckDisk(const std::string& directory) {
  struct statfs info {};
  if (statfs(directory.c_str(), &info) != 0)
    return Unwritable("disk", directory, std::strerror(errno));
  const auto free = FreeBytes(directory);
  if (!free.ok()) return Unwritable("disk", directory, MessageOf(free.status()));
  DoctorRow row{
      .name = "disk",
      .found = directory + ": " + FileSystemName(info.f_type) + ", " + ByteText(*free) + " free"};
  constexpr int64_t kProbeBytes = 128 * kMiB;
  if (*free < 4 * kProbeBytes) {
    row.health = Health::kWarning;
    row.remedy =
        "too little space for a checkpoint of anything; remove files or name another "
        "directory with --dir";
    return row;
  }
  const ProbeFile probe(directory);
  const auto rates = MeasureDisk(probe.path(), kProbeBytes);
  if (!rates.ok()) return Unwritable("disk", directory, MessageOf(rates.status()));
  row.found += Format(", writes %.0f MB/s with fsync, reads %.0f MB/s", rates->write / 1e6,
                      rates->read / 1e6);
  if (FileSystemName(info.f_type) == "tmpfs") {
    row.health = Health::kWarning;
    row.remedy = "this is memory: checkpoints here are gone after a restart";
  } else if (*free < (int64_t{10} << 30)) {
    row.health = Health::kWarning;
    row.remedy = "a checkpoint takes 12 bytes a parameter, and keep_last + 1 of them stand here";
  } else if (rates->write < 50e6) {
    row.health = Health::kWarning;
    row.remedy = "saves wait for this disk: save less often (checkpoint.every_steps) or elsewhere";
  }
  return row;
}

DoctorRow CheckClock(const std::string& directory) {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S UTC", &utc);
  DoctorRow row{.name = "clock", .found = text.data()};
  // A file server stamps files by its own clock.
  const ProbeFile probe(directory);
  struct stat info {};
  const int fd = open(probe.path().c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (fd >= 0 && fstat(fd, &info) == 0) {
    const auto ahead = static_cast<int64_t>(info.st_mtime) - static_cast<int64_t>(now);
    if (std::llabs(ahead) > 2) {
      row.health = Health::kWarning;
      row.found +=
          ", the file system of " + directory + " is " + std::to_string(ahead) + " s ahead";
      row.remedy = "set both clocks by NTP; times in logs and files will not fit until then";
    }
  }
  if (fd >= 0) close(fd);
  struct timex state {};
  if (row.health == Health::kOk && adjtimex(&state) == TIME_ERROR) {
    row.health = Health::kInfo;
    row.found += ", not kept by NTP";
    row.remedy = "with several hosts let NTP keep their clocks, or their logs cannot be compared";
  }
  return row;
}

DoctorRow CheckFiles() {
  struct rlimit limit {};
  getrlimit(RLIMIT_NOFILE, &limit);
  DoctorRow row{.name = "files",
                .found = limit.rlim_cur == RLIM_INFINITY
                             ? "any number may be open"
                             : std::to_string(limit.rlim_cur) + " may be open"};
  // Token stores are mapped one file each, and a launcher holds some for each rank.
  if (limit.rlim_cur < 1024) {
    row.health = Health::kWarning;
    row.remedy = "ulimit -n 4096 before starting: token stores and mpirun hold many files";
  }
  return row;
}

std::vector<DoctorRow> CheckCuda(bool needed) {
  const Health absent = needed ? Health::kFails : Health::kInfo;
  const auto module = LoadCudaModule();
  if (!module.ok())
    return {{.name = "CUDA",
             .health = absent,
             .found = MessageOf(module.status()),
             .remedy = "for a GPU: install nvcc, cuBLASLt and NCCL, configure again and build the "
                       "target sala_cuda beside this program; or name a module in "
                       "SALA_CUDA_MODULE"}};
  std::vector<DoctorRow> rows = {{.name = "CUDA",
                                  .found = "module " + CudaModulePath() + ", " + (*module)->build +
                                           "; " + (*module)->libraries()}};
  std::string why;
  const int devices = (*module)->device_count(&why);
  if (devices == 0) {
    rows.push_back({.name = "GPU",
                    .health = absent,
                    .found = "none: " + why,
                    .remedy = needed ? "the driver's tool (nvidia-smi) must show a device; in a "
                                       "container the device must be passed in"
                                     : ""});
  }
  for (int i = 0; i < devices; ++i) {
    const auto opened = OpenCudaDevice({.index = i, .host = parallel::HostName()});
    DoctorRow row{.name = "GPU", .found = std::to_string(i) + ": "};
    if (!opened.ok()) {
      row.health = Health::kFails;
      row.found += MessageOf(opened.status());
      row.remedy = "another program may hold it; see nvidia-smi";
      rows.push_back(row);
      continue;
    }
    const DeviceInfo& info = (*opened)->info();
    row.found +=
        info.name + ", compute capability " + std::to_string(info.compute_capability / 10) + "." +
        std::to_string(info.compute_capability % 10) + ", " + std::to_string(info.multiprocessors) +
        " multiprocessors, " + ByteText(static_cast<int64_t>(info.memory_bytes)) + " (" +
        ByteText(static_cast<int64_t>((*opened)->free_bytes())) + " free), driver " +
        VersionText(info.driver_version) + ", runtime " + VersionText(info.runtime_version) +
        (info.emulated ? "; emulated on the CPU" : "");
    rows.push_back(row);
  }
  return rows;
}

}  // namespace sala::launch
