#include "core/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <ctime>
#include <sstream>
#include <system_error>
#include <utility>

#include "core/file.h"
#include "core/log.h"

namespace sala {
namespace {

std::string HostName() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "unknown";
}

std::string NowText() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text.data();
}

Status LockError(const std::string& path, const std::string& action) {
  return MakeError(ExitCode::kIo, "FILE-WRITE",
                   path + ": cannot " + action + ": " + std::generic_category().message(errno));
}

struct Holder {
  std::string host;
  int64_t pid = 0;
  std::string since;
  std::string Text() const {
    return "process " + std::to_string(pid) + " on " + Printable(host) + " since " +
           Printable(since);
  }
};

// What the file says; pid 0 when it says nothing.
Holder ReadHolder(int fd) {
  std::array<char, 512> text{};
  const ssize_t n = ::pread(fd, text.data(), text.size() - 1, 0);
  Holder holder;
  std::istringstream in(std::string(text.data(), n > 0 ? static_cast<size_t>(n) : 0));
  std::string word;
  if (!(in >> word >> holder.host >> word >> holder.pid >> word >> holder.since)) return {};
  return holder;
}

Status WriteHolder(int fd, const std::string& path) {
  const std::string text = "host " + HostName() + "\npid " + std::to_string(::getpid()) +
                           "\nstarted " + NowText() + "\n";
  if (::ftruncate(fd, 0) != 0 ||
      ::pwrite(fd, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size()) ||
      ::fsync(fd) != 0) {
    return LockError(path, "write");
  }
  return OkStatus();
}

// Whether the open file is still the one at `path`: its last holder may have removed it while we
// waited for the lock.
bool IsStillAt(int fd, const std::string& path) {
  struct stat ours {};
  struct stat there {};
  return ::fstat(fd, &ours) == 0 && ::stat(path.c_str(), &there) == 0 &&
         ours.st_ino == there.st_ino && ours.st_dev == there.st_dev;
}

// Who only looks whether a run lives (GoneRun) holds the lock for an instant.
bool TakeLock(int fd) {
  constexpr int kTries = 10;
  constexpr useconds_t kMicroseconds = 10000;
  for (int tries = 0; ::flock(fd, LOCK_EX | LOCK_NB) != 0; ++tries) {
    if (errno != EWOULDBLOCK || tries == kTries) return false;
    ::usleep(kMicroseconds);
  }
  return true;
}

}  // namespace

StatusOr<RunLock> RunLock::Acquire(const std::string& directory) {
  const std::string path = directory + "/RUN.lock";
  while (true) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return LockError(path, "open");
    RunLock lock("", fd);  // closes on every way out; removes nothing as long as the path is empty
    if (!TakeLock(fd)) {
      if (errno != EWOULDBLOCK) return LockError(path, "lock");
      return MakeError(ExitCode::kIo, "RUN-LOCKED",
                       path + ": another run is live here: " + ReadHolder(fd).Text() +
                           "; stop it first or use another run directory");
    }
    if (!IsStillAt(fd, path)) continue;
    const Holder holder = ReadHolder(fd);
    if (holder.pid > 0 && holder.host != HostName()) {
      return MakeError(ExitCode::kIo, "RUN-LOCKED",
                       path + ": held by " + holder.Text() + ", which cannot be checked from " +
                           HostName() + "; if that process is gone, remove the file");
    }
    if (holder.pid > 0)
      SALA_LOG(Warn) << path << ": stale lock of " << holder.Text() << " taken over";
    SALA_RETURN_IF_ERROR(WriteHolder(fd, path));
    lock.path_ = path;
    return lock;
  }
}

RunLock::RunLock(RunLock&& other) noexcept
    : path_(std::exchange(other.path_, std::string())), fd_(std::exchange(other.fd_, -1)) {}

RunLock& RunLock::operator=(RunLock&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  return *this;
}

RunLock::~RunLock() {
  // Removed while still locked, so that nobody can take a lock on a file that is about to go.
  if (!path_.empty()) ::unlink(path_.c_str());
  if (fd_ >= 0) ::close(fd_);
}

std::string GoneRun(const std::string& directory) {
  const int fd = ::open((directory + "/RUN.lock").c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? "no process holds RUN.lock" : "";
  const Holder holder = ReadHolder(fd);
  const bool here = holder.pid > 0 && holder.host == HostName();
  const bool gone = here && ::flock(fd, LOCK_SH | LOCK_NB) == 0;
  ::close(fd);  // and with it the lock
  return gone ? holder.Text() + " is gone" : "";
}

}  // namespace sala
