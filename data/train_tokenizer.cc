#include "data/train_tokenizer.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "core/file.h"
#include "core/rng.h"
#include "data/record_check.h"
#include "data/record_reader.h"
#include "data/sentencepiece_api.h"
#include "data/tokenizer_files.h"

namespace sala::data {
namespace {

Status Failed(const std::string& text) { return MakeError(ExitCode::kData, "TOK-TRAIN", text); }

// The lines of all texts of the files, in order, without their ends. Empty ones are left out.
class TextLines {
 public:
  // The references live as long as this object.
  static StatusOr<TextLines> Open(const IngestOptions& reading,
                                  const std::vector<std::string>& files) {
    SALA_ASSIGN_OR_RETURN(RecordChecker checker, RecordChecker::Make(reading));
    return TextLines(reading, files, std::move(checker));
  }

  // False at the end. The line is there until the next one is asked for.
  StatusOr<bool> Next(std::string_view* line) {
    while (true) {
      while (at_ == text_.size()) {
        SALA_ASSIGN_OR_RETURN(const bool more, NextText());
        if (!more) return false;
      }
      const size_t end = std::min(text_.find('\n', at_), text_.size());
      *line = std::string_view(text_).substr(at_, end - at_);
      at_ = std::min(end + 1, text_.size());
      if (!line->empty()) return true;
    }
  }
  const std::map<std::string, int64_t>& cases() const { return cases_; }

 private:
  TextLines(const IngestOptions& reading, const std::vector<std::string>& files,
            RecordChecker checker)
      : reading_(reading), files_(files), checker_(std::move(checker)) {}

  StatusOr<bool> NextText() {
    while (texts_.empty()) {
      SALA_ASSIGN_OR_RETURN(const bool more, NextRecord());
      if (!more) return false;
    }
    text_ = std::move(texts_.back());
    texts_.pop_back();
    at_ = 0;
    return true;
  }

  // Its texts, which may be none.
  StatusOr<bool> NextRecord() {
    RawRecord raw;
    while (true) {
      if (reader_.has_value()) {
        SALA_ASSIGN_OR_RETURN(const bool more, reader_->Next(&raw));
        if (more) break;
        reader_.reset();
      }
      if (next_file_ == files_.size()) return false;
      SALA_RETURN_IF_ERROR(OpenFile(files_[next_file_++]));
    }
    if (kind_.format == InputFormat::kText && raw.bytes.empty()) return true;  // no record
    const std::string& path = files_[next_file_ - 1];
    SALA_ASSIGN_OR_RETURN(RecordChecker::Outcome outcome, checker_.Check(raw, kind_.format, path));
    for (const RecordCase& found : outcome.cases) ++cases_[found.rule];
    if (!outcome.keep) return true;
    if (!shape_) shape_ = outcome.record.shape;
    if (const Status same = CheckShape(*shape_, outcome.record.shape); !same.ok())
      return Annotate(same, Place(path, raw.line, raw.offset));
    auto& messages = outcome.record.chat.messages;
    for (auto message = messages.rbegin(); message != messages.rend(); ++message)
      texts_.push_back(std::move(message->content));
    if (!outcome.record.is_chat()) texts_.push_back(std::move(outcome.record.text));
    return true;
  }

  Status OpenFile(const std::string& path) {
    shape_.reset();
    SALA_ASSIGN_OR_RETURN(kind_, KindOfFile(path));
    SALA_ASSIGN_OR_RETURN(reader_,
                          RecordReader::Open({.path = path,
                                              .kind = kind_,
                                              .split = TextSplit::kLines,
                                              .zstd_window_log = reading_.zstd_window_log}));
    return OkStatus();
  }

  const IngestOptions& reading_;
  const std::vector<std::string>& files_;
  RecordChecker checker_;
  size_t next_file_ = 0;
  FileKind kind_;  // of the open file, likewise the shape of its first record
  std::optional<ChatShape> shape_;
  std::optional<RecordReader> reader_;
  std::vector<std::string> texts_;  // of a record, reversed
  std::string text_;
  size_t at_ = 0;
  std::map<std::string, int64_t> cases_;
};

// Gives the lines to the trainer, cut at tabs (a reserved character of the trainer; a tab is one
// byte token) and below the trainer's limit of 4,192 bytes a sentence, at a space. Keeps a seeded
// share of the lines when there is too much.
class Sentences {
 public:
  Sentences(const TrainTokenizerOptions& options, int64_t text_bytes, TextLines lines)
      : lines_(std::move(lines)),
        draws_("tokenizer|" + std::to_string(options.seed)),
        share_(text_bytes > options.max_bytes
                   ? static_cast<double>(options.max_bytes) / static_cast<double>(text_bytes)
                   : 1.0) {}

  StatusOr<bool> Next(std::string* sentence) {
    while (pending_.empty()) {
      std::string_view line;
      SALA_ASSIGN_OR_RETURN(const bool more, lines_.Next(&line));
      if (!more) return false;
      if (share_ < 1.0 && draws_.NextDouble() >= share_) continue;
      Cut(line);
    }
    *sentence = std::move(pending_.back());
    pending_.pop_back();
    return true;
  }

 private:
  void Cut(std::string_view line) {
    constexpr size_t kLimit = 4000;
    std::vector<std::string> parts;
    size_t begin = 0;
    while (begin < line.size()) {
      size_t end = std::min(line.find('\t', begin), line.size());
      if (end - begin > kLimit) {
        end = line.rfind(' ', begin + kLimit);
        if (end == std::string_view::npos || end <= begin) {
          end = begin + kLimit;
          while (end > begin + 1 && (static_cast<uint8_t>(line[end]) & 0xc0) == 0x80) --end;
        }
      }
      if (end > begin) parts.emplace_back(line.substr(begin, end - begin));
      begin = end < line.size() && line[end] == '\t' ? end + 1 : end;
    }
    pending_.assign(parts.rbegin(), parts.rend());
  }

  TextLines lines_;
  PhiloxStream draws_;
  double share_;
  std::vector<std::string> pending_;  // reversed
};

Status CheckOptions(const TrainTokenizerOptions& options) {
  for (const char* name : kTokenizerFiles) {
    if (PathExists(options.output + "/" + name)) {
      return MakeError(ExitCode::kIo, "TOK-EXISTS",
                       options.output + ": already holds a tokenizer (" + name +
                           "); name another directory, or remove it");
    }
  }
  const int64_t added = static_cast<int64_t>(options.added_tokens.size());
  constexpr int64_t kSmallest = 3 + 256 + 1;  // unk, bos, eos, the bytes, one piece
  if (options.vocab_size - added >= kSmallest && options.vocab_size <= (1 << 24)) return OkStatus();
  return MakeError(ExitCode::kConfig, "TOK-TRAIN",
                   "vocab_size: found " + std::to_string(options.vocab_size) +
                       ", expected at least " + std::to_string(kSmallest + added) +
                       " (256 bytes, 3 special, " + std::to_string(added) +
                       " added tokens and one piece) and at most 2^24");
}

// Reads everything once.
Status Measure(const TrainTokenizerOptions& options, const std::vector<std::string>& files,
               TrainTokenizerReport* report) {
  SALA_ASSIGN_OR_RETURN(TextLines lines, TextLines::Open(options.reading, files));
  std::string_view line;
  while (true) {
    SALA_ASSIGN_OR_RETURN(const bool more, lines.Next(&line));
    if (!more) break;
    report->text_bytes += static_cast<int64_t>(line.size()) + 1;
  }
  report->files = static_cast<int64_t>(files.size());
  report->cases = lines.cases();
  if (report->text_bytes > 0) return OkStatus();
  std::string found;
  for (const auto& [rule, count] : report->cases)
    found += ", " + rule + " " + std::to_string(count);
  const std::string passed_over = NamePassedOver(report->passed_over);
  return Failed((options.inputs.empty() ? std::string("no input") : Printable(options.inputs[0])) +
                ": no text to train a tokenizer on in " + std::to_string(files.size()) + " files" +
                found + (passed_over.empty() ? "" : "; " + passed_over) + "; give files with text");
}

Status WriteTokenizer(const TrainTokenizerOptions& options, const std::string& model,
                      int64_t text_bytes) {
  SALA_RETURN_IF_ERROR(MakeDirectories(options.output));
  const int64_t pieces = options.vocab_size - static_cast<int64_t>(options.added_tokens.size());
  nlohmann::json added = nlohmann::json::object();
  for (size_t i = 0; i < options.added_tokens.size(); ++i)
    added[options.added_tokens[i]] = pieces + static_cast<int64_t>(i);
  SALA_RETURN_IF_ERROR(
      WriteFileAtomically(options.output + "/" + kAddedTokensFile, added.dump(2) + "\n"));
  SALA_RETURN_IF_ERROR(WriteFileAtomically(options.output + "/" + kSentencePieceFile, model));
  SALA_ASSIGN_OR_RETURN(const auto tokenizer, LoadTokenizer(options.output));
  if (tokenizer->vocab_size() == options.vocab_size) return tokenizer->SaveTo(options.output);
  return Failed("the text of " + std::to_string(text_bytes) + " bytes gives only " +
                std::to_string(tokenizer->vocab_size()) + " tokens, asked were " +
                std::to_string(options.vocab_size) + "; use more text or a smaller vocab_size");
}

}  // namespace

StatusOr<TrainTokenizerReport> TrainSentencePiece(const TrainTokenizerOptions& options) {
  SALA_RETURN_IF_ERROR(CheckOptions(options));
  TrainTokenizerReport report;
  SALA_ASSIGN_OR_RETURN(InputFiles files,
                        FindInputFiles(options.inputs, options.reading.extensions));
  report.passed_over = std::move(files.passed_over);
  SALA_RETURN_IF_ERROR(Measure(options, files.read, &report));

  SALA_ASSIGN_OR_RETURN(TextLines lines, TextLines::Open(options.reading, files.read));
  Sentences sentences(options, report.text_bytes, std::move(lines));
  Status read;
  const auto next = [&](std::string* sentence) {
    const StatusOr<bool> more = sentences.Next(sentence);
    if (!more.ok()) read = more.status();
    return more.ok() && *more;
  };
  std::string model;
  const std::string error = TrainSentencePieceModel(
      {.vocab_size =
           static_cast<int>(options.vocab_size - static_cast<int64_t>(options.added_tokens.size())),
       .character_coverage = options.character_coverage},
      next, &model);
  SALA_RETURN_IF_ERROR(read);
  if (!error.empty()) {
    return Failed("vocab_size " + std::to_string(options.vocab_size) + " on " +
                  std::to_string(report.text_bytes) + " bytes of text: " + Printable(error) +
                  "; use more text or another vocab_size");
  }
  const Status written = WriteTokenizer(options, model, report.text_bytes);
  if (written.ok()) return report;
  // What is left would be taken for a tokenizer; before this call there were no such files.
  for (const char* name : kTokenizerFiles) RemoveTree(options.output + "/" + name).IgnoreError();
  return written;
}

}  // namespace sala::data
