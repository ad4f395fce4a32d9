// The bytes of an input file, taken out of its archive while they are read.
//
//   SALA_ASSIGN_OR_RETURN(auto source, OpenByteSource("web.jsonl.zst", Archive::kZstd));
//   SALA_ASSIGN_OR_RETURN(size_t n, source->Read(buffer, sizeof buffer));   // 0 at the end only
//
// gzip: several members, the CRC-32 and length of each checked. zstd: several frames, the checksum
// of each checked where it has one (`zstd` writes it, some libraries do not; without it nothing
// finds a flipped byte in the text). An archive that stops before its end is never taken for a
// whole one; one that was cut between two members or frames cannot be told from a shorter one.
//
// Errors, with file and the bytes read so far of the file and of its text: ING-TRUNCATED, ING-CRC,
// ING-FORMAT (65), FILE-READ (74), FILE-MISSING (66).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/status.h"

namespace sala::data {

enum class Archive { kNone, kGzip, kZstd };

// zstd refuses to need more memory than a window of 2^27 bytes unless asked to (`zstd --long=31`).
inline constexpr int kZstdWindowLog = 27;

class ByteSource {
 public:
  ByteSource() = default;
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;
  virtual ~ByteSource() = default;
  virtual StatusOr<size_t> Read(char* to, size_t room) = 0;
  virtual int64_t file_bytes_read() const = 0;  // of the file, not of its text
};

// `begin`: where in the text to start; in an archive the text before it is read and dropped.
StatusOr<std::unique_ptr<ByteSource>> OpenByteSource(const std::string& path, Archive archive,
                                                     int64_t begin = 0,
                                                     int zstd_window_log = kZstdWindowLog);

}  // namespace sala::data
