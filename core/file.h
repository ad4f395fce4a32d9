// Files: whole reads, durable atomic writes, read-only maps. Errors carry path and errno text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace sala {

// Errors: FILE-MISSING (66) when it does not exist, FILE-READ (74) otherwise.
StatusOr<std::string> ReadFile(const std::string& path);
StatusOr<int64_t> FileSize(const std::string& path);
bool PathExists(const std::string& path);
bool IsDirectory(const std::string& path);
StatusOr<std::vector<std::string>> ListDirectory(const std::string& path);  // names, sorted
Status MakeDirectories(const std::string& path);

// Writes path.tmp, fsyncs, renames over path, fsyncs the directory: readers see the old file or the
// new one. FILE-WRITE (74).
Status WriteFileAtomically(const std::string& path, std::string_view bytes);
Status FsyncFile(const std::string& path);
Status FsyncDirectory(const std::string& path);
Status RenamePath(const std::string& from, const std::string& to);
// The two change names atomically (Linux renameat2).
Status ExchangePaths(const std::string& a, const std::string& b);
Status RemoveTree(const std::string& path);
StatusOr<int64_t> FreeBytes(const std::string& path);  // on the file system that holds path

// Bytes [offset, offset + bytes) of a file, whole or an error.
Status ReadAt(const std::string& path, int64_t offset, void* data, size_t bytes);

// A file mapped read-only.
class MappedFile {
 public:
  static StatusOr<MappedFile> Open(const std::string& path);
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  const char* data() const { return static_cast<const char*>(data_); }
  size_t size() const { return size_; }
  // Takes the pages of [begin, begin + bytes) out of the process's resident memory, where a mapping
  // otherwise keeps all that was ever read; what is read again comes from the system's cache.
  void Forget(size_t begin, size_t bytes) const;

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// For messages: control characters escaped, at most 200 characters.
std::string Printable(std::string_view text);

}  // namespace sala
