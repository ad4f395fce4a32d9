#include "data/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

namespace sala::data {
namespace {

int64_t Padding(const ViewSample& sample, int64_t seq_len) {
  return std::accumulate(sample.runs.begin(), sample.runs.end(), seq_len,
                         [](int64_t left, const DocumentRun& run) { return left - run.length; });
}

Status Measure(View& view, const DataConfig& config, int64_t seq_len, ViewPlan* plan) {
  plan->measured = std::min(plan->samples, plan->samples_per_epoch);
  for (int64_t k = 0; k < plan->measured; ++k) {
    const ViewSample sample = view.Sample(k);
    const auto segments = static_cast<int64_t>(sample.runs.size());
    plan->padding += Padding(sample, seq_len);
    plan->segments += segments;
    plan->min_segments = k == 0 ? segments : std::min(plan->min_segments, segments);
    plan->max_segments = std::max(plan->max_segments, segments);
    SALA_ASSIGN_OR_RETURN(const int64_t targets, CountTargets(view, sample, config.document_mask));
    plan->targets += targets;
  }
  return OkStatus();
}

StatusOr<int64_t> CountTruncated(const View& view) {
  if (view.rule().packing == Packing::kConcat ||
      view.rule().long_documents != LongDocuments::kTruncate)
    return int64_t{0};
  int64_t truncated = 0;
  for (int64_t f = 0; f < view.store().files(); ++f) {
    SALA_ASSIGN_OR_RETURN(const TokenFile* file, view.store().File(f));
    for (const int64_t document : view.documents_of_file(f))
      truncated += file->length(document) > view.rule().seq_len ? 1 : 0;
  }
  return truncated;
}

}  // namespace

double ViewPlan::epochs() const {
  return static_cast<double>(samples) / static_cast<double>(samples_per_epoch);
}

double ViewPlan::padding_share(int64_t seq_len) const {
  return measured == 0 ? 0.0
                       : static_cast<double>(padding) / static_cast<double>(measured * seq_len);
}

double ViewPlan::learned_share(int64_t seq_len) const {
  const int64_t filled = measured * seq_len - padding;
  return filled == 0 ? 0.0 : static_cast<double>(targets) / static_cast<double>(filled);
}

double DataPlan::padding_share() const {
  double padding = 0;
  for (const ViewPlan& view : views)
    padding += view.padding_share(seq_len) * static_cast<double>(view.samples);
  return samples == 0 ? 0.0 : padding / static_cast<double>(samples);
}

int64_t DataPlan::tokens() const {
  const auto slots = static_cast<double>(samples * seq_len);
  return std::llround(slots * (1.0 - padding_share()));
}

StatusOr<DataPlan> PlanData(SampleStream& stream, int64_t samples) {
  DataPlan plan{.seq_len = stream.seq_len(), .samples = samples, .views = {}};
  const std::vector<int64_t> counts = stream.CountsBefore(samples);
  const std::vector<int64_t>& weights = stream.integer_weights();
  const auto weight_sum =
      static_cast<double>(std::accumulate(weights.begin(), weights.end(), int64_t{0}));
  for (size_t i = 0; i < counts.size(); ++i) {
    View& view = *stream.views()[i];
    const DatasetInfo& info = view.store().info();
    ViewPlan row{.name = view.name(),
                 .dataset = info.directory,
                 .chat = info.sft(),
                 .share = static_cast<double>(weights[i]) / weight_sum,
                 .dataset_documents = info.documents,
                 .removed = view.removed(),
                 .documents = view.documents(),
                 .tokens = view.tokens(),
                 .samples_per_epoch = view.samples_per_epoch(),
                 .max_epochs = view.max_epochs(),
                 .samples = counts[i]};
    SALA_ASSIGN_OR_RETURN(row.truncated, CountTruncated(view));
    SALA_RETURN_IF_ERROR(Measure(view, stream.config(), stream.seq_len(), &row));
    plan.views.push_back(std::move(row));
  }
  return plan;
}

nlohmann::ordered_json ToJson(const DataPlan& plan) {
  auto views = nlohmann::ordered_json::array();
  for (const ViewPlan& view : plan.views) {
    views.push_back({{"view", view.name},
                     {"dataset", view.dataset},
                     {"kind", view.chat ? "sft" : "pretrain"},
                     {"share", view.share},
                     {"dataset_documents", view.dataset_documents},
                     {"held_out", view.removed.other_split},
                     {"below_min_tokens", view.removed.too_short},
                     {"not_below_max_tokens", view.removed.too_long},
                     {"dropped_over_seq_len", view.removed.over_seq_len},
                     {"truncated", view.truncated},
                     {"documents", view.documents},
                     {"tokens", view.tokens},
                     {"samples_per_epoch", view.samples_per_epoch},
                     {"samples", view.samples},
                     {"epochs", view.epochs()},
                     {"max_epochs", view.max_epochs},
                     {"verdict", view.used_too_often() ? "MIX-EPOCHS" : "ok"},
                     {"measured_samples", view.measured},
                     {"padding_share", view.padding_share(plan.seq_len)},
                     {"learned_share", view.learned_share(plan.seq_len)},
                     {"segments_min", view.min_segments},
                     {"segments_mean", view.measured == 0 ? 0.0
                                                          : static_cast<double>(view.segments) /
                                                                static_cast<double>(view.measured)},
                     {"segments_max", view.max_segments}});
  }
  return {{"seq_len", plan.seq_len},
          {"samples", plan.samples},
          {"slots", plan.samples * plan.seq_len},
          {"tokens", plan.tokens()},
          {"padding_share", plan.padding_share()},
          {"views", views}};
}

StatusOr<int64_t> CountTargets(const View& view, const ViewSample& sample, bool document_mask) {
  const bool chat = view.store().info().sft();
  int64_t targets = 0;
  std::vector<uint8_t> mask;
  bool document_ended = false;  // just before the run
  for (const DocumentRun& run : sample.runs) {
    SALA_ASSIGN_OR_RETURN(TokenFile * file, view.store().File(run.file));
    const bool ends = run.start + run.length == file->length(run.document);
    const bool joins = !document_mask && document_ended && run.start == 0;
    document_ended = ends;
    // Learned are the tokens after the run's first, and the one behind it; its first where
    // documents are joined.
    const int64_t first = run.start + (joins ? 0 : 1);
    const int64_t count = run.start + run.length + (ends ? 0 : 1) - first;
    if (!chat) {
      targets += count;
      continue;
    }
    mask.resize(static_cast<size_t>(count));
    SALA_RETURN_IF_ERROR(file->CopyMask(file->begin(run.document) + first, count, mask.data()));
    targets += std::count(mask.begin(), mask.end(), uint8_t{1});
  }
  return targets;
}

StatusOr<std::string> TraceSamples(SampleStream& stream, int64_t first, int64_t count) {
  std::ostringstream out;
  for (int64_t g = first; g < first + count; ++g) {
    SALA_ASSIGN_OR_RETURN(const PackedSample sample, stream.Get(g));
    char crc[16];
    std::snprintf(crc, sizeof crc, "%08x", DataCrc(sample));
    const View& view = *stream.views()[static_cast<size_t>(stream.ViewOf(g))];
    out << "sample " << g << ": view " << view.name() << ", " << sample.segments.size()
        << " segments, " << sample.targets() << " targets, " << sample.padding
        << " slots of padding, crc " << crc << "\n";
    for (const SegmentMeta& segment : sample.segments) {
      out << "  " << view.store().info().files[static_cast<size_t>(segment.file)].name
          << " document " << segment.document << " tokens " << segment.start << " to "
          << segment.start + segment.length << "\n";
    }
  }
  return out.str();
}

}  // namespace sala::data
