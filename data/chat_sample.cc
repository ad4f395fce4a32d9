#include "data/chat_sample.h"

#include <cstdio>

#include "data/chat_renderer.h"
#include "data/record_check.h"
#include "data/record_reader.h"
#include "data/utf8.h"

namespace sala::data {
namespace {

bool StartsCharacter(char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }

// The start of the text, at most so many bytes, in whole characters.
std::string Head(const std::string& text, int64_t bytes) {
  auto end = static_cast<size_t>(bytes);
  if (end >= text.size()) return text;
  while (end > 0 && !StartsCharacter(text[end])) --end;
  return text.substr(0, end);
}

std::string Tail(const std::string& text, int64_t bytes) {
  size_t begin = text.size() - static_cast<size_t>(bytes);
  while (begin < text.size() && !StartsCharacter(text[begin])) ++begin;
  return text.substr(begin);
}

std::string Shortened(const std::string& text, int64_t most) {
  if (most == 0 || static_cast<int64_t>(text.size()) <= most) return text;
  return Head(text, most / 2) + " ... " + Tail(text, most / 2);
}

std::string Escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      char hex[8];
      std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned>(byte));
      out += hex;
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

std::string MarkedText(const Tokenizer& tokenizer, std::span<const int32_t> tokens,
                       std::span<const uint8_t> learned, const LearnedMarks& marks,
                       int64_t run_bytes, int64_t most_bytes) {
  std::string out;
  int64_t shown = 0;
  for (size_t begin = 0; begin < tokens.size();) {  // runs of equal mask
    size_t end = begin;
    while (end < tokens.size() && learned[end] == learned[begin]) ++end;
    const std::string text = Escaped(Shortened(
        ReplaceInvalidUtf8(tokenizer.Decode(tokens.subspan(begin, end - begin))), run_bytes));
    if (most_bytes > 0 && shown + static_cast<int64_t>(text.size()) > most_bytes)
      return out + " ... (" + std::to_string(tokens.size() - begin) + " more tokens)";
    shown += static_cast<int64_t>(text.size());
    out += learned[begin] != 0 ? marks.begin + text + marks.end : text;
    begin = end;
  }
  return out;
}

StatusOr<ChatPreview> PreviewChat(const std::string& path, int64_t number,
                                  const IngestOptions& options, const Tokenizer& tokenizer) {
  SALA_ASSIGN_OR_RETURN(const auto renderer,
                        ChatRenderer::Open(options.chat_template, options.tokenizer_path, tokenizer,
                                           options.chat_mask));
  SALA_RETURN_IF_ERROR(renderer->CheckTokens());
  SALA_ASSIGN_OR_RETURN(RecordChecker checker, RecordChecker::Make(options));
  SALA_ASSIGN_OR_RETURN(const FileKind kind, KindOfFile(path));
  SALA_ASSIGN_OR_RETURN(RecordReader reader,
                        RecordReader::Open({.path = path,
                                            .kind = kind,
                                            .split = options.split,
                                            .separator = options.separator,
                                            .zstd_window_log = options.zstd_window_log}));
  RawRecord raw;
  for (int64_t i = 0; i <= number; ++i) {
    SALA_ASSIGN_OR_RETURN(const bool more, reader.Next(&raw));
    if (more) continue;
    return MakeError(ExitCode::kUsage, "PREVIEW-RECORD",
                     path + ": found " + std::to_string(i) + " records, asked for number " +
                         std::to_string(number) + ", counted from 0");
  }
  const std::string where = Place(path, raw.line, raw.offset);
  SALA_ASSIGN_OR_RETURN(const RecordChecker::Outcome outcome,
                        checker.Check(raw, kind.format, path));
  if (!outcome.keep || !outcome.record.is_chat()) {
    const std::string why = outcome.keep ? "it is text" : "rule " + outcome.cases.back().rule;
    return MakeError(ExitCode::kUsage, "PREVIEW-RECORD",
                     where + ": the record is no chat that ingest would keep: " + why);
  }
  ChatPreview preview;
  preview.shape = outcome.record.shape;
  auto rendered = renderer->Render(outcome.record.chat);
  if (!rendered.ok()) return Annotate(rendered.status(), where);
  SALA_ASSIGN_OR_RETURN(EncodedChat encoded, renderer->Encode(outcome.record.chat));
  AddDocumentEnds(options.add_bos ? tokenizer.bos_id() : -1,
                  options.add_eos ? tokenizer.eos_id() : -1, &encoded);
  preview.text = std::move(rendered->text);
  preview.learned = std::move(rendered->learned);
  preview.tokens = std::move(encoded.tokens);
  preview.mask = std::move(encoded.mask);
  return preview;
}

}  // namespace sala::data
