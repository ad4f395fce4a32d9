#include "core/append_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace sala {
namespace {

Status AppendError(const std::string& path, const std::string& action, int error) {
  return MakeError(ExitCode::kIo, "FILE-WRITE",
                   path + ": cannot " + action + ": " + std::generic_category().message(error));
}

}  // namespace

StatusOr<AppendFile> AppendFile::Open(const std::string& path, At at) {
  AppendFile file;
  file.path_ = path;
  const int flags = at == At::kNew ? O_EXCL : 0;
  file.fd_ = ::open(path.c_str(), O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | flags, 0666);
  if (file.fd_ < 0) return AppendError(path, "open", errno);
  return file;
}

AppendFile::AppendFile(AppendFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      torn_at_(std::exchange(other.torn_at_, -1)) {}

AppendFile& AppendFile::operator=(AppendFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(torn_at_, other.torn_at_);
  return *this;
}

AppendFile::~AppendFile() {
  if (fd_ >= 0) ::close(fd_);
}

char AppendFile::last() const {
  char byte = 0;
  const off_t end = ::lseek(fd_, 0, SEEK_END);
  return end > 0 && ::pread(fd_, &byte, 1, end - 1) == 1 ? byte : char{0};
}

Status AppendFile::Append(std::string_view record) {
  if (torn_at_ >= 0) {
    if (::ftruncate(fd_, torn_at_) != 0) return AppendError(path_, "cut back", errno);
    torn_at_ = -1;
  }
  const off_t end = ::lseek(fd_, 0, SEEK_END);  // -1 of a pipe, where nothing can be taken back
  for (std::string_view left = record; !left.empty();) {
    const ssize_t n = ::write(fd_, left.data(), left.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = errno;
      const bool torn = left.size() < record.size() && end >= 0;
      if (torn && ::ftruncate(fd_, end) != 0) torn_at_ = end;
      return AppendError(path_, "write", error);
    }
    left.remove_prefix(static_cast<size_t>(n));
  }
  return OkStatus();
}

}  // namespace sala
