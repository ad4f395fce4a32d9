#include "recipes/report_data.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <sstream>
#include <tuple>

#include "core/checkpoint.h"
#include "core/file.h"
#include "core/json.h"
#include "core/run_lock.h"
#include "recipes/config.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

constexpr size_t kWarnings = 200;  // shown

// A count that a line names, or -1.
int64_t CountIn(const json& line, const char* key) {
  const double count = ReportNumber(line, key);
  // Beyond 2^53 a double has no steps of one; no run gets there.
  return count >= 0 && count < 9e15 ? static_cast<int64_t>(count) : -1;
}

int64_t StepOf(const json& line) { return CountIn(line, "step"); }

bool IsOfStep(const json& line) { return StepOf(line) >= 0 && !ReportText(line, "stage").empty(); }

class Reader {
 public:
  explicit Reader(std::string directory) { data_.directory = std::move(directory); }

  StatusOr<ReportData> Read();

 private:
  std::string path(const std::string& name) const { return data_.directory + "/" + name; }
  // "" with a note where the file is there and cannot be read.
  std::string TextOf(const std::string& name);
  json JsonOf(const std::string& name);
  std::vector<json> LinesOf(const std::string& name) {
    return ParseJsonLines(TextOf(name), name, &data_.notes);
  }
  std::vector<std::string> Names(const std::string& folder) const {
    return ListDirectory(path(folder)).value_or(std::vector<std::string>());
  }
  void ReadConfiguration();
  void ReadMetrics();
  void ReadEvaluations();
  void ReadCheckpoints();
  void ReadWarnings();

  ReportData data_;
};

std::string Reader::TextOf(const std::string& name) {
  if (!PathExists(path(name))) return "";
  const auto text = ReadFile(path(name));
  if (!text.ok()) data_.notes.push_back(MessageOf(text.status()));
  return text.value_or("");
}

json Reader::JsonOf(const std::string& name) {
  const std::string text = TextOf(name);
  if (text.empty()) return nullptr;
  json value = ParseJson(text);
  if (!value.is_discarded()) return value;
  data_.notes.push_back(name + ": is no JSON; left out");
  return nullptr;
}

int64_t StepsOf(const StageConfig& stage) {
  if (!stage.halo) return stage.batch.steps;
  return stage.halo->align.batch.steps + stage.halo->distil.batch.steps +
         (stage.halo->finetune ? stage.halo->finetune->batch.steps : 0);
}

void Reader::ReadConfiguration() {
  if (const std::string text = TextOf("config.yaml"); !text.empty())
    data_.configuration.emplace_back("config.yaml", text);
  for (const std::string& name : Names("stages"))
    data_.configuration.emplace_back("stages/" + name, TextOf("stages/" + name));
  if (data_.configuration.empty()) return;
  const auto pipeline = LoadPipeline(path("config.yaml"), {});
  if (!pipeline.ok()) {
    data_.notes.push_back(MessageOf(pipeline.status()));
    return;
  }
  data_.name = pipeline->name;
  for (const StageConfig& stage : pipeline->stages) {
    data_.stages.push_back({.name = stage.name,
                            .kind = stage.kind == StageKind::kHalo  ? "halo"
                                    : stage.kind == StageKind::kSft ? "sft"
                                                                    : "pretrain",
                            .steps = StepsOf(stage)});
  }
}

void Reader::ReadMetrics() {
  data_.train = LinesThatCount(LinesOf("metrics/train.jsonl"), &data_.resumes);
  std::map<std::tuple<int64_t, std::string, std::string>, json> validation;
  for (json& line : LinesOf("metrics/valid.jsonl")) {
    if (IsOfStep(line))
      validation[{StepOf(line), ReportText(line, "stage"), ReportText(line, "phase")}] = line;
  }
  // Behind the last step that counts lie those of an earlier start only.
  const int64_t last = data_.train.empty() ? 0 : StepOf(data_.train.back());
  for (auto& [key, line] : validation) {
    if (std::get<0>(key) <= last) data_.validation.push_back(std::move(line));
  }
  for (const json& line : data_.train) {
    const std::string stage = ReportText(line, "stage");
    if (data_.StageOf(stage) == data_.stages.size()) data_.stages.push_back({.name = stage});
    ReportStage& of = data_.stages[data_.StageOf(stage)];
    // Not every step need be logged.
    const auto within = CountIn(line, "stage_step");
    if (of.first == 0)
      of.first = within >= 1 && within <= StepOf(line) ? StepOf(line) - within + 1 : StepOf(line);
    of.last = StepOf(line);
  }
  for (json& line : LinesOf("metrics/gates.jsonl")) {
    const std::string stage = ReportText(line, "stage");
    if (stage.empty() || !line.contains("means") || !line["means"].is_array()) continue;
    std::erase_if(data_.gates,
                  [&stage](const json& old) { return ReportText(old, "stage") == stage; });
    data_.gates.push_back(std::move(line));
  }
}

void Reader::ReadEvaluations() {
  for (const std::string& name : Names("eval")) {
    for (json& line : LinesOf("eval/" + name + "/summary.jsonl")) {
      if (!ReportText(line, "task").empty()) data_.evaluations.push_back(std::move(line));
    }
  }
}

void Reader::ReadCheckpoints() {
  for (const CheckpointListing& listing : ListCheckpoints(path("checkpoints"))) {
    ReportCheckpoint checkpoint = {
        .name = listing.directory.substr(listing.directory.rfind('/') + 1),
        .stage = listing.stage,
        .step = listing.global_step,
        .stage_final = listing.stage_final};
    for (const std::string& file :
         ListDirectory(listing.directory).value_or(std::vector<std::string>()))
      checkpoint.bytes += FileSize(listing.directory + "/" + file).value_or(0);
    data_.checkpoints.push_back(checkpoint);
  }
}

// Lines read "DATE TIME level text".
void Reader::ReadWarnings() {
  std::deque<std::string> kept;
  for (const std::string& name : Names("logs")) {
    if (name.rfind("rank-", 0) != 0) continue;
    std::istringstream lines(TextOf("logs/" + name));
    for (std::string line; std::getline(lines, line);) {
      const size_t level = line.find(' ', line.find(' ') + 1);
      if (level == std::string::npos ||
          (line.compare(level, 6, " warn ") != 0 && line.compare(level, 7, " error ") != 0))
        continue;
      kept.push_back(line);
      if (kept.size() <= kWarnings) continue;
      kept.pop_front();
      ++data_.warnings_left_out;
    }
  }
  data_.warnings.assign(kept.begin(), kept.end());
}

StatusOr<ReportData> Reader::Read() {
  if (!PathExists(data_.directory)) {
    return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                     data_.directory + ": does not exist; name the directory of a run (run.dir)");
  }
  if (!PathExists(path("config.yaml")) && !PathExists(path("status.json"))) {
    return MakeError(ExitCode::kNoInput, "RUN-NONE",
                     data_.directory +
                         ": is not the directory of a run: it has neither config.yaml nor "
                         "status.json; name the one that `sala train` was given (run.dir)");
  }
  data_.status = JsonOf("status.json");
  data_.environment = JsonOf("environment.json");
  data_.summary = JsonOf("summary.json");
  data_.selection = JsonOf("halo/selection.json");
  ReadConfiguration();
  ReadMetrics();
  ReadEvaluations();
  ReadCheckpoints();
  ReadWarnings();
  if (data_.name.empty()) data_.name = data_.directory;
  return std::move(data_);
}

}  // namespace

double ReportNumber(const json& object, const char* key) {
  if (!object.is_object()) return std::numeric_limits<double>::quiet_NaN();
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>()
                                               : std::numeric_limits<double>::quiet_NaN();
}

std::string ReportText(const json& object, const char* key) {
  if (!object.is_object()) return "";
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

bool ReportData::live() const {
  const std::string state = ReportText(status, "state");
  return state != "done" && state != "failed" && state != "stopping" && gone.empty();
}

size_t ReportData::StageOf(const std::string& stage) const {
  const auto it = std::find_if(stages.begin(), stages.end(),
                               [&stage](const ReportStage& each) { return each.name == stage; });
  return static_cast<size_t>(it - stages.begin());
}

std::vector<json> ParseJsonLines(const std::string& text, const std::string& name,
                                 std::vector<std::string>* notes) {
  std::vector<json> lines;
  int64_t bad = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // still being written
    json line = ParseJson(std::string_view(text).substr(begin, end - begin));
    if (line.is_object()) {
      lines.push_back(std::move(line));
    } else if (end > begin) {
      ++bad;
    }
    begin = end + 1;
  }
  if (bad > 0)
    notes->push_back(
        name + ": " + std::to_string(bad) +
        (bad == 1 ? " line is no JSON object; left out" : " lines are no JSON objects; left out"));
  return lines;
}

std::vector<json> LinesThatCount(const std::vector<json>& lines, std::vector<int64_t>* resumes) {
  std::map<int64_t, json> counting;
  for (const json& line : lines) {
    const int64_t step = StepOf(line);
    if (step < 0) continue;
    if (line.contains("event")) {
      if (!counting.empty()) resumes->push_back(step);
      counting.erase(counting.upper_bound(step), counting.end());
    } else if (IsOfStep(line)) {
      counting[step] = line;
    }
  }
  std::vector<json> result;
  result.reserve(counting.size());
  for (auto& [step, line] : counting) result.push_back(std::move(line));
  return result;
}

StatusOr<ReportData> ReadReportData(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(ReportData data, Reader(directory).Read());
  if (data.live()) data.gone = GoneRun(directory);
  // It may have ended in order between the two looks.
  if (!data.gone.empty()) {
    SALA_ASSIGN_OR_RETURN(ReportData again, Reader(directory).Read());
    if (!again.live()) return again;
  }
  return data;
}

}  // namespace sala::recipes
