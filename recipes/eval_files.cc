#include "recipes/eval_files.h"

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "core/checkpoint.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"

namespace sala::recipes {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr char kSettings[] = "/settings.json";
constexpr char kParts[] = "/summary.part.jsonl";
constexpr char kSummary[] = "/summary.jsonl";

std::string NameOf(const std::string& task, int64_t length) {
  return task + "-" + std::to_string(length);
}

std::string NameOf(const ordered_json& line) {
  return NameOf(line["task"].get<std::string>(), line["length"].get<int64_t>());
}

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Of a file of weights its size and pieces spread over it: other values show there, and a folder of
// hundreds of gigabytes is not read for it.
Status HashPieces(const std::string& path, Sha256& hash) {
  constexpr int64_t kPieces = 64;
  constexpr int64_t kPiece = 4096;
  SALA_ASSIGN_OR_RETURN(const int64_t size, FileSize(path));
  const std::string length = std::to_string(size) + "|";
  hash.Update(length.data(), length.size());
  std::vector<char> bytes(static_cast<size_t>(std::min(size, kPiece)));
  const int64_t last = size - static_cast<int64_t>(bytes.size());
  for (int64_t piece = 0; piece < kPieces; ++piece) {
    const int64_t at = last * piece / (kPieces - 1);
    SALA_RETURN_IF_ERROR(ReadAt(path, at, bytes.data(), bytes.size()));
    hash.Update(bytes.data(), bytes.size());
  }
  return OkStatus();
}

StatusOr<std::string> ModelFingerprint(const std::string& path) {
  if (PathExists(path + "/manifest.json")) {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(path));
    return checkpoint.info().save_id;
  }
  Sha256 hash;
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(path));
  for (const std::string& name : names) {
    if (name != "config.json" && !EndsWith(name, ".safetensors")) continue;
    hash.Update(name.data(), name.size());
    SALA_RETURN_IF_ERROR(HashPieces(path + "/" + name, hash));
  }
  return hash.HexDigest();
}

StatusOr<std::string> FileFingerprint(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return Sha256Hex(text);
}

std::string Shown(const json& settings, const std::string& key) {
  if (!settings.is_object() || !settings.contains(key)) return "none";
  return Printable(DumpJson(settings[key]));
}

// Samples of prompts of the user, "prompts-512.jsonl" and "prompts_GROUP-512.jsonl": their groups
// are in no setting.
bool IsOfPrompts(const std::string& name) {
  constexpr char kStart[] = "prompts";
  constexpr char kEnd[] = ".jsonl";
  if (name.rfind(kStart, 0) != 0 || !EndsWith(name, kEnd)) return false;
  const std::string rest =
      name.substr(sizeof kStart - 1, name.size() - (sizeof kStart - 1) - (sizeof kEnd - 1));
  const size_t dash = rest.rfind('-');
  return dash != std::string::npos && (dash == 0 || rest[0] == '_') && dash + 1 < rest.size() &&
         rest.find_first_not_of("0123456789", dash + 1) == std::string::npos;
}

// Settings of something else may have this name.
bool IsOfEvaluation(const json& settings) {
  return settings.is_object() && settings.contains("tasks") && settings.contains("samples") &&
         settings.contains("model");
}

// Bytes of the settings as they stand in the file.
std::string SettingsText(const ordered_json& settings) { return DumpJson(settings, 1) + "\n"; }

}  // namespace

StatusOr<ordered_json> EvalSettings(const EvalRequest& request, const data::Tokenizer& tokenizer,
                                    const EvalUse& use) {
  const EvalConfig& config = request.config;
  ordered_json settings = {{"tasks", config.tasks},
                           {"lengths_tokens", config.lengths_tokens},
                           {"depths", config.depths},
                           {"samples", config.samples},
                           {"seed", config.seed},
                           {"chat", config.chat},
                           {"prompts", nullptr},
                           {"haystack", nullptr},
                           {"held_out_seed", nullptr},
                           {"held_out_fraction", nullptr},
                           {"tokenizer", tokenizer.fingerprint()}};
  if (!request.prompts.empty()) {
    SALA_ASSIGN_OR_RETURN(settings["prompts"], FileFingerprint(request.prompts));
  }
  if (!config.haystack.empty()) {
    SALA_ASSIGN_OR_RETURN(settings["haystack"], FileFingerprint(config.haystack + "/dataset.json"));
  }
  if (request.part) {
    settings["held_out_seed"] = request.part->seed;
    settings["held_out_fraction"] = request.part->fraction;
  }
  SALA_ASSIGN_OR_RETURN(settings["model"], ModelFingerprint(use.model_path));
  settings["checkpoint"] = use.model_path;
  settings["sparse_attention"] = use.sparse_attention;
  settings["cp"] = use.cp;
  settings["tp"] = use.tp;
  settings["device"] = use.device;
  return settings;
}

std::string SettingsDifference(const json& a, const json& b) {
  std::set<std::string> keys;
  for (const json* settings : {&a, &b}) {
    if (!settings->is_object()) continue;
    for (const auto& [key, value] : settings->items()) keys.insert(key);
  }
  for (const std::string& key : keys) {
    if (Shown(a, key) != Shown(b, key)) return key + ": " + Shown(a, key) + " and " + Shown(b, key);
  }
  return "";
}

json ReadSettings(const std::string& directory) {
  const auto text = ReadFile(directory + kSettings);
  const json settings = text.ok() ? ParseJson(*text) : json();
  return settings.is_object() ? settings : json();
}

EvalState StateOf(const std::string& directory) {
  const bool complete = PathExists(directory + kSummary);
  if (!complete && !PathExists(directory + kSettings)) return EvalState::kNothing;
  if (!IsOfEvaluation(ReadSettings(directory))) return EvalState::kForeign;
  return complete ? EvalState::kComplete : EvalState::kUnfinished;
}

bool IsCompleteWith(const std::string& directory, const ordered_json& settings) {
  if (StateOf(directory) != EvalState::kComplete) return false;
  json made = ReadSettings(directory);
  json wanted = ParseJson(SettingsText(settings));
  if (!made.is_object()) return false;
  for (json* one : {&made, &wanted}) {
    for (const char* key : {"checkpoint", "cp", "tp", "device"}) one->erase(key);
  }
  return SettingsDifference(made, wanted).empty();
}

Status ForeignError(const std::string& directory) {
  return MakeError(ExitCode::kIo, "EVAL-EXISTS",
                   Printable(directory) +
                       ": has a settings.json or summary.jsonl that is no evaluation's (expected "
                       "tasks, samples and model in settings.json); name another directory, or "
                       "remove it yourself");
}

Status RemoveEvaluation(const std::string& directory) {
  const json settings = ReadSettings(directory);
  if (!IsOfEvaluation(settings)) return ForeignError(directory);
  std::vector<std::string> names = {kParts, "/depths.svg"};
  for (const char* summary : {kParts, kSummary}) {
    for (const ordered_json& line : WholeSummaryLines(directory + summary))
      names.push_back("/" + NameOf(line) + ".jsonl");
  }
  // Those that are in no line: one was written and its line was not, or the lines are damaged.
  if (settings.is_object() && settings.contains("tasks") && settings.contains("lengths_tokens")) {
    for (const json& task : settings["tasks"]) {
      for (const json& length : settings["lengths_tokens"]) {
        if (task.is_string() && length.is_number_integer())
          names.push_back("/" + NameOf(task.get<std::string>(), length.get<int64_t>()) + ".jsonl");
      }
    }
  }
  if (!settings.value("prompts", json()).is_null()) {
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all, ListDirectory(directory));
    for (const std::string& name : all) {
      if (IsOfPrompts(name)) names.push_back("/" + name);
    }
  }
  names.emplace_back(kSummary);
  names.emplace_back(kSettings);  // while it is there this is an evaluation, and the rest is known
  for (const std::string& name : names) {
    if (name.find('/', 1) == std::string::npos && PathExists(directory + name))
      SALA_RETURN_IF_ERROR(RemoveTree(directory + name));
  }
  return OkStatus();
}

void EvalWriter::ReadParts() {
  for (const ordered_json& line : WholeSummaryLines(target_.directory + kParts)) {
    if (!PathExists(target_.directory + "/" + NameOf(line) + ".jsonl")) break;
    done_.push_back(NameOf(line));
    summary_.push_back(line);
  }
}

StatusOr<EvalWriter> EvalWriter::Open(const EvalTarget& target) {
  EvalWriter writer(target);
  const std::string& directory = target.directory;
  const EvalState state = StateOf(directory);
  if (state == EvalState::kForeign) return ForeignError(directory);
  const std::string text = SettingsText(target.settings);
  std::string found = ": holds an evaluation; name";
  if (state == EvalState::kUnfinished) {
    const std::string difference = SettingsDifference(ReadSettings(directory), ParseJson(text));
    if (difference.empty()) {
      writer.ReadParts();
      return writer;
    }
    found = ": holds an unfinished evaluation with other settings (there and now): " + difference +
            "; give the command it was begun with, name";
  }
  if (state != EvalState::kNothing && !target.replace) {
    return MakeError(ExitCode::kIo, "EVAL-EXISTS",
                     Printable(directory) + found + " another directory, or --force replaces it");
  }
  if (state != EvalState::kNothing) SALA_RETURN_IF_ERROR(RemoveEvaluation(directory));
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + kSettings, text));
  return writer;
}

Status EvalWriter::Add(const TaskResult& result) {
  const std::string name = NameOf(result.task, result.length);
  SALA_RETURN_IF_ERROR(
      WriteFileAtomically(target_.directory + "/" + name + ".jsonl", SamplesText(result)));
  summary_.push_back(SummaryLine(result, target_.depths, target_.identity));
  done_.push_back(name);
  return WriteFileAtomically(target_.directory + kParts, SummaryText(summary_));
}

Status EvalWriter::Finish() {
  const std::string& directory = target_.directory;
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/depths.svg", EvaluationSvg(summary_)));
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + kParts, SummaryText(summary_)));
  // Never both of them, whenever the process ends.
  SALA_RETURN_IF_ERROR(RenamePath(directory + kParts, directory + kSummary));
  return FsyncDirectory(directory);
}

Status MakeEvaluation(const parallel::Mesh& mesh, const Evaluation& evaluation,
                      const ScoreDocument& score, const EvalTarget& target,
                      const std::function<Status()>& between) {
  const bool root = mesh.world().rank() == 0;
  std::optional<EvalWriter> writer;
  Status opened = OkStatus();
  if (root) {
    auto made = EvalWriter::Open(target);
    opened = made.status();
    if (made.ok()) writer = std::move(made).value();
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(mesh.world(), opened));
  SALA_ASSIGN_OR_RETURN(
      const std::vector<std::string> texts,
      mesh.world().AllGatherText(root ? json(writer->done()).dump() : std::string()));
  const auto done = ParseJson(texts[0]).get<std::set<std::string>>();
  EvalHooks hooks;
  hooks.skip = [&done](const std::string& task, int64_t length) {
    return done.count(NameOf(task, length)) > 0;
  };
  hooks.done = [&](const TaskResult& result) -> Status {
    SALA_RETURN_IF_ERROR(
        parallel::AgreeOnStatus(mesh.world(), root ? writer->Add(result) : OkStatus()));
    return between ? between() : OkStatus();
  };
  SALA_RETURN_IF_ERROR(evaluation.Run(mesh, score, hooks).status());
  return parallel::AgreeOnStatus(mesh.world(), root ? writer->Finish() : OkStatus());
}

}  // namespace sala::recipes
