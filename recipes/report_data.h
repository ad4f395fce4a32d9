// What the files of a run directory say, read for `sala report`. A run may still be writing: a last
// line that is not complete yet is left out. What cannot be read becomes a note, not an error.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

// The number of a JSON object, NaN where there is none.
double ReportNumber(const nlohmann::json& object, const char* key);
std::string ReportText(const nlohmann::json& object, const char* key);

struct ReportStage {
  std::string name = {}, kind = {};
  int64_t steps = 0;            // by the configuration, all phases; 0: not known
  int64_t first = 0, last = 0;  // global steps with metrics; 0: none
};

struct ReportCheckpoint {
  std::string name = {}, stage = {};
  int64_t step = 0;
  bool stage_final = false;
  int64_t bytes = 0;
};

struct ReportData {
  std::string directory, name;
  nlohmann::json status, environment, summary;  // null where absent
  std::vector<ReportStage> stages;              // in order
  std::vector<nlohmann::json> train;            // by step: the last line of each that counts
  std::vector<nlohmann::json> validation;       // likewise, by step and phase
  std::vector<nlohmann::json> gates;            // the last of each stage
  nlohmann::json selection;                     // halo/selection.json
  std::vector<nlohmann::json> evaluations;      // lines of eval/*/summary.jsonl
  std::vector<ReportCheckpoint> checkpoints;    // oldest first
  std::vector<std::string> warnings;            // of the logs, newest last
  int64_t warnings_left_out = 0;
  std::vector<int64_t> resumes;  // steps behind which the run was started again
  std::vector<std::pair<std::string, std::string>> configuration;  // file, text
  std::vector<std::string> notes;                                  // what could not be read

  // By its status neither done nor stopped nor failed, but its process was killed: which one. Else
  // "".
  std::string gone = {};

  bool live() const;                               // neither done nor stopped nor failed nor gone
  size_t StageOf(const std::string& stage) const;  // its index; stages.size() where unknown
};

// Lines of JSON objects. A last line without its end is left out; others that are no objects are
// counted in a note.
std::vector<nlohmann::json> ParseJsonLines(const std::string& text, const std::string& name,
                                           std::vector<std::string>* notes);

// Of the lines of metrics/train.jsonl those that count: an event {"event": "start" or "resume",
// "step": k} takes back what came before it and is of a later step; of one step the last line.
std::vector<nlohmann::json> LinesThatCount(const std::vector<nlohmann::json>& lines,
                                           std::vector<int64_t>* resumes);

// FILE-MISSING (66): no such directory; RUN-NONE (66): it is not one of a run.
StatusOr<ReportData> ReadReportData(const std::string& directory);

}  // namespace sala::recipes
