#include "recipes/halo/items.h"

#include <algorithm>

#include "data/stream.h"
#include "data/synthetic.h"
#include "recipes/halo/select.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

// Activations differ little from text to text: over this many tokens a mean over tokens is settled
// to a percent where one token's deviation is as large as the mean.
constexpr int64_t kCalibrationTokens = 16384;

}  // namespace

model::Batch RecallBatch(const std::vector<int32_t>& prompt, const std::vector<int32_t>& answer) {
  std::vector<int32_t> tokens = prompt;
  tokens.insert(tokens.end(), answer.begin(), answer.end());
  model::Batch batch = model::SingleDocument(tokens);
  for (size_t t = prompt.size(); t < tokens.size(); ++t) batch.labels[t - 1] = tokens[t];
  return batch;
}

StatusOr<ScoreItems> MakeScoreItems(const StageConfig& stage, const data::Tokenizer& tokenizer) {
  const HaloConfig& halo = *stage.halo;
  ScoreItems items;
  data::DataConfig held_out = stage.data;
  held_out.validation.max_tokens = halo.score.text_tokens;
  SALA_ASSIGN_OR_RETURN(const auto text, data::ValidationSet::Open(
                                             held_out, halo.align.batch.seq_len_tokens, tokenizer));
  for (int64_t i = 0; i < text->size(); ++i) {
    SALA_ASSIGN_OR_RETURN(data::PackedSample sample, text->Get(i));
    items.text.push_back(MakeBatch({std::move(sample)}));
  }
  if (items.text.empty()) {
    return MakeError(ExitCode::kConfig, "CFG-HALO",
                     "halo.score.text_tokens: no held-out text to score layers on "
                     "(data.validation.fraction is " +
                         std::to_string(stage.data.validation.fraction) +
                         ", no document fell into it or none fits " +
                         std::to_string(halo.score.text_tokens) + " tokens); raise one of them");
  }
  SALA_ASSIGN_OR_RETURN(items.recall, MakeRecallPrompts(stage, tokenizer));
  return items;
}

StatusOr<std::vector<model::Batch>> MakeRecallPrompts(const StageConfig& stage,
                                                      const data::Tokenizer& tokenizer) {
  const HaloConfig& halo = *stage.halo;
  std::vector<model::Batch> prompts;
  const data::Haystack haystack = data::Haystack::Filler();
  for (int64_t i = 0; i < halo.score.recall_items; ++i) {
    data::RecallOptions options;
    options.task = i % 2 == 0 ? data::RecallTask::kPasskey : data::RecallTask::kMultiKey;
    options.seed = stage.seed;
    options.length_tokens = halo.score.recall_length_tokens;
    options.purpose = "halo_score";
    auto item = data::MakeRecallItem(options, haystack, tokenizer, i);
    if (!item.ok()) return Annotate(item.status(), "halo.score.recall_length_tokens");
    prompts.push_back(RecallBatch(item->prompt, item->answer));
  }
  return prompts;
}

Status CheckRecallPrompts(const StageConfig& stage, const data::Tokenizer& tokenizer) {
  if (!stage.halo) return OkStatus();
  const Selector selector = stage.halo->selector;
  const bool scored = NeedsLayerScores(selector) || selector == Selector::kGreedy;
  return scored ? MakeRecallPrompts(stage, tokenizer).status() : OkStatus();
}

StatusOr<std::vector<model::Batch>> CalibrationBatches(const StageConfig& stage,
                                                       const data::Tokenizer& tokenizer,
                                                       const parallel::Mesh& mesh) {
  const BatchConfig& batch = stage.halo->distil.batch;
  SALA_ASSIGN_OR_RETURN(const auto stream,
                        data::SampleStream::Open(stage.data, stage.name + "/distil",
                                                 batch.seq_len_tokens, tokenizer));
  // No more than the distillation itself takes: the data have as much.
  const int64_t samples =
      std::min(std::max<int64_t>(1, kCalibrationTokens / batch.seq_len_tokens),
               std::max<int64_t>(1, batch.steps * batch.global_batch_sequences()));
  std::vector<model::Batch> batches;
  for (int64_t first = 0; first < samples; first += mesh.dp_size()) {
    const int64_t g = first + mesh.dp_rank();
    std::vector<data::PackedSample> sample;
    if (g < samples) {
      SALA_ASSIGN_OR_RETURN(data::PackedSample packed, stream->Get(g));
      sample.push_back(std::move(packed));
    }
    batches.push_back(MakeBatch(sample));
  }
  return batches;
}

}  // namespace sala::recipes
