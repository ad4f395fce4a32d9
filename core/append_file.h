// A file that grows by records, each of which is whole or not there. Where a record does not fit (a
// disk that is full, a quota) the file is cut back to the last whole one, so that what is appended
// when there is room again can be read. One writer.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/status.h"

namespace sala {

class AppendFile {
 public:
  enum class At : uint8_t {
    kNew,  // the file must not be there
    kEnd   // of what is there
  };
  // FILE-WRITE (74).
  static StatusOr<AppendFile> Open(const std::string& path, At at);
  AppendFile() = default;
  AppendFile(AppendFile&& other) noexcept;
  AppendFile& operator=(AppendFile&& other) noexcept;
  ~AppendFile();
  bool is_open() const { return fd_ >= 0; }

  // The last byte, 0 of an empty file and of what has no place (a pipe).
  char last() const;
  // A reader sees it at once. FILE-WRITE (74): nothing of it is there.
  Status Append(std::string_view record);

 private:
  std::string path_;
  int fd_ = -1;
  int64_t torn_at_ = -1;  // where the last whole record ends, when cutting back failed; else -1
};

}  // namespace sala
