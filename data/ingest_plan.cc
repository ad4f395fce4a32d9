#include "data/ingest_plan.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"

namespace sala::data {
namespace {

using nlohmann::json;

// Raised whenever the same inputs and options give other pieces than before.
constexpr int kPlanVersion = 2;

bool EndsWithOneOf(const std::string& path, const std::vector<std::string>& endings) {
  return std::any_of(endings.begin(), endings.end(), [&](const std::string& ending) {
    return path.size() > ending.size() &&
           path.compare(path.size() - ending.size(), ending.size(), ending) == 0;
  });
}

StatusOr<InputFiles> WalkDirectory(const std::string& directory,
                                   const std::vector<std::string>& endings) {
  InputFiles found;
  std::string foreign;
  std::error_code error;
  for (auto it = std::filesystem::recursive_directory_iterator(directory, error);
       !error && it != std::filesystem::recursive_directory_iterator(); it.increment(error)) {
    if (!it->is_regular_file(error)) continue;
    const std::string path = it->path().string();
    (EndsWithOneOf(path, endings) ? found.read : found.passed_over).push_back(path);
    if (IsForeignFormat(path) && (foreign.empty() || path < foreign)) foreign = path;
  }
  if (error) return MakeError(ExitCode::kIo, "FILE-READ", directory + ": " + error.message());
  // Passing over it would leave out data without a word.
  if (!foreign.empty()) return KindOfFile(foreign).status();
  std::sort(found.read.begin(), found.read.end());
  std::sort(found.passed_over.begin(), found.passed_over.end());
  return found;
}

StatusOr<PlannedFile> Stat(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0)
    return MakeError(ExitCode::kNoInput, "ING-INPUT", path + ": no such file or directory");
  PlannedFile file;
  file.path = path;
  file.bytes = static_cast<int64_t>(info.st_size);
  file.modified_ns = static_cast<int64_t>(info.st_mtim.tv_sec) * 1'000'000'000 +
                     static_cast<int64_t>(info.st_mtim.tv_nsec);
  return file;
}

// Only lines of a plain file can be found from the middle.
void AddSegments(const PlannedFile& file, size_t index, int64_t piece_bytes, IngestPlan* plan) {
  const bool cut =
      file.kind.format == InputFormat::kJsonLines && file.kind.archive == Archive::kNone;
  if (!cut || file.bytes <= piece_bytes) {
    plan->segments.push_back({.file = index, .bytes = file.bytes});
    return;
  }
  for (int64_t begin = 0; begin < file.bytes; begin += piece_bytes) {
    const int64_t end = std::min(begin + piece_bytes, file.bytes);
    plan->segments.push_back({.file = index, .begin = begin, .end = end, .bytes = end - begin});
  }
}

void GroupSegments(int64_t piece_bytes, IngestPlan* plan) {
  // So many empty files do not become one unit that takes for ever to open.
  constexpr size_t kMostSegments = 4096;
  int64_t bytes = 0;
  for (size_t s = 0; s < plan->segments.size(); ++s) {
    const int64_t more = plan->segments[s].bytes;
    const bool full = plan->units.empty() || bytes + more > piece_bytes ||
                      s - plan->units.back().begin >= kMostSegments;
    if (full) {
      plan->units.push_back({s, s});
      bytes = 0;
    }
    bytes += more;
    plan->units.back().end = s + 1;
  }
}

json PlanJson(const IngestOptions& options, const Tokenizer& tokenizer, const ChatRenderer& chats,
              const IngestPlan& plan) {
  json inputs = json::array();
  for (const PlannedFile& file : plan.files) {
    inputs.push_back({{"path", file.path},
                      {"source", file.source},
                      {"bytes", file.bytes},
                      {"modified_ns", file.modified_ns}});
  }
  return {{"format", "ingest-plan"},
          {"version", kPlanVersion},
          {"options", OptionsJson(options, tokenizer, chats)},
          {"inputs", inputs}};
}

Status Changed(const std::string& output, const std::string& what) {
  return MakeError(ExitCode::kConfig, "ING-CHANGED",
                   output + ": the ingest that was begun here had " + what +
                       "; restore that, or remove the directory and ingest again");
}

std::string Short(const json& value) { return Printable(DumpJson(value)); }

Status ComparePlans(const std::string& output, const std::string& found, const json& now) {
  const json then = json::parse(found, nullptr, /*allow_exceptions=*/false);
  if (!then.is_object() || !then.contains("options") || !then["options"].is_object() ||
      !then.contains("inputs") || !then["inputs"].is_array())
    return Changed(output, "a plan.json that is no plan (damaged)");
  if (!then.contains("version") || then["version"] != now["version"])
    return Changed(output, "another version of this program");
  for (const auto& [key, value] : now["options"].items()) {
    const json before = then["options"].value(key, json());
    if (before != value)
      return Changed(output, key + " " + Short(before) + ", it is now " + Short(value));
  }
  const json& a = then["inputs"];
  const json& b = now["inputs"];
  for (size_t i = 0; i < std::max(a.size(), b.size()); ++i) {
    const json before = i < a.size() ? a[i] : json();
    const json after = i < b.size() ? b[i] : json();
    if (before != after)
      return Changed(output, "other inputs: found " + Short(after) + ", expected " + Short(before));
  }
  return then == now ? OkStatus() : Changed(output, "another plan");
}

}  // namespace

std::string NameOfRule(RecordRule rule) {
  return rule == RecordRule::kError ? "error" : rule == RecordRule::kSkip ? "skip" : "fix";
}

json OptionsJson(const IngestOptions& options, const Tokenizer& tokenizer,
                 const ChatRenderer& chats) {
  json sources = json::array();
  for (const IngestSource& s : options.sources)
    sources.push_back({{"name", s.name}, {"license", s.license}, {"note", s.note}});
  json rules = json::object();
  for (const auto& [name, rule] : options.rules) rules[name] = NameOfRule(rule);
  return {{"tokenizer", tokenizer.fingerprint()},
          // Files beside a vocabulary say these, so its fingerprint does not cover them.
          {"bos_id", tokenizer.bos_id()},
          {"eos_id", tokenizer.eos_id()},
          {"pad_id", tokenizer.pad_id()},
          {"unk_id", tokenizer.unk_id()},
          {"sources", sources},
          {"name", options.name},
          {"text_field", options.text_field},
          {"messages_field", options.messages_field},
          {"id_field", options.id_field},
          {"split", static_cast<int>(options.split)},
          {"separator", options.separator},
          {"dedup", options.dedup},
          {"rules", rules},
          {"chat_template", chats.name()},
          {"chat_template_sha256", chats.sha256()},
          {"chat_special_sha256", chats.special_sha256()},
          {"chat_mask", static_cast<int>(options.chat_mask)},
          {"add_bos", options.add_bos},
          {"add_eos", options.add_eos},
          {"shard_tokens", options.shard_tokens},
          {"piece_bytes", options.piece_bytes}};
}

StatusOr<InputFiles> FindInputFiles(const std::vector<std::string>& inputs,
                                    const std::vector<std::string>& extensions) {
  InputFiles files;
  for (const std::string& input : inputs) {
    if (!PathExists(input))
      return MakeError(ExitCode::kNoInput, "ING-INPUT", input + ": no such file or directory");
    if (!IsDirectory(input)) {
      files.read.push_back(input);
      continue;
    }
    SALA_ASSIGN_OR_RETURN(const InputFiles found, WalkDirectory(input, extensions));
    files.read.insert(files.read.end(), found.read.begin(), found.read.end());
    files.passed_over.insert(files.passed_over.end(), found.passed_over.begin(),
                             found.passed_over.end());
  }
  return files;
}

std::string NamePassedOver(const std::vector<std::string>& files) {
  constexpr size_t kNamed = 3;
  if (files.empty()) return "";
  std::string text = files.size() == 1 ? "1 file is not read: "
                                       : std::to_string(files.size()) + " files are not read: ";
  for (size_t i = 0; i < std::min(kNamed, files.size()); ++i)
    text += (i == 0 ? "" : ", ") + Printable(files[i]);
  if (files.size() > kNamed) text += " and " + std::to_string(files.size() - kNamed) + " more";
  return text +
         " (of a directory .txt, .jsonl and .ndjson are, also with .gz or .zst; .json only by "
         "name)";
}

StatusOr<IngestPlan> MakeIngestPlan(const IngestOptions& options, const Tokenizer& tokenizer,
                                    const ChatRenderer& chats) {
  IngestPlan plan;
  for (size_t s = 0; s < options.sources.size(); ++s) {
    SALA_ASSIGN_OR_RETURN(const InputFiles inputs,
                          FindInputFiles(options.sources[s].inputs, options.extensions));
    plan.passed_over.insert(plan.passed_over.end(), inputs.passed_over.begin(),
                            inputs.passed_over.end());
    for (const std::string& path : inputs.read) {
      SALA_ASSIGN_OR_RETURN(PlannedFile file, Stat(path));
      SALA_ASSIGN_OR_RETURN(file.kind, KindOfFile(path));
      file.source = s;
      AddSegments(file, plan.files.size(), options.piece_bytes, &plan);
      plan.files.push_back(std::move(file));
    }
  }
  GroupSegments(options.piece_bytes, &plan);
  plan.text = DumpJson(PlanJson(options, tokenizer, chats, plan), 1) + "\n";
  plan.fingerprint = Sha256Hex(plan.text);
  return plan;
}

std::string PiecesDirectory(const std::string& output) { return output + "/ingest.pieces"; }

Status OpenPieces(const IngestOptions& options, const IngestPlan& plan) {
  const std::string directory = PiecesDirectory(options.output);
  const std::string path = directory + "/plan.json";
  if (PathExists(directory) && !options.resume) {
    return MakeError(ExitCode::kIo, "ING-UNFINISHED",
                     options.output +
                         ": an ingest was begun here and not finished; go on with --resume and the "
                         "same options, or remove the directory");
  }
  if (PathExists(path)) {
    SALA_ASSIGN_OR_RETURN(const std::string found, ReadFile(path));
    return found == plan.text ? OkStatus()
                              : ComparePlans(options.output, found, json::parse(plan.text));
  }
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  SALA_RETURN_IF_ERROR(WriteFileAtomically(path, plan.text));
  return FsyncDirectory(options.output);
}

Status CheckUnchanged(const IngestPlan& plan) {
  for (const PlannedFile& file : plan.files) {
    SALA_ASSIGN_OR_RETURN(const PlannedFile now, Stat(file.path));
    if (now.bytes == file.bytes && now.modified_ns == file.modified_ns) continue;
    return MakeError(ExitCode::kConfig, "ING-CHANGED",
                     file.path + ": the file was changed while it was read (" +
                         std::to_string(file.bytes) + " bytes then, " + std::to_string(now.bytes) +
                         " now); ingest again when it is complete");
  }
  return OkStatus();
}

}  // namespace sala::data
