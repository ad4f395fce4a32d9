#include "recipes/step_report.h"

#include <cstdio>
#include <ctime>

#include "core/clock.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/memory.h"
#include "recipes/text.h"

namespace sala::recipes {
namespace {

using Values = StepValues;

// The peak of the process with most, beside what the plan said of it.
void LogResident(const nlohmann::ordered_json& ranks) {
  size_t most = 0;
  const auto of = [&ranks](size_t rank, const char* key) {
    return ranks[rank]["memory"][key].get<double>();
  };
  for (size_t rank = 1; rank < ranks.size(); ++rank) {
    if (of(rank, "resident") > of(most, "resident")) most = rank;
  }
  const double planned = of(most, "resident_planned");
  const double resident = of(most, "resident");
  if (planned == 0 || resident == 0) return;
  SALA_LOG(Info) << "memory of rank " << most << ": " << Format("%.1f", resident / 1e6)
                 << " MB resident at most, planned " << Format("%.1f", planned / 1e6) << " MB ("
                 << Format("%+.1f", 100 * (planned / resident - 1)) << " %)";
}

}  // namespace

StepReport::StepReport(Session& session, const StepLoopConfig& config, const StepTask& task)
    : session_(session),
      config_(config),
      task_(task),
      display_(config.label, config.batch.steps, session.is_root()) {}

void StepReport::Begin(const Progress& at_start) {
  at_start_ = at_start;
  logged_comm_ = parallel::ProcessCommLog().Totals();
}

void StepReport::GradientSummed() { summed_comm_ = parallel::ProcessCommLog().Totals(); }

Status StepReport::Step(const StepData& data, const Values& values, const UpdateResult& update,
                        double lr, const Progress& progress, const StepTimes& times) {
  stragglers_.Add(ClockSeconds() - times.started, times.comm_seconds);
  const double step_seconds = ClockSeconds() - times.started;
  const double rate = static_cast<double>(data.counts.tokens) / step_seconds;
  const bool last = progress.step == config_.batch.steps;
  const bool logged =
      last || progress.step % session_.config().run.log_every_steps == 0 || update.skipped;
  if (logged && session_.world().size() > 1) {
    SALA_ASSIGN_OR_RETURN(const nlohmann::ordered_json line,
                          stragglers_.Gather(session_.world(), session_.global_step));
    session_.WriteStragglers(line);
  }
  if (logged) {
    comm_ = parallel::CommDelta(logged_comm_, summed_comm_);
    logged_comm_ = summed_comm_;
  }
  if (!session_.is_root()) return OkStatus();
  if (logged) {
    nlohmann::ordered_json line = {{"step", session_.global_step},
                                   {"stage", config_.position.stage},
                                   {"phase", config_.position.phase},
                                   {"stage_step", progress.step},
                                   {"time", static_cast<int64_t>(std::time(nullptr))},
                                   {"tokens", data.counts.tokens},
                                   {"target_tokens", data.counts.targets},
                                   {"tokens_total", progress.tokens}};
    for (const auto& [name, value] : values) line[name] = NumberOrNull(value);
    line["loss_hex"] = HexFloat(values.front().second);
    line["grad_norm"] = NumberOrNull(update.grad_norm);
    line["grad_norm_hex"] = HexFloat(update.grad_norm);
    line["clipped"] = update.clipped;
    line["lr"] = lr;
    line["skipped"] = update.skipped;
    line["tokens_per_s"] = rate;
    line["step_ms"] = step_seconds * 1e3;
    AddTimes(times, &line);
    const double beside = session_.mesh().queue().seconds_run();
    line["comm_beside_ms"] = (beside - logged_beside_) * 1e3;
    logged_beside_ = beside;
    line["comm"] = comm_;
    AddBatch(data, progress, step_seconds, &line);
    line["arena_peak_mib"] = static_cast<double>(session_.arena().peak_bytes()) / (1 << 20);
    line["data_crc"] = Hex32(data.crc);
    session_.WriteMetrics(line);
  }
  display_.Update(progress.step, values.front().first + " " +
                                     Format("%.4f", values.front().second) + "  lr " +
                                     Format("%.2e", lr) + "  " + Format("%.0f", rate) + " tok/s");
  session_.WriteStatus("training", config_.position.stage, session_.global_step);
  return OkStatus();
}

void StepReport::AddTimes(const StepTimes& times, nlohmann::ordered_json* line) {
  for (const auto& [part, key] :
       {std::pair(StepPart::kData, "data_ms"), std::pair(StepPart::kForward, "forward_ms"),
        std::pair(StepPart::kLoss, "loss_ms"), std::pair(StepPart::kBackward, "backward_ms"),
        std::pair(StepPart::kOptimizer, "optim_ms")})
    (*line)[key] = times.parts[static_cast<size_t>(part)] * 1e3;
  (*line)["comm_ms"] = times.comm_seconds * 1e3;
  (*line)["save_stall_ms"] = session_.TakeSaveSeconds() * 1e3;
}

void StepReport::AddBatch(const StepData& data, const Progress& progress, double step_seconds,
                          nlohmann::ordered_json* line) const {
  const auto slots =
      static_cast<double>(config_.batch.global_batch_sequences() * config_.batch.seq_len_tokens);
  (*line)["padding_share"] = 1 - static_cast<double>(data.counts.tokens) / slots;
  // Of the samples that this rank has.
  double work = 0;
  double documents = 0;
  for (const data::PackedSample& sample : data.mine) {
    const int64_t kept = config_.batch.seq_len_tokens - sample.padding;
    for (size_t s = 1; s < sample.cu_seqlens.size() && sample.cu_seqlens[s] <= kept; ++s) {
      work += task_.WorkOf(sample.cu_seqlens[s] - sample.cu_seqlens[s - 1]);
      ++documents;
    }
  }
  if (!data.mine.empty())
    (*line)["segments_mean"] = documents / static_cast<double>(data.mine.size());
  const parallel::MeshConfig& mesh = session_.mesh().config();
  if (work > 0)
    (*line)["gflop_per_s"] = work / static_cast<double>(mesh.cp * mesh.tp) / step_seconds / 1e9;
  (*line)["stage_steps"] = config_.batch.steps;
  const double per_step =
      (progress.seconds - at_start_.seconds) / static_cast<double>(progress.step - at_start_.step);
  (*line)["eta_s"] = per_step * static_cast<double>(config_.batch.steps - progress.step);
  (*line)["host_mem_gib"] = static_cast<double>(ResidentPeakBytes()) / (1 << 30);
}

Status StepReport::End() {
  display_.Finish();
  SALA_RETURN_IF_ERROR(Ranks());
  if (session_.is_root()) {
    for (const std::string& row : stragglers_.Table(session_.watchdog().hosts()))
      SALA_LOG(Info) << row;
  }
  return OkStatus();
}

// What every rank exchanged in the last logged step, and the memory it needed.
Status StepReport::Ranks() {
  const nlohmann::ordered_json mine = {{"comm", comm_},
                                       {"memory",
                                        {{"buffers", HostBufferPeakBytes()},
                                         {"activations", session_.arena().peak_bytes()},
                                         {"work_space", session_.scratch().peak_bytes()},
                                         {"resident", ResidentPeakBytes()},
                                         {"resident_planned", session_.planned_resident()}}}};
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                        session_.world().AllGatherText(mine.dump()));
  auto ranks = nlohmann::ordered_json::array();
  for (const std::string& text : all) ranks.push_back(nlohmann::ordered_json::parse(text));
  if (session_.is_root()) LogResident(ranks);
  session_.WriteRanks({{"step", session_.global_step},
                       {"stage", config_.position.stage},
                       {"phase", config_.position.phase},
                       {"ranks", ranks}});
  return OkStatus();
}

}  // namespace sala::recipes
