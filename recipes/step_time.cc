#include "recipes/step_time.h"

#include <algorithm>

#include "model/work.h"
#include "recipes/halo/transfer.h"

namespace sala::recipes {
namespace {

// Shares of the peaks.
constexpr double kProducts = 0.71;
constexpr double kDenseForward = 0.31;
constexpr double kDenseBackward = 0.19;
constexpr double kSparseForward = 0.23;
constexpr double kSparseBackward = 0.17;
constexpr double kSelection = 0.27;
constexpr double kMemory = 0.9;
constexpr double kLink = 0.78;
// Traffic of a token and layer, bytes.
constexpr double kLightningForward = 60e3;
constexpr double kLightningBackward = 163e3;
constexpr double kElementwiseForward = 220e3;
constexpr double kElementwiseBackward = 354e3;
constexpr double kFeatures = 4096;  // of which they are
constexpr double kUpdateBytes = 30;
constexpr double kHiddenShare = 0.1;
constexpr double kCallSeconds = 10e-6;
constexpr double kBackwardOfForward = 2.5;  // operations of attention

// One model's passes over a sample.
struct Pass {
  model::ModelConfig config;
  bool sparse = false;
  double forwards = 1;  // of the layers; the head is never run twice
  bool backward = false;
  bool mixers_only = false;
};

std::vector<Pass> PassesOf(const PlanInput& input) {
  const double layers = input.recompute ? 2 : 1;
  switch (input.phase) {
    case PlanPhase::kAlign:
      return {{.config = input.model},
              {.config = AllLinear(input.model), .backward = true, .mixers_only = true}};
    case PlanPhase::kDistil:
      return {{.config = input.teacher},
              {.config = input.model, .forwards = layers, .backward = true}};
    case PlanPhase::kTrain:
    case PlanPhase::kFinetune:
      break;
  }
  return {{.config = input.model,
           .sparse = input.sparse_attention,
           .forwards = layers,
           .backward = true}};
}

// Of `samples` samples in `micro_batches` passes, on one of cp x tp ranks.
void AddPass(const Pass& pass, const PlanInput& input, const Gpu& gpu, double samples,
             double micro_batches, StepTime* time) {
  const int64_t n = input.batch.seq_len_tokens;
  const auto cp = static_cast<double>(input.mesh.cp);
  const auto tp = static_cast<double>(input.mesh.tp);
  const double tokens = samples * static_cast<double>(n) / (cp * tp);
  const model::ProductWeights weights = model::ProductWeightsOf(pass.config);
  const double body = pass.mixers_only ? weights.linear : weights.all() - weights.head;
  const double head = pass.mixers_only ? 0 : weights.head;
  // The mixers of the alignment have no gradient of their input.
  const double back = pass.backward ? (pass.mixers_only ? 1 : 2) : 0;
  const double flop = 2 * (body * (pass.forwards + back) + head * (1 + back)) * tokens;
  constexpr double kWeightBytes = 2;
  constexpr double kGradientBytes = 8;  // read and written, float32
  const double traffic = (body + head) / tp * micro_batches *
                         ((pass.forwards + back) * kWeightBytes + (back > 0 ? kGradientBytes : 0));
  const double memory_rate = kMemory * gpu.memory_rate;
  time->products += std::max(flop / (kProducts * gpu.bf16_flops), traffic / memory_rate);

  const model::ForwardWork work = model::ForwardWorkOf(pass.config, pass.sparse, n);
  const double per_rank = samples / (cp * tp);
  const double last_range = 2 - 1 / cp;
  const bool selects = work.selection > 0;
  const double attention = work.attention * per_rank * (selects ? 1 : last_range);
  if (!pass.mixers_only) {
    const double forward = selects ? kSparseForward : kDenseForward;
    const double backward = selects ? kSparseBackward : kDenseBackward;
    time->attention +=
        attention / gpu.bf16_flops *
        (pass.forwards / forward + (pass.backward ? kBackwardOfForward / backward : 0));
    time->selection +=
        work.selection * per_rank * last_range * pass.forwards / (kSelection * gpu.bf16_flops);
    time->elementwise +=
        tokens * static_cast<double>(pass.config.num_hidden_layers) *
        static_cast<double>(pass.config.hidden_size) / kFeatures *
        (pass.forwards * kElementwiseForward + (pass.backward ? kElementwiseBackward : 0)) /
        memory_rate;
  }
  double linear_layers = 0;
  for (int64_t layer = 0; layer < pass.config.num_hidden_layers; ++layer)
    linear_layers += pass.config.mixer(layer) == model::MixerType::kLightning ? 1 : 0;
  time->lightning +=
      tokens * linear_layers * static_cast<double>(pass.config.lightning_width()) / kFeatures *
      (pass.forwards * kLightningForward + (pass.backward ? kLightningBackward : 0)) / memory_rate;
}

}  // namespace

double GroupRate(const std::string& group, const parallel::MeshConfig& mesh, const Gpu& gpu) {
  int64_t size = mesh.dp * mesh.cp * mesh.tp;
  int64_t stride = 1;
  if (group == "tp" || group == "kv") {
    size = mesh.tp;
  } else if (group == "cp") {
    size = mesh.cp;
    stride = mesh.tp;
  } else if (group == "param") {
    size = mesh.dp * mesh.cp;
    stride = mesh.tp;
  }
  if (size * stride <= gpu.per_host) return kLink * gpu.link_rate;
  // Rings leave a host once for each of its ranks in the group, each through its own network card.
  const auto on_host = static_cast<double>(std::max<int64_t>(1, gpu.per_host / stride));
  return kLink * std::min(gpu.link_rate, on_host * gpu.network_rate);
}

StepTime EstimateStep(const PlanInput& input, const Gpu& gpu, const CommPlan& comm,
                      const MemoryPlan& memory) {
  const int64_t all = input.batch.global_batch_sequences();
  const int64_t samples = (all + input.mesh.dp - 1) / input.mesh.dp;  // of the busiest dp rank
  const int64_t micro = input.batch.micro_batch_sequences;
  const int64_t passes = (samples + micro - 1) / micro;
  const auto micro_batches = static_cast<double>(passes);
  StepTime time;
  for (const Pass& pass : PassesOf(input))
    AddPass(pass, input, gpu, static_cast<double>(samples), micro_batches, &time);

  double beside = 0;
  for (const auto& [name, count] : comm) {
    const std::string group = name.substr(0, name.find('.'));
    const double seconds = static_cast<double>(count.bytes) / GroupRate(group, input.mesh, gpu) +
                           static_cast<double>(count.calls) * kCallSeconds;
    (group == "param" ? beside : time.exchange) += seconds;
  }
  // Gradients of ZeRO-2 and 3 are summed in every micro-batch, else beside the last one.
  const double cover = time.compute() / (input.mesh.zero_stage >= 2 ? 1 : micro_batches);
  const double hidden = std::min(beside, cover);
  time.exchange += beside - hidden + kHiddenShare * hidden;

  constexpr double kStateBytes = 12;  // master and moments of a parameter
  time.update = static_cast<double>(memory.optimizer) / kStateBytes * kUpdateBytes /
                (kMemory * gpu.memory_rate);
  return time;
}

}  // namespace sala::recipes
