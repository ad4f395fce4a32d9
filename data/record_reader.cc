#include "data/record_reader.h"

#include "core/file.h"

namespace sala::data {
namespace {

constexpr char kByteOrderMark[] = "\xef\xbb\xbf";

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

StatusOr<InputFormat> FormatOf(const std::string& path) {
  if (EndsWith(path, ".txt")) return InputFormat::kText;
  if (EndsWith(path, ".jsonl") || EndsWith(path, ".ndjson")) return InputFormat::kJsonLines;
  return MakeError(
      ExitCode::kData, "ING-FORMAT",
      path +
          ": found a file of another kind, expected .txt, .jsonl or .ndjson; convert or rename it");
}

StatusOr<RecordReader> RecordReader::Open(const std::string& path, InputFormat format,
                                          TextSplit split, const std::string& separator) {
  RecordReader reader;
  reader.path_ = path;
  reader.format_ = format;
  reader.split_ = split;
  reader.separator_ = separator;
  reader.stream_.open(path, std::ios::binary);
  if (!reader.stream_) return MakeError(ExitCode::kIo, "FILE-READ", path + ": cannot be opened");
  return reader;
}

bool RecordReader::ReadLine(std::string* line) {
  if (!std::getline(stream_, *line)) return false;
  line_offset_ = offset_;
  offset_ += static_cast<int64_t>(line->size()) + (stream_.eof() ? 0 : 1);
  if (++line_ == 1 && line->rfind(kByteOrderMark, 0) == 0) {
    line->erase(0, 3);
    line_offset_ = 3;
  }
  return true;
}

StatusOr<bool> RecordReader::Next(RawRecord* record) {
  if (ended_) return false;
  bool found = false;
  if (format_ == InputFormat::kJsonLines) {
    found = NextLine(record);
  } else if (split_ == TextSplit::kWholeFile) {
    return NextWhole(record);
  } else {
    found = NextPart(record);
  }
  if (stream_.bad())
    return MakeError(ExitCode::kIo, "FILE-READ",
                     path_ + ": reading broke off at byte " + std::to_string(offset_));
  ended_ = !found;
  return found;
}

StatusOr<bool> RecordReader::NextWhole(RawRecord* record) {
  ended_ = true;
  SALA_ASSIGN_OR_RETURN(record->bytes, ReadFile(path_));
  const bool marked = record->bytes.rfind(kByteOrderMark, 0) == 0;
  if (marked) record->bytes.erase(0, 3);
  record->line = 1;
  record->offset = marked ? 3 : 0;
  return true;
}

// Lines of white space only are no records.
bool RecordReader::NextLine(RawRecord* record) {
  while (ReadLine(&record->bytes)) {
    if (record->bytes.find_first_not_of(" \t\r") == std::string::npos) continue;
    record->line = line_;
    record->offset = line_offset_;
    return true;
  }
  return false;
}

bool RecordReader::IsBoundary(const std::string& line) const {
  if (split_ == TextSplit::kBlankLines) return line.find_first_not_of(" \t\r") == std::string::npos;
  return line == separator_ || line == separator_ + "\r";
}

bool RecordReader::NextPart(RawRecord* record) {
  record->bytes.clear();
  bool started = false;
  std::string line;
  while (ReadLine(&line)) {
    if (IsBoundary(line)) {
      if (started) return true;
      continue;
    }
    if (!started) {
      record->line = line_;
      record->offset = line_offset_;
    } else {
      record->bytes += '\n';
    }
    started = true;
    record->bytes += line;
  }
  return started;
}

}  // namespace sala::data
