// The raw records of one input file, or of a range of it, in order, with their place in it.
//
//   SALA_ASSIGN_OR_RETURN(RecordReader reader, RecordReader::Open({.path = "web.jsonl.zst"}));
//   RawRecord record;
//   while (*reader.Next(&record)) ...
//
// Offsets are of the text: in an archive they count its unpacked bytes.
//
// Errors: ING-FORMAT (65) for a file that is not read; ING-LONG (65) for a line or an element of
// more than 1 GiB; ING-JSON (65) for a .json file whose array is broken; those of
// data/byte_source.h.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "data/byte_source.h"
#include "data/ingest.h"

namespace sala::data {

// At least this many readable bytes stand behind a record of JSON, whatever they are: its parser
// reads in wide steps.
inline constexpr size_t kRecordPadding = 64;

struct RawRecord {
  std::string_view bytes;  // until the next record is asked for
  int64_t line = 1;        // where it starts, from 1
  int64_t offset = 0;      // byte in the text
};

enum class InputFormat { kText, kJsonLines, kJsonArray };

struct FileKind {
  InputFormat format = InputFormat::kText;
  Archive archive = Archive::kNone;
};

// By the file's name: .txt, .jsonl, .ndjson, .json, each also with .gz or .zst. ING-FORMAT (65) for
// another one; formats that others use for data are named with a way to convert them.
StatusOr<FileKind> KindOfFile(const std::string& path);
// Whether the name is one of another format that holds training data (.parquet, .mds, .tar ...), or
// data in a packing (.xz, .bz2, .zip) or with an ending (.zstd, .JSONL) that is not read.
bool IsForeignFormat(const std::string& path);

constexpr size_t kLongestRecord = size_t{1} << 30;

struct ReadOptions {
  std::string path = {};
  FileKind kind = {};
  TextSplit split = TextSplit::kWholeFile;  // of .txt
  std::string separator = {};
  int zstd_window_log = kZstdWindowLog;
  // Records that start in [begin, end) of the text; end -1: to its end. Only lines of JSON can be
  // cut at any byte; others begin at 0 or where a reader stopped.
  int64_t begin = 0;
  int64_t end = -1;
  bool at_record = true;  // begin is where a reader stopped; false: the rest of a line comes first
  int64_t lines_before = 0;                // line numbers go on from here
  size_t longest_record = kLongestRecord;  // bytes; ING-LONG (65) for a longer one
};

// Buffered text with a place: finds lines, and gives them without a copy. `longest`: bytes that it
// holds at most, where that is more than 1 MiB.
class TextBuffer {
 public:
  TextBuffer(std::unique_ptr<ByteSource> source, std::string path, int64_t offset, size_t longest);
  // The next line without its newline; false at the end.
  StatusOr<bool> ReadLine(std::string_view* line);
  // The byte `ahead` behind the place, or -1 where the text ends before it.
  StatusOr<int> Peek(size_t ahead);
  void Advance(size_t bytes) { begin_ += bytes; }
  std::string_view Unread() const { return {buffer_.get() + begin_, end_ - begin_}; }
  int64_t offset() const { return base_ + static_cast<int64_t>(begin_); }  // of the place
  int64_t file_bytes_read() const { return source_->file_bytes_read(); }

 private:
  StatusOr<bool> Fill();  // reads more behind what is there; false at the end
  std::unique_ptr<ByteSource> source_;
  std::string path_;
  std::unique_ptr<char[]> buffer_;
  size_t longest_;
  size_t capacity_ = 0;
  size_t begin_ = 0, end_ = 0;  // the unread part
  int64_t base_ = 0;            // offset in the text of buffer_[0]
  bool ended_ = false;
};

// A mark of the byte order at the start of a file is dropped.
class RecordReader {
 public:
  static StatusOr<RecordReader> Open(const ReadOptions& options);
  // False at the end.
  StatusOr<bool> Next(RawRecord* record);
  // Where a reader that goes on begins, and the lines before it.
  int64_t offset() const { return text_->offset(); }
  int64_t lines() const { return lines_; }
  int64_t file_bytes_read() const { return text_->file_bytes_read(); }

 private:
  RecordReader() = default;
  Status Start();
  StatusOr<bool> ReadLine(std::string_view* line);  // counts
  StatusOr<bool> NextWhole(RawRecord* record);
  StatusOr<bool> NextLine(RawRecord* record);
  StatusOr<bool> NextPart(RawRecord* record);
  StatusOr<bool> NextElement(RawRecord* record);
  StatusOr<int> SkipSpace();  // the byte behind white space, -1 at the end
  StatusOr<size_t> ElementBytes();
  Status ArrayError(const std::string& text) const;
  bool IsBoundary(std::string_view line) const;

  ReadOptions options_;
  std::unique_ptr<TextBuffer> text_;
  int64_t lines_ = 0;        // read so far
  int64_t line_offset_ = 0;  // of the line last read
  std::string joined_;       // a record that is not one piece of the text
  bool in_array_ = false;    // behind its first element
  bool ended_ = false;
};

}  // namespace sala::data
