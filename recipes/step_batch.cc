#include "recipes/step_batch.h"

#include <optional>
#include <string>
#include <utility>

#include "core/hash.h"
#include "core/trace.h"

namespace sala::recipes {
namespace {

// The positions of the global batch that a rank takes: each ranks-th one, or, so that the shares
// are subtrees of the sum over micro-batches, as many whole micro-batches in a row as the others.
std::vector<int64_t> ShareOf(const BatchConfig& batch, int64_t rank, int64_t ranks) {
  const int64_t in_a_row =
      batch.rank_independent_sums ? batch.micro_batches() / ranks * batch.micro_batch_sequences : 1;
  std::vector<int64_t> share;
  for (int64_t p = 0; p < batch.global_batch_sequences(); ++p) {
    if (p / in_a_row % ranks == rank) share.push_back(p);
  }
  return share;
}

}  // namespace

StatusOr<StepData> LoadStep(Session& session, const BatchConfig& config, data::SampleStream& stream,
                            int64_t done) {
  const PartScope part(StepPart::kData);
  parallel::Communicator& group = session.mesh().dp_group();
  const int64_t batch = config.global_batch_sequences();
  StepData step;
  // [targets, tokens, request, then the CRC of every sample]: one integer all-reduce tells all
  // ranks everything they must agree on.
  std::vector<int64_t> sums(static_cast<size_t>(2 + batch), 0);
  Status status = OkStatus();
  std::optional<parallel::Section> section(std::in_place, session.watchdog(),
                                           parallel::Phase::kData);
  for (const int64_t p : ShareOf(config, session.mesh().dp_rank(), session.mesh().dp_size())) {
    auto sample = stream.Get(done * batch + p);
    status = sample.status();
    if (!status.ok()) break;
    sums[0] += sample->targets();
    sums[1] += stream.seq_len() - sample->padding;
    sums[static_cast<size_t>(2 + p)] = data::DataCrc(*sample);
    step.mine.push_back(std::move(sample).value());
  }
  section.reset();
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), status));
  SALA_RETURN_IF_ERROR(group.AllReduce(std::span<int64_t>(sums), parallel::Reduce::kSum));
  auto request = static_cast<int64_t>(PendingRequest());
  SALA_RETURN_IF_ERROR(
      session.world().AllReduce(std::span<int64_t>(&request, 1), parallel::Reduce::kMax));
  step.counts = {.targets = sums[0], .tokens = sums[1]};
  step.crc = Crc32c(sums.data() + 2, static_cast<size_t>(batch) * sizeof(int64_t));
  step.request = static_cast<Request>(request);
  return step;
}

Status CheckShares(const BatchConfig& batch, const parallel::MeshConfig& mesh) {
  if (!batch.rank_independent_sums) return OkStatus();
  if (mesh.cp > 1 || mesh.tp > 1 || mesh.zero_stage > 1) {
    return MakeError(ExitCode::kConfig, "CFG-MESH",
                     "batch.rank_independent_sums is on with parallel.cp " +
                         std::to_string(mesh.cp) + ", tp " + std::to_string(mesh.tp) +
                         " and zero_stage " + std::to_string(mesh.zero_stage) +
                         "; sums are independent of the number of ranks with cp 1, tp 1 and "
                         "zero_stage 0 or 1 only: change these or turn it off");
  }
  const int64_t ranks = mesh.dp;
  const bool power_of_two = (ranks & (ranks - 1)) == 0;
  if (power_of_two && batch.micro_batches() % ranks == 0) return OkStatus();
  return MakeError(ExitCode::kConfig, "CFG-MESH",
                   "batch.rank_independent_sums is on, but the " +
                       std::to_string(batch.micro_batches()) + " micro-batches of a step (" +
                       std::to_string(batch.global_batch_sequences()) + " sequences by " +
                       std::to_string(batch.micro_batch_sequences) +
                       ") cannot be shared out evenly over " + std::to_string(ranks) +
                       " ranks; expected a number of ranks that is a power of two and divides "
                       "them: change the ranks, the batch or micro_batch_sequences");
}

model::Batch MakeBatch(const std::vector<data::PackedSample>& samples) {
  model::Batch batch;
  batch.cu_seqlens.push_back(0);
  for (const data::PackedSample& sample : samples) {
    const auto base = static_cast<int32_t>(batch.tokens.size());
    const int64_t kept = static_cast<int64_t>(sample.tokens.size()) - sample.padding;
    batch.tokens.insert(batch.tokens.end(), sample.tokens.begin(), sample.tokens.begin() + kept);
    batch.labels.insert(batch.labels.end(), sample.labels.begin(), sample.labels.begin() + kept);
    batch.positions.insert(batch.positions.end(), sample.positions.begin(),
                           sample.positions.begin() + kept);
    for (size_t s = 1; s < sample.cu_seqlens.size(); ++s) {
      if (sample.cu_seqlens[s] <= kept) batch.cu_seqlens.push_back(base + sample.cu_seqlens[s]);
    }
  }
  return batch;
}

StatusOr<std::vector<model::Batch>> HeldOutBatches(const data::ValidationSet& set,
                                                   const parallel::Mesh& mesh) {
  std::vector<model::Batch> batches;
  for (int64_t first = 0; first < set.size(); first += mesh.dp_size()) {
    std::vector<data::PackedSample> samples;
    if (const int64_t i = first + mesh.dp_rank(); i < set.size()) {
      SALA_ASSIGN_OR_RETURN(data::PackedSample sample, set.Get(i));
      samples.push_back(std::move(sample));
    }
    batches.push_back(MakeBatch(samples));
  }
  return batches;
}

}  // namespace sala::recipes
