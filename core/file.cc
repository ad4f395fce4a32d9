#include "core/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>

#include "core/utf8.h"

namespace sala {
namespace {

std::string ErrorText(int error) { return std::generic_category().message(error); }

Status ReadError(const std::string& path, int error, const std::string& action) {
  const std::string text = Printable(path) + ": cannot " + action + ": " + ErrorText(error);
  if (error == ENOENT) return MakeError(ExitCode::kNoInput, "FILE-MISSING", text);
  return MakeError(ExitCode::kIo, "FILE-READ", text);
}

Status WriteError(const std::string& path, int error, const std::string& action) {
  return MakeError(ExitCode::kIo, "FILE-WRITE",
                   Printable(path) + ": cannot " + action + ": " + ErrorText(error));
}

class Descriptor {
 public:
  Descriptor(const std::string& path, int flags, mode_t mode = 0)
      : fd_(::open(path.c_str(), flags | O_CLOEXEC, mode)), error_(fd_ < 0 ? errno : 0) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  bool ok() const { return fd_ >= 0; }
  int error() const { return error_; }  // of the failed open
  int get() const { return fd_; }
  int Close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
  int error_;
};

// Reads until `bytes` or the end of the file. Returns the count, or -1 with errno set.
int64_t ReadUpTo(int fd, int64_t offset, char* data, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = ::pread(fd, data + done, bytes - done,
                              static_cast<off_t>(offset) + static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -1;
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return static_cast<int64_t>(done);
}

std::string DirectoryOf(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

Status WriteAll(const std::string& path, std::string_view bytes) {
  Descriptor file(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (!file.ok()) return WriteError(path, file.error(), "create");
  while (!bytes.empty()) {
    const ssize_t n = ::write(file.get(), bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return WriteError(path, errno, "write");
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  if (::fsync(file.get()) != 0) return WriteError(path, errno, "fsync");
  if (file.Close() != 0) return WriteError(path, errno, "close");
  return OkStatus();
}

Status Fsync(const std::string& path, int flags) {
  const Descriptor file(path, O_RDONLY | flags);
  if (!file.ok()) return WriteError(path, file.error(), "open for fsync");
  if (::fsync(file.get()) != 0) return WriteError(path, errno, "fsync");
  return OkStatus();
}

// Size of an open regular file.
StatusOr<int64_t> RegularSize(const Descriptor& file, const std::string& path) {
  if (!file.ok()) return ReadError(path, file.error(), "open");
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return ReadError(path, errno, "stat");
  if (S_ISDIR(info.st_mode)) return ReadError(path, EISDIR, "read");
  return static_cast<int64_t>(info.st_size);
}

}  // namespace

StatusOr<std::string> ReadFile(const std::string& path) {
  const Descriptor file(path, O_RDONLY);
  SALA_ASSIGN_OR_RETURN(const int64_t size, RegularSize(file, path));
  std::string bytes(static_cast<size_t>(size), '\0');
  int64_t done = ReadUpTo(file.get(), 0, bytes.data(), bytes.size());
  if (done < 0) return ReadError(path, errno, "read");
  bytes.resize(static_cast<size_t>(done));
  // Pipes and files of /proc have no size; read on until the end.
  constexpr size_t kPiece = size_t{1} << 16;
  while (true) {
    bytes.resize(static_cast<size_t>(done) + kPiece);
    const ssize_t n = size > 0 ? ReadUpTo(file.get(), done, bytes.data() + done, kPiece)
                               : ::read(file.get(), bytes.data() + done, kPiece);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ReadError(path, errno, "read");
    done += n;
    if (n == 0) break;
  }
  bytes.resize(static_cast<size_t>(done));
  return bytes;
}

StatusOr<int64_t> FileSize(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return ReadError(path, errno, "stat");
  if (S_ISDIR(info.st_mode)) return ReadError(path, EISDIR, "take the size of");
  return static_cast<int64_t>(info.st_size);
}

bool PathExists(const std::string& path) {
  struct stat info {};
  return ::lstat(path.c_str(), &info) == 0;
}

bool IsDirectory(const std::string& path) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

StatusOr<std::vector<std::string>> ListDirectory(const std::string& path) {
  std::error_code error;
  std::vector<std::string> names;
  std::filesystem::directory_iterator at(path, error);
  for (; !error && at != std::filesystem::directory_iterator(); at.increment(error)) {
    names.push_back(at->path().filename().string());
  }
  if (error) return ReadError(path, error.value(), "list");
  std::sort(names.begin(), names.end());
  return names;
}

Status MakeDirectories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return WriteError(path, error.value(), "make the directory");
  return OkStatus();
}

Status WriteFileAtomically(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp";
  Status status = WriteAll(temporary, bytes);
  if (status.ok()) status = RenamePath(temporary, path);
  if (!status.ok()) {
    ::unlink(temporary.c_str());  // the first error is the one to report
    return status;
  }
  return FsyncDirectory(DirectoryOf(path));
}

Status FsyncFile(const std::string& path) { return Fsync(path, 0); }

Status FsyncDirectory(const std::string& path) { return Fsync(path, O_DIRECTORY); }

Status ExchangePaths(const std::string& a, const std::string& b) {
  if (::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) != 0)
    return WriteError(a, errno, "exchange with " + b);
  return OkStatus();
}

Status RenamePath(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) return WriteError(from, errno, "rename to " + to);
  return OkStatus();
}

Status RemoveTree(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) return WriteError(path, error.value(), "remove");
  return OkStatus();
}

StatusOr<int64_t> FreeBytes(const std::string& path) {
  struct statvfs info {};
  if (::statvfs(path.c_str(), &info) != 0) return ReadError(path, errno, "ask for free space on");
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

Status ReadAt(const std::string& path, int64_t offset, void* data, size_t bytes) {
  const Descriptor file(path, O_RDONLY);
  if (!file.ok()) return ReadError(path, file.error(), "open");
  const int64_t done = ReadUpTo(file.get(), offset, static_cast<char*>(data), bytes);
  if (done < 0) return ReadError(path, errno, "read");
  if (static_cast<size_t>(done) != bytes) {
    return MakeError(ExitCode::kIo, "FILE-READ",
                     Printable(path) + ": file ends early: asked for " + std::to_string(bytes) +
                         " bytes at offset " + std::to_string(offset) + ", got " +
                         std::to_string(done) + "; it was cut, restore it");
  }
  return OkStatus();
}

StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  const Descriptor file(path, O_RDONLY);
  SALA_ASSIGN_OR_RETURN(const int64_t size, RegularSize(file, path));
  MappedFile mapped;
  if (size == 0) return mapped;  // nothing to map
  void* data = ::mmap(nullptr, static_cast<size_t>(size), PROT_READ, MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) return ReadError(path, errno, "map");
  mapped.data_ = data;
  mapped.size_ = static_cast<size_t>(size);
  return mapped;
}

void MappedFile::Forget(size_t begin, size_t bytes) const {
  static const auto kPage = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t first = begin / kPage * kPage;
  // Advice: where the system does not take it, the pages stay.
  if (bytes > 0) ::madvise(static_cast<char*>(data_) + first, begin + bytes - first, MADV_DONTNEED);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

std::string Printable(std::string_view text) {
  constexpr size_t kLimit = 200;
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (size_t at = 0; at < text.size();) {
    std::string piece;
    size_t length = Utf8SequenceLength(text, at);
    const auto byte = static_cast<uint8_t>(text[at]);
    // U+0080..U+009F are control characters that some terminals obey; in UTF-8 they are C2 80..9F.
    const bool control = byte < 0x20 || byte == 0x7F ||
                         (byte == 0xC2 && length == 2 && static_cast<uint8_t>(text[at + 1]) < 0xA0);
    if (length > 0 && !control) {
      piece = std::string(text.substr(at, length));
    } else {
      length = 1;
      piece = byte == '\n'   ? "\\n"
              : byte == '\t' ? "\\t"
                             : std::string("\\x") + kDigits[byte >> 4] + kDigits[byte & 15];
    }
    if (out.size() + piece.size() > kLimit - 3) return out + "...";
    out += piece;
    at += length;
  }
  return out;
}

}  // namespace sala
