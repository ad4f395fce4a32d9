#include "data/record_reader.h"

#include <algorithm>
#include <cstring>

#include "core/file.h"

namespace sala::data {
namespace {

constexpr char kByteOrderMark[] = "\xef\xbb\xbf";
constexpr size_t kFirstCapacity = size_t{1} << 20;

bool EndsWith(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

bool IsBlank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

// A format that is not read, and how its data is got into one that is.
struct ForeignFormat {
  const char* ending;
  const char* name;
  const char* conversion;
};

constexpr ForeignFormat kForeignFormats[] = {
    {".parquet", "Parquet",
     "python3 -c \"import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], "
     "orient='records', lines=True, force_ascii=False)\" FILE.parquet FILE.jsonl.gz"},
    {".arrow", "Arrow",
     "python3 -c \"import datasets, sys; datasets.Dataset.from_file(sys.argv[1]).to_json("
     "sys.argv[2], force_ascii=False)\" FILE.arrow FILE.jsonl"},
    {".mds", "MosaicML MDS",
     "python3 -c \"import json, streaming, sys; [print(json.dumps(r)) for r in "
     "streaming.LocalDataset(sys.argv[1])]\" FOLDER > FILE.jsonl"},
    {".tar", "WebDataset (tar)",
     "mkdir FOLDER && tar -xf FILE.tar -C FOLDER, then --input FOLDER for the .txt files in it"}};

// Packings and endings of data that would be read otherwise.
constexpr ForeignFormat kForeignPackings[] = {
    {".xz", "an xz archive", "xz -dc FILE.xz | gzip > FILE.gz"},
    {".bz2", "a bzip2 archive", "bzip2 -dc FILE.bz2 | gzip > FILE.gz"},
    {".zip", "a zip archive", "unzip FILE.zip"},
    {".zstd", "another ending of zstd archives", "mv FILE.zstd FILE.zst"}};
constexpr ForeignFormat kCapitals = {"", "an ending in capitals",
                                     "mv FILE.JSONL FILE.jsonl, and so on"};

// The file's name without .gz, .zst and the like.
std::string_view WithoutArchive(std::string_view path) {
  for (const char* ending : {".gz", ".zst", ".zstd"}) {
    if (EndsWith(path, ending)) return path.substr(0, path.size() - std::strlen(ending));
  }
  return path;
}

// Not .json: in a directory it is as often a note.
bool IsDataName(std::string_view name) {
  return EndsWith(name, ".txt") || EndsWith(name, ".jsonl") || EndsWith(name, ".ndjson");
}

const ForeignFormat* ForeignFormatOf(std::string_view path) {
  std::string lower(path);
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  const std::string_view name = WithoutArchive(lower);
  for (const ForeignFormat& format : kForeignFormats) {
    if (EndsWith(name, format.ending)) return &format;
  }
  for (const ForeignFormat& packing : kForeignPackings) {
    const size_t ending = std::strlen(packing.ending);
    if (EndsWith(lower, packing.ending) &&
        IsDataName(std::string_view(lower).substr(0, lower.size() - ending)))
      return &packing;
  }
  return IsDataName(name) && !IsDataName(WithoutArchive(path)) ? &kCapitals : nullptr;
}

Status ForeignError(const std::string& path, const ForeignFormat& format) {
  return MakeError(
      ExitCode::kData, "ING-FORMAT",
      path + ": found " + format.name + ", which is not read; convert it: " + format.conversion);
}

}  // namespace

bool IsForeignFormat(const std::string& path) { return ForeignFormatOf(path) != nullptr; }

StatusOr<FileKind> KindOfFile(const std::string& path) {
  if (const ForeignFormat* foreign = ForeignFormatOf(path); foreign != nullptr)
    return ForeignError(path, *foreign);
  FileKind kind;
  std::string_view name = path;
  if (EndsWith(name, ".gz")) {
    kind.archive = Archive::kGzip;
    name.remove_suffix(3);
  } else if (EndsWith(name, ".zst")) {
    kind.archive = Archive::kZstd;
    name.remove_suffix(4);
  }
  if (EndsWith(name, ".txt")) {
    kind.format = InputFormat::kText;
  } else if (EndsWith(name, ".jsonl") || EndsWith(name, ".ndjson")) {
    kind.format = InputFormat::kJsonLines;
  } else if (EndsWith(name, ".json")) {
    kind.format = InputFormat::kJsonArray;
  } else {
    return MakeError(ExitCode::kData, "ING-FORMAT",
                     path +
                         ": found a file of another kind, expected .txt, .jsonl, .ndjson or .json, "
                         "also with .gz or .zst; convert or rename it");
  }
  return kind;
}

TextBuffer::TextBuffer(std::unique_ptr<ByteSource> source, std::string path, int64_t offset,
                       size_t longest)
    : source_(std::move(source)),
      path_(std::move(path)),
      buffer_(new char[kFirstCapacity + kRecordPadding]),
      longest_(longest),
      capacity_(kFirstCapacity),
      base_(offset) {
  std::memset(buffer_.get() + capacity_, 0, kRecordPadding);
}

StatusOr<bool> TextBuffer::Fill() {
  if (ended_) return false;
  if (end_ == capacity_ && begin_ > 0) {
    std::memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
    base_ += static_cast<int64_t>(begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  if (end_ == capacity_) {
    if (capacity_ >= longest_) {
      return MakeError(ExitCode::kData, "ING-LONG",
                       path_ + ": the record at byte " + std::to_string(offset()) +
                           " is longer than " + std::to_string(longest_ >> 20) +
                           " MiB; cut it into several");
    }
    const size_t larger = std::min(capacity_ * 2, longest_);
    std::unique_ptr<char[]> buffer(new char[larger + kRecordPadding]);
    if (end_ > 0) std::memcpy(buffer.get(), buffer_.get(), end_);
    std::memset(buffer.get() + larger, 0, kRecordPadding);
    buffer_ = std::move(buffer);
    capacity_ = larger;
  }
  SALA_ASSIGN_OR_RETURN(const size_t n, source_->Read(buffer_.get() + end_, capacity_ - end_));
  // The parser may look at the bytes behind a record, so they have to be something.
  std::memset(buffer_.get() + end_ + n, 0, kRecordPadding);
  end_ += n;
  ended_ = n == 0;
  return n > 0;
}

StatusOr<bool> TextBuffer::ReadLine(std::string_view* line) {
  size_t searched = 0;
  while (true) {
    const char* from = buffer_.get() + begin_;
    const void* newline = std::memchr(from + searched, '\n', end_ - begin_ - searched);
    if (newline != nullptr) {
      const auto length = static_cast<size_t>(static_cast<const char*>(newline) - from);
      *line = {from, length};
      begin_ += length + 1;
      return true;
    }
    searched = end_ - begin_;
    SALA_ASSIGN_OR_RETURN(const bool more, Fill());
    if (more) continue;
    if (searched == 0) return false;
    *line = {buffer_.get() + begin_, searched};
    begin_ = end_;
    return true;
  }
}

StatusOr<int> TextBuffer::Peek(size_t ahead) {
  while (begin_ + ahead >= end_) {
    SALA_ASSIGN_OR_RETURN(const bool more, Fill());
    if (!more) return -1;
  }
  return static_cast<unsigned char>(buffer_[begin_ + ahead]);
}

StatusOr<RecordReader> RecordReader::Open(const ReadOptions& options) {
  RecordReader reader;
  reader.options_ = options;
  // The byte before tells whether a line starts at `begin`.
  const int64_t from = options.begin - (options.at_record ? 0 : 1);
  SALA_ASSIGN_OR_RETURN(auto source, OpenByteSource(options.path, options.kind.archive, from,
                                                    options.zstd_window_log));
  reader.text_ =
      std::make_unique<TextBuffer>(std::move(source), options.path, from, options.longest_record);
  SALA_RETURN_IF_ERROR(reader.Start());
  return reader;
}

Status RecordReader::Start() {
  lines_ = options_.lines_before;
  in_array_ = options_.begin > 0;
  if (!options_.at_record) {
    std::string_view rest;
    return text_->ReadLine(&rest).status();
  }
  if (options_.begin > 0) return OkStatus();
  for (size_t i = 0; i < 3; ++i) {
    SALA_ASSIGN_OR_RETURN(const int byte, text_->Peek(i));
    if (byte != static_cast<unsigned char>(kByteOrderMark[i])) return OkStatus();
  }
  text_->Advance(3);
  // The line behind the mark is that of the range with byte 0, also where that ends in the mark.
  if (options_.end >= 0) options_.end = std::max<int64_t>(options_.end, 4);
  return OkStatus();
}

StatusOr<bool> RecordReader::ReadLine(std::string_view* line) {
  const int64_t at = text_->offset();
  SALA_ASSIGN_OR_RETURN(const bool found, text_->ReadLine(line));
  if (!found) return false;
  line_offset_ = at;
  ++lines_;
  return true;
}

StatusOr<bool> RecordReader::Next(RawRecord* record) {
  if (ended_) return false;
  StatusOr<bool> found = false;
  if (options_.kind.format == InputFormat::kJsonLines) {
    found = NextLine(record);
  } else if (options_.kind.format == InputFormat::kJsonArray) {
    found = NextElement(record);
  } else if (options_.split == TextSplit::kLines) {
    found = NextLine(record);
  } else if (options_.split == TextSplit::kWholeFile) {
    found = NextWhole(record);
  } else {
    found = NextPart(record);
  }
  if (found.ok() && !*found) ended_ = true;
  return found;
}

StatusOr<bool> RecordReader::NextWhole(RawRecord* record) {
  if (options_.begin > 0 || lines_ > options_.lines_before) return false;
  lines_ = options_.lines_before + 1;
  record->line = lines_;
  record->offset = text_->offset();
  joined_.clear();
  std::string_view line;
  while (true) {
    // Whether the last line has its newline shows in how far the place moved.
    const int64_t before = text_->offset();
    SALA_ASSIGN_OR_RETURN(const bool more, text_->ReadLine(&line));
    if (!more) break;
    joined_ += line;
    if (text_->offset() - before > static_cast<int64_t>(line.size())) joined_ += '\n';
  }
  record->bytes = joined_;
  return true;
}

// Lines of white space only are no records of JSON.
StatusOr<bool> RecordReader::NextLine(RawRecord* record) {
  while (options_.end < 0 || text_->offset() < options_.end) {
    SALA_ASSIGN_OR_RETURN(const bool more, ReadLine(&record->bytes));
    if (!more) return false;
    if (options_.kind.format == InputFormat::kJsonLines && IsBlank(record->bytes)) continue;
    record->line = lines_;
    record->offset = line_offset_;
    return true;
  }
  return false;
}

bool RecordReader::IsBoundary(std::string_view line) const {
  if (options_.split == TextSplit::kBlankLines) return IsBlank(line);
  return line == options_.separator || line == options_.separator + "\r";
}

StatusOr<bool> RecordReader::NextPart(RawRecord* record) {
  joined_.clear();
  bool started = false;
  std::string_view line;
  while (true) {
    SALA_ASSIGN_OR_RETURN(const bool more, ReadLine(&line));
    if (!more) break;
    if (IsBoundary(line)) {
      if (started) break;
      continue;
    }
    if (!started) {
      record->line = lines_;
      record->offset = line_offset_;
    } else {
      joined_ += '\n';
    }
    started = true;
    joined_ += line;
  }
  record->bytes = joined_;
  return started;
}

Status RecordReader::ArrayError(const std::string& text) const {
  return MakeError(ExitCode::kData, "ING-JSON",
                   options_.path + ":" + std::to_string(lines_ + 1) + " (byte " +
                       std::to_string(text_->offset()) + "): " + text);
}

StatusOr<int> RecordReader::SkipSpace() {
  while (true) {
    SALA_ASSIGN_OR_RETURN(const int byte, text_->Peek(0));
    if (byte != ' ' && byte != '\t' && byte != '\r' && byte != '\n') return byte;
    lines_ += byte == '\n' ? 1 : 0;
    text_->Advance(1);
  }
}

// Bytes of the element that starts at the place: to the end of its brackets, or, of an element
// without, to the comma or bracket behind it.
StatusOr<size_t> RecordReader::ElementBytes() {
  int64_t depth = 0;
  bool in_string = false;
  std::string_view there;
  for (size_t n = 0;; ++n) {
    if (n >= there.size()) {
      SALA_ASSIGN_OR_RETURN(const int next, text_->Peek(n));
      if (next < 0)
        return ArrayError("the file ends inside the element that starts here; copy it again");
      there = text_->Unread();
    }
    const char byte = there[n];
    if (in_string) {
      if (byte == '\\') ++n;
      in_string = byte != '"';
    } else if (byte == '"') {
      in_string = true;
    } else if (byte == '{' || byte == '[') {
      ++depth;
    } else if ((byte == '}' || byte == ']') && depth > 0) {
      if (--depth == 0) return n + 1;
    } else if (depth == 0 && (byte == ',' || byte == ']')) {
      return n;
    }
  }
}

StatusOr<bool> RecordReader::NextElement(RawRecord* record) {
  SALA_ASSIGN_OR_RETURN(int byte, SkipSpace());
  if (!in_array_) {
    if (byte != '[') {
      return MakeError(ExitCode::kData, "ING-FORMAT",
                       options_.path +
                           ": found no JSON array, expected [record, record, ...]; a file of one "
                           "record a line is named .jsonl" +
                           (EndsWith(options_.path, "index.json")
                                ? std::string(", the index of MosaicML MDS shards is not read: ") +
                                      kForeignFormats[2].conversion
                                : ""));
    }
    text_->Advance(1);
    SALA_ASSIGN_OR_RETURN(byte, SkipSpace());
  }
  const bool first = !in_array_;
  in_array_ = true;
  if (byte == ']') {
    text_->Advance(1);
    SALA_ASSIGN_OR_RETURN(byte, SkipSpace());
    if (byte >= 0) return ArrayError("found text behind the array, expected the end of the file");
    return false;
  }
  if (!first) {
    if (byte != ',')
      return ArrayError(byte < 0 ? "the file ends inside the array; copy it again"
                                 : "found no comma between two elements of the array; the file "
                                   "cannot be read on from here");
    text_->Advance(1);
    SALA_ASSIGN_OR_RETURN(byte, SkipSpace());
    if (byte == ']' || byte == ',') return ArrayError("found no element behind a comma");
  }
  if (byte < 0) return ArrayError("the file ends inside the array; copy it again");
  record->line = lines_ + 1;
  record->offset = text_->offset();
  SALA_ASSIGN_OR_RETURN(const size_t bytes, ElementBytes());
  record->bytes = text_->Unread().substr(0, bytes);
  lines_ += std::count(record->bytes.begin(), record->bytes.end(), '\n');
  text_->Advance(bytes);
  return true;
}

}  // namespace sala::data
