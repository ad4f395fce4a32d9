#include "recipes/dashboards.h"

#include <array>
#include <cmath>
#include <ctime>
#include <sstream>
#include <utility>

#include "core/clock.h"
#include "core/file.h"
#include "core/json.h"
#include "core/prometheus.h"

namespace sala::recipes {
namespace {

using nlohmann::ordered_json;

template <typename Json>
std::string TextOf(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->template get<std::string>() : std::string();
}

template <typename Json>
double NumberOf(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->template get<double>() : std::nan("");
}

std::string Place(const ordered_json& line) {
  const std::string phase = TextOf(line, "phase");
  return TextOf(line, "stage") + (phase.empty() || phase == "train" ? "" : "/" + phase);
}

std::vector<std::string> EvaluationFiles(const std::string& run) {
  std::vector<std::string> files;
  for (const std::string& name :
       ListDirectory(run + "/eval").value_or(std::vector<std::string>())) {
    const std::string file = run + "/eval/" + name + "/summary.jsonl";
    if (PathExists(file)) files.push_back(file);
  }
  return files;
}

struct Gauge {
  const char* name;
  const char* key;
  const char* help;
};
constexpr std::array<Gauge, 8> kTrainGauges = {{
    {"sala_loss", "loss", "Training loss of the last logged step."},
    {"sala_gradient_norm", "grad_norm", "Global norm of the gradient before clipping."},
    {"sala_learning_rate", "lr", "Learning rate of the last logged step."},
    {"sala_tokens_per_second", "tokens_per_s", "Tokens a second, padding not counted."},
    {"sala_step_milliseconds", "step_ms", "Duration of the last logged step."},
    {"sala_padding_share", "padding_share", "Share of the slots of a batch that is padding."},
    {"sala_remaining_seconds", "eta_s", "Estimated time to the end of the phase."},
    {"sala_host_memory_gib", "host_mem_gib", "Most host memory rank 0 has had."},
}};

}  // namespace

Scalars ScalarsOf(const ordered_json& line, const std::string& group) {
  static const std::set<std::string> kPlaces = {"step", "stage_step", "stage_steps", "time"};
  Scalars scalars;
  if (TextOf(line, "stage").empty()) return scalars;
  const std::string prefix = Place(line) + "/" + (group.empty() ? "" : group + "/");
  for (const auto& [key, value] : line.items()) {
    if (value.is_number() && kPlaces.count(key) == 0)
      scalars.emplace_back(prefix + key, value.get<double>());
  }
  return scalars;
}

Scalars EvaluationScalars(const nlohmann::json& line) {
  Scalars scalars;
  if (!line.is_object() || TextOf(line, "stage").empty() || TextOf(line, "task").empty())
    return scalars;
  const double length = NumberOf(line, "length");
  const std::string prefix =
      TextOf(line, "stage") + "/eval/" + TextOf(line, "task") +
      (std::isfinite(length) ? " " + std::to_string(static_cast<int64_t>(length)) : "") + " " +
      TextOf(line, "when") + "/";
  for (const char* key : {"share", "mean_log_probability"}) {
    if (const double value = NumberOf(line, key); std::isfinite(value))
      scalars.emplace_back(prefix + key, value);
  }
  const auto buckets = line.find("buckets");
  if (buckets == line.end() || !buckets->is_array()) return scalars;
  for (const auto& bucket : *buckets) {
    if (!bucket.is_object()) continue;
    const double from = NumberOf(bucket, "from");
    const double loss = NumberOf(bucket, "loss");
    if (std::isfinite(from) && std::isfinite(loss))
      scalars.emplace_back(prefix + "loss from " + std::to_string(static_cast<int64_t>(from)),
                           loss);
  }
  return scalars;
}

Dashboards::Dashboards(const RunConfig& run, std::string name, std::string host)
    : run_(run), name_(std::move(name)), host_(std::move(host)) {
  for (std::string& file : EvaluationFiles(run_.dir)) evaluations_.insert(std::move(file));
}

Status Dashboards::Start(int64_t step) {
  if (!run_.tensorboard) return OkStatus();
  SALA_ASSIGN_OR_RETURN(events_, EventFile::Create(run_.dir + "/tb", host_));
  return events_.Start(step);
}

Status Dashboards::Train(const ordered_json& line) {
  train_ = line;
  if (!events_.is_open()) return OkStatus();
  return events_.Write(line.value("step", int64_t{0}), ScalarsOf(line));
}

Status Dashboards::Validation(const ordered_json& line) {
  validation_ = line;
  if (!events_.is_open()) return OkStatus();
  return events_.Write(line.value("step", int64_t{0}), ScalarsOf(line, "validation"));
}

Status Dashboards::Evaluations() {
  if (!events_.is_open()) return OkStatus();
  for (const std::string& file : EvaluationFiles(run_.dir)) {
    if (evaluations_.count(file) > 0) continue;
    SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
    std::istringstream lines(text);
    for (std::string each; std::getline(lines, each);) {
      const nlohmann::json line = ParseJson(each);
      const double step = line.is_object() ? NumberOf(line, "step") : std::nan("");
      if (std::isfinite(step))
        SALA_RETURN_IF_ERROR(events_.Write(static_cast<int64_t>(step), EvaluationScalars(line)));
    }
    evaluations_.insert(file);
  }
  return OkStatus();
}

std::string Dashboards::PrometheusPage() const {
  using Labels = std::vector<std::pair<std::string, std::string>>;
  const Labels run = {{"run", name_}};
  const auto with_place = [&](const ordered_json& line) {
    Labels labels = run;
    labels.emplace_back("stage", TextOf(line, "stage"));
    labels.emplace_back("phase", TextOf(line, "phase"));
    return labels;
  };
  std::vector<PrometheusFamily> families;
  families.push_back({"sala_steps_total",
                      "Training steps done, over all stages.",
                      PrometheusType::kCounter,
                      {{run, static_cast<double>(step_)}}});
  Labels state = run;
  state.emplace_back("stage", stage_);
  state.emplace_back("state", state_);
  families.push_back(
      {"sala_run_state", "1 for the state the run is in.", PrometheusType::kGauge, {{state, 1}}});
  families.push_back({"sala_updated_seconds",
                      "When this was written, in seconds since 1970.",
                      PrometheusType::kGauge,
                      {{run, static_cast<double>(std::time(nullptr))}}});
  if (train_.is_object()) {
    const Labels place = with_place(train_);
    families.push_back({"sala_phase_tokens_total",
                        "Tokens trained on in the phase, padding not counted.",
                        PrometheusType::kCounter,
                        {{place, NumberOf(train_, "tokens_total")}}});
    for (const Gauge& gauge : kTrainGauges) {
      families.push_back(
          {gauge.name, gauge.help, PrometheusType::kGauge, {{place, NumberOf(train_, gauge.key)}}});
    }
  }
  if (validation_.is_object()) {
    PrometheusFamily family = {
        "sala_validation", "Values of the last validation.", PrometheusType::kGauge, {}};
    for (const auto& [key, value] : validation_.items()) {
      if (!value.is_number() || key == "step" || key == "stage_step") continue;
      Labels labels = with_place(validation_);
      labels.emplace_back("value", key);
      family.samples.push_back({labels, value.get<double>()});
    }
    families.push_back(family);
  }
  return PrometheusText(families);
}

Status Dashboards::State(const std::string& state, const std::string& stage, int64_t step) {
  const double now = ClockSeconds();
  const bool same = state == state_ && stage == stage_;
  state_ = state;
  stage_ = stage;
  step_ = step;
  if (!run_.prometheus || (same && now - written_seconds_ < 1)) return OkStatus();
  written_seconds_ = now;
  return WriteFileAtomically(run_.dir + "/metrics.prom", PrometheusPage());
}

}  // namespace sala::recipes
