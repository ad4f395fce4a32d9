// What the benchmarks of `sala bench` share: the head of a report, the model that is measured, and
// numbers of repeated measurements.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"
#include "core/status.h"
#include "model/config.h"

namespace sala::launch {

struct CommandLine;

struct StepBenchOptions {
  std::string config;  // "": DefaultBenchModel
  int64_t seq_len = 2048;
  int threads = 1;
  int64_t steps = 5;
  bool recompute = false;
  bool sparse = false;
  bool peers = true;  // the matrix products of other libraries, where installed
  std::string json;   // "": no file
};
Status BenchStep(const StepBenchOptions& options, const std::string& command);

struct ScalingBenchOptions {
  std::string config;
  std::vector<int64_t> lengths;  // tokens of the document, rising
  int threads = 1;
  int64_t rounds = 3;
  int64_t longest_dense = 0;  // no dense attention above it
  std::string json;
};
Status BenchScaling(const ScalingBenchOptions& options, const std::string& command);

// The key `model` of a YAML file, as a stage has it; a hybrid of about 15M parameters where `path`
// is empty: the proportions of the released model, a quarter of the layers softmax with grouped
// queries, first and last layer among them.
StatusOr<model::ModelConfig> ReadBenchModel(const std::string& path);

// Where, from which sources and by which command something was measured: one line each, and the
// first entries of a report's JSON.
void PrintOrigin(const std::string& command);
nlohmann::ordered_json OriginJson(const std::string& command);

// The same and the model.
void PrintBenchHead(const model::ModelConfig& config, const std::string& command);

// The command as it was typed, for the head of a report.
std::string CommandText(const CommandLine& line);

// Whether the file of --json can be written, before minutes of measuring; "" can.
Status TryReport(const std::string& path);

// Smallest, median and largest of what was measured several times.
struct Measured {
  double least = 0, median = 0, most = 0;
};
Measured MeasuredOf(const std::vector<double>& values);  // not empty

}  // namespace sala::launch
