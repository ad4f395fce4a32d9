#include "data/ingest.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "core/file.h"
#include "core/hash.h"
#include "core/log.h"
#include "data/record_check.h"
#include "data/record_reader.h"

namespace sala::data {
namespace {

using nlohmann::json;

// A source all of whose first records teach nothing is a template that does not match the data.
constexpr int64_t kNoMaskRecords = 100;

bool IsName(const std::string& name) {
  const auto letter = [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
  };
  if (name.empty() || name.size() > 64 || !letter(name[0])) return false;
  return std::all_of(name.begin(), name.end(),
                     [&](char c) { return letter(c) || c == '_' || c == '.' || c == '-'; });
}

Status CheckName(const std::string& what, const std::string& name) {
  if (IsName(name)) return OkStatus();
  return MakeError(ExitCode::kUsage, "ING-NAME",
                   what + " name: found \"" + Printable(name) +
                       "\", expected up to 64 letters, digits, '_', '.' and '-', starting with a "
                       "letter or digit");
}

json CanonicalMessages(const std::vector<ChatMessage>& messages) {
  json out = json::array();
  for (const ChatMessage& m : messages) out.push_back({{"role", m.role}, {"content", m.content}});
  return out;
}

class Ingest {
 public:
  Ingest(const IngestOptions& options, const Tokenizer& tokenizer, RecordChecker checker)
      : options_(options), tokenizer_(tokenizer), checker_(std::move(checker)) {}

  StatusOr<IngestReport> Run();

 private:
  Status RunSource(const IngestSource& source);
  Status RunFile(const std::string& path);
  Status Take(const RawRecord& raw, InputFormat format, const std::string& path);
  Status Open(bool chat);
  Status Note(const std::string& rule, const std::string& action, const RawRecord& raw,
              const std::string& path, const std::string& id);
  Status AddText(const CheckedRecord& record, const RawRecord& raw, const std::string& path);
  Status AddChat(const CheckedRecord& record, const RawRecord& raw, const std::string& path);
  // True when the record is one seen before and the rule says so.
  StatusOr<bool> SkipDuplicate(uint64_t hash, const CheckedRecord& record, const RawRecord& raw,
                               const std::string& path);
  Status AddTokens(std::vector<int32_t> tokens, std::vector<uint8_t> mask, uint64_t hash);
  Status CheckRejects(bool end) const;
  json IngestJson() const;

  const IngestOptions& options_;
  const Tokenizer& tokenizer_;
  RecordChecker checker_;
  const ChatFamily* family_ = nullptr;
  std::unique_ptr<TokenStoreWriter> writer_;  // opened by the first record, which decides the kind
  bool chat_ = false;
  std::ofstream log_;
  std::unordered_set<uint64_t> seen_;
  const IngestSource* source_ = nullptr;
  int64_t source_index_ = -1;
  int64_t source_chats_ = 0, source_learned_ = 0;  // of the current source
  int64_t rejects_ = 0;
  json inputs_ = json::array();
  IngestReport report_;
};

StatusOr<IngestReport> Ingest::Run() {
  SALA_RETURN_IF_ERROR(CheckName("dataset", options_.name));
  SALA_ASSIGN_OR_RETURN(family_, FindChatFamily(options_.chat_template));
  if (PathExists(options_.output + "/dataset.json")) {
    return MakeError(
        ExitCode::kIo, "DS-EXISTS",
        options_.output + ": there is a dataset already; choose another output or remove it");
  }
  SALA_RETURN_IF_ERROR(MakeDirectories(options_.output));
  log_.open(options_.output + "/ingest.log.jsonl", std::ios::binary | std::ios::trunc);
  for (const IngestSource& source : options_.sources) SALA_RETURN_IF_ERROR(RunSource(source));
  if (writer_ == nullptr || writer_->documents() == 0) {
    std::string reasons;
    for (const auto& [rule, count] : report_.cases)
      reasons += (reasons.empty() ? "" : ", ") + rule + " " + std::to_string(count);
    return MakeError(ExitCode::kData, "ING-EMPTY",
                     "no document came out of " + std::to_string(report_.records) + " records of " +
                         std::to_string(inputs_.size()) + " files" +
                         (reasons.empty() ? "" : " (" + reasons + ")") + "; give files with text");
  }
  SALA_RETURN_IF_ERROR(CheckRejects(/*end=*/true));
  log_.flush();
  if (!log_)
    return MakeError(ExitCode::kIo, "FILE-WRITE",
                     options_.output + "/ingest.log.jsonl: cannot be written");
  SALA_ASSIGN_OR_RETURN(report_.info, writer_->Finish(IngestJson()));
  return report_;
}

Status Ingest::RunSource(const IngestSource& source) {
  SALA_RETURN_IF_ERROR(CheckName("source", source.name));
  source_ = &source;
  source_index_ = -1;
  source_chats_ = source_learned_ = 0;
  SALA_ASSIGN_OR_RETURN(const auto files, FindInputFiles(source.inputs, options_.extensions));
  for (const std::string& file : files) SALA_RETURN_IF_ERROR(RunFile(file));
  if (source_chats_ > 0 && source_learned_ == 0) {
    return MakeError(ExitCode::kData, "CHAT-NOMASK",
                     "source " + source.name + ": none of its " + std::to_string(source_chats_) +
                         " records has a token to learn; is there a message of role " +
                         family_->learned_role + " that is not switched off?");
  }
  return OkStatus();
}

Status Ingest::RunFile(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const FileKind kind, KindOfFile(path));
  const InputFormat format = kind.format;
  SALA_ASSIGN_OR_RETURN(RecordReader reader,
                        RecordReader::Open({.path = path,
                                            .kind = kind,
                                            .split = options_.split,
                                            .separator = options_.separator}));
  RawRecord raw;
  while (true) {
    SALA_ASSIGN_OR_RETURN(const bool more, reader.Next(&raw));
    if (!more) break;
    ++report_.records;
    SALA_RETURN_IF_ERROR(Take(raw, format, path));
  }
  Sha256 sha;
  SALA_ASSIGN_OR_RETURN(const MappedFile map, MappedFile::Open(path));
  sha.Update(map.data(), map.size());
  inputs_.push_back({{"path", path}, {"bytes", map.size()}, {"sha256", sha.HexDigest()}});
  return OkStatus();
}

Status Ingest::Note(const std::string& rule, const std::string& action, const RawRecord& raw,
                    const std::string& path, const std::string& id) {
  log_ << json({{"file", path},
                {"line", raw.line},
                {"offset", raw.offset},
                {"id", id},
                {"rule", rule},
                {"action", action}})
              .dump(-1, ' ', false, json::error_handler_t::replace)
       << '\n';
  ++report_.cases[rule];
  // Doubles and empty records are what skipping is for; only malformed ones speak against the
  // input.
  if (action == "skip" && rule != "empty" && rule != "duplicate" && rule != "empty_target")
    ++rejects_;
  return CheckRejects(/*end=*/false);
}

Status Ingest::CheckRejects(bool end) const {
  if (!options_.max_rejects.has_value() && !end) return OkStatus();
  const int64_t most = options_.max_rejects.value_or(report_.records / 1000);
  if (rejects_ <= most) return OkStatus();
  return MakeError(ExitCode::kData, "ING-REJECTS",
                   std::to_string(rejects_) + " malformed records of " +
                       std::to_string(report_.records) + " were skipped, at most " +
                       std::to_string(most) + " are allowed; see " + options_.output +
                       "/ingest.log.jsonl, or raise max_rejects");
}

Status Ingest::Open(bool chat) {
  if (writer_ == nullptr) {
    if (chat) SALA_RETURN_IF_ERROR(CheckChatTokens(*family_, tokenizer_));
    chat_ = chat;
    SALA_ASSIGN_OR_RETURN(writer_, TokenStoreWriter::Create({.directory = options_.output,
                                                             .name = options_.name,
                                                             .sft = chat,
                                                             .add_bos = options_.add_bos,
                                                             .add_eos = options_.add_eos,
                                                             .shard_tokens = options_.shard_tokens},
                                                            tokenizer_));
  }
  if (source_index_ < 0)
    source_index_ = writer_->AddSource(source_->name, source_->license, source_->note);
  return OkStatus();
}

Status Ingest::Take(const RawRecord& raw, InputFormat format, const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const RecordChecker::Outcome outcome, checker_.Check(raw, format, path));
  for (const RecordCase& found : outcome.cases)
    SALA_RETURN_IF_ERROR(Note(found.rule, found.action, raw, path, outcome.record.id));
  if (!outcome.keep) return OkStatus();
  if (writer_ != nullptr && outcome.record.chat != chat_) {
    return MakeError(ExitCode::kData, "ING-KIND",
                     Place(path, raw.line, raw.offset) + ": found a " +
                         (outcome.record.chat ? "chat" : "text") + " record among " +
                         (chat_ ? "chat" : "text") + " records; make one dataset of each kind");
  }
  SALA_RETURN_IF_ERROR(Open(outcome.record.chat));
  return chat_ ? AddChat(outcome.record, raw, path) : AddText(outcome.record, raw, path);
}

StatusOr<bool> Ingest::SkipDuplicate(uint64_t hash, const CheckedRecord& record,
                                     const RawRecord& raw, const std::string& path) {
  if (!options_.dedup || seen_.insert(hash).second) return false;
  if (checker_.RuleOf("duplicate") == RecordRule::kError) {
    return MakeError(
        ExitCode::kData, "ING-DUP",
        Place(path, raw.line, raw.offset) +
            ": the text of this record came before; remove it or set the rule duplicate to skip");
  }
  SALA_RETURN_IF_ERROR(Note("duplicate", "skip", raw, path, record.id));
  return true;
}

Status Ingest::AddTokens(std::vector<int32_t> tokens, std::vector<uint8_t> mask, uint64_t hash) {
  const bool bos = options_.add_bos && tokenizer_.bos_id() >= 0;
  const bool eos = options_.add_eos && tokenizer_.eos_id() >= 0;
  if (bos) tokens.insert(tokens.begin(), tokenizer_.bos_id());
  if (eos) tokens.push_back(tokenizer_.eos_id());
  if (chat_ && bos) mask.insert(mask.begin(), 0);
  // The model ends its turn with the end-of-turn marker; the eos behind the conversation is learned
  // with all_tokens only.
  if (chat_ && eos) mask.push_back(options_.chat_mask == ChatMask::kAllTokens ? 1 : 0);
  return writer_->Add({.tokens = tokens, .loss_mask = mask, .hash = hash, .source = source_index_});
}

Status Ingest::AddText(const CheckedRecord& record, const RawRecord& raw, const std::string& path) {
  const uint64_t hash = Xxh3(record.text);
  SALA_ASSIGN_OR_RETURN(const bool duplicate, SkipDuplicate(hash, record, raw, path));
  if (duplicate) return OkStatus();
  return AddTokens(tokenizer_.Encode(record.text), {}, hash);
}

Status Ingest::AddChat(const CheckedRecord& record, const RawRecord& raw, const std::string& path) {
  auto rendered = RenderChat(*family_, record.messages, options_.chat_mask);
  if (!rendered.ok()) {
    if (checker_.RuleOf("chat") == RecordRule::kError)
      return Annotate(rendered.status(), Place(path, raw.line, raw.offset));
    return Note("chat", "skip", raw, path, record.id);
  }
  const uint64_t hash = Xxh3(CanonicalMessages(record.messages).dump());
  SALA_ASSIGN_OR_RETURN(const bool duplicate, SkipDuplicate(hash, record, raw, path));
  if (duplicate) return OkStatus();
  EncodedChat encoded = EncodeChat(*rendered, tokenizer_);
  ++source_chats_;
  if (std::find(encoded.mask.begin(), encoded.mask.end(), 1) == encoded.mask.end()) {
    const std::string where = Place(path, raw.line, raw.offset);
    const bool hopeless = source_learned_ == 0 && source_chats_ >= kNoMaskRecords;
    if (hopeless || checker_.RuleOf("empty_target") == RecordRule::kError) {
      return MakeError(
          ExitCode::kData, "CHAT-NOMASK",
          where +
              (hopeless ? ": none of the first " + std::to_string(source_chats_) +
                              " records of source " + source_->name + " has a token to learn"
                        : ": the record has no token to learn") +
              "; is there a message of role " + family_->learned_role +
              " that is not switched off?");
    }
    return Note("empty_target", "skip", raw, path, record.id);
  }
  ++source_learned_;
  return AddTokens(std::move(encoded.tokens), std::move(encoded.mask), hash);
}

json Ingest::IngestJson() const {
  json rules = json::object();
  for (const auto& [name, rule] : options_.rules)
    rules[name] = rule == RecordRule::kError ? "error" : rule == RecordRule::kSkip ? "skip" : "fix";
  return {{"command", "ingest"},
          {"inputs", inputs_},
          {"records", report_.records},
          {"cases", report_.cases},
          {"rules", rules},
          {"dedup", options_.dedup ? "exact" : "none"},
          {"shuffled", false},
          {"chat_template", chat_ ? json(family_->name) : json()}};
}

}  // namespace

StatusOr<std::vector<std::string>> FindInputFiles(const std::vector<std::string>& inputs,
                                                  const std::vector<std::string>& extensions) {
  std::vector<std::string> files;
  for (const std::string& input : inputs) {
    if (!PathExists(input))
      return MakeError(ExitCode::kNoInput, "ING-INPUT", input + ": no such file or directory");
    if (!IsDirectory(input)) {
      files.push_back(input);
      continue;
    }
    std::vector<std::string> found;
    std::error_code error;
    for (auto it = std::filesystem::recursive_directory_iterator(input, error);
         !error && it != std::filesystem::recursive_directory_iterator(); it.increment(error)) {
      const bool wanted = std::find(extensions.begin(), extensions.end(),
                                    it->path().extension().string()) != extensions.end();
      if (wanted && it->is_regular_file(error)) found.push_back(it->path().string());
    }
    if (error) return MakeError(ExitCode::kIo, "FILE-READ", input + ": " + error.message());
    std::sort(found.begin(), found.end());
    files.insert(files.end(), found.begin(), found.end());
  }
  return files;
}

StatusOr<IngestReport> RunIngest(const IngestOptions& options, const Tokenizer& tokenizer) {
  SALA_ASSIGN_OR_RETURN(RecordChecker checker, RecordChecker::Make(options));
  return Ingest(options, tokenizer, std::move(checker)).Run();
}

}  // namespace sala::data
