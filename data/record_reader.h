// The raw records of one input file, in order, with their place in it.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>

#include "core/status.h"
#include "data/ingest.h"

namespace sala::data {

struct RawRecord {
  std::string bytes;
  int64_t line = 1;    // where it starts, from 1
  int64_t offset = 0;  // byte in the file
};

enum class InputFormat { kText, kJsonLines };

// By the file's name; ING-FORMAT (65) for another one.
StatusOr<InputFormat> FormatOf(const std::string& path);

// A mark of the byte order at the start of a file is dropped.
class RecordReader {
 public:
  // `split` and `separator` are for text.
  static StatusOr<RecordReader> Open(const std::string& path, InputFormat format, TextSplit split,
                                     const std::string& separator);
  // False at the end; FILE-READ (74) when reading breaks off.
  StatusOr<bool> Next(RawRecord* record);

 private:
  RecordReader() = default;
  bool ReadLine(std::string* line);  // without its newline
  StatusOr<bool> NextWhole(RawRecord* record);
  bool NextLine(RawRecord* record);
  bool NextPart(RawRecord* record);
  bool IsBoundary(const std::string& line) const;

  std::string path_;
  InputFormat format_ = InputFormat::kText;
  TextSplit split_ = TextSplit::kWholeFile;
  std::string separator_;
  std::ifstream stream_;
  int64_t line_ = 0;         // of the line last read
  int64_t offset_ = 0;       // behind it
  int64_t line_offset_ = 0;  // of its start
  bool ended_ = false;
};

}  // namespace sala::data
