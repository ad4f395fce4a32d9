#include "recipes/verify_scale.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "data/tokenizer.h"

namespace sala::recipes {
namespace {

using model::MixerType;
using model::ModelConfig;

constexpr int64_t kLayers = 5;  // first, last, and a few between them to choose from
constexpr int64_t kHidden = 64;
constexpr int64_t kHeadDim = 16;  // the least that the GPU kernels compute
constexpr int64_t kDenseTokens = 64;
// Of the byte tokenizer (data/tokenizer.h).
constexpr int64_t kBytesVocabulary = 261;
constexpr int64_t kBytesBos = 256, kBytesEos = 257, kBytesPad = 258;
constexpr int64_t kSequences = 2;     // of a micro-batch
constexpr int64_t kMicroBatches = 2;  // of a step
// Of a recall prompt in bytes: the wording alone takes some 250.
constexpr int64_t kRecallTokens = 384;
constexpr int64_t kLeastDocument = 8;
// Blocks of a document beyond those a token sees: some are dropped for most of its tokens.
constexpr int64_t kDroppedBlocks = 6;

int64_t Clamped(int64_t value, int64_t least, int64_t most) {
  return std::max(least, std::min(value, most));
}

// round(value * to / from), of positive numbers.
int64_t Share(int64_t value, int64_t to, int64_t from) {
  return (2 * value * to + from) / (2 * from);
}

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

// "steps 380 -> 4", "steps 4" where nothing changed.
std::string Arrow(const char* key, int64_t from, int64_t to) {
  std::string text = std::string(key) + " " + std::to_string(from);
  if (from != to) text += " -> " + std::to_string(to);
  return text;
}

// Block selection wants blocks of a multiple of 16 tokens on a GPU: the least stride that gives
// them with the same number of strides to a block.
int64_t ScaleStride(const kernels::SparseAttentionConfig& c) {
  constexpr int64_t kTile = 16;
  const int64_t strides = c.block_size / c.kernel_stride;
  int64_t stride = 1;
  while (stride < c.kernel_stride && stride * strides % kTile != 0) ++stride;
  return stride;
}

void ScaleHeads(const ModelConfig& from, ModelConfig* to) {
  const int64_t group = from.num_attention_heads / from.num_key_value_heads;
  const int64_t kept = group <= 4 ? group : 4 - group % 2;  // odd stays odd, even even
  to->num_key_value_heads = std::min<int64_t>(from.num_key_value_heads, 2);
  to->num_attention_heads = to->num_key_value_heads * kept;
  to->head_dim = std::min(from.head_dim, kHeadDim);
  to->lightning_nh = from.lightning_nh == from.num_attention_heads
                         ? to->num_attention_heads
                         : std::min<int64_t>(from.lightning_nh, 4);
  to->lightning_head_dim = from.lightning_head_dim == from.head_dim
                               ? to->head_dim
                               : std::min(from.lightning_head_dim, kHeadDim);
}

std::string ModelLine(const ModelConfig& from, const ModelConfig& to) {
  const auto softmax = [](const ModelConfig& c) {
    return std::count(c.mixer_types.begin(), c.mixer_types.end(),
                      model::NameOf(MixerType::kSoftmax));
  };
  return "model: " + Arrow("hidden_size", from.hidden_size, to.hidden_size) + ", " +
         Arrow("intermediate_size", from.intermediate_size, to.intermediate_size) + ", " +
         Arrow("layers", from.num_hidden_layers, to.num_hidden_layers) + " (" +
         Arrow("softmax", softmax(from), softmax(to)) + "), " +
         Arrow("heads", from.num_attention_heads, to.num_attention_heads) + ", " +
         Arrow("key/value heads", from.num_key_value_heads, to.num_key_value_heads) + ", " +
         Arrow("head_dim", from.head_dim, to.head_dim) + ", " +
         Arrow("vocabulary", from.vocab_size, to.vocab_size) + " bytes; width multiplier " +
         Number(from.width_multiplier()) + " -> " + Number(to.width_multiplier()) +
         ", scale_depth " + Number(from.scale_depth) + " -> " + Number(to.scale_depth);
}

std::string SparseLine(const kernels::SparseAttentionConfig& from,
                       const kernels::SparseAttentionConfig& to) {
  return "sparse_config: " + Arrow("kernel_size", from.kernel_size, to.kernel_size) + ", " +
         Arrow("kernel_stride", from.kernel_stride, to.kernel_stride) + ", " +
         Arrow("block_size", from.block_size, to.block_size) + ", " +
         Arrow("init_blocks", from.init_blocks, to.init_blocks) + ", " +
         Arrow("window_size", from.window_size, to.window_size) + ", " +
         Arrow("topk", from.topk, to.topk) + ", " +
         Arrow("dense_len", from.dense_len, to.dense_len);
}

// Lengths of the phases of a scaled model.
struct Lengths {
  int64_t dense = 0, sparse = 0, dense_len = 0;
};

Lengths LengthsOf(const kernels::SparseAttentionConfig& sparse) {
  const int64_t blocks = sparse.total_blocks() + kDroppedBlocks;
  return {.dense = kDenseTokens,
          .sparse = std::max(blocks * sparse.block_size, sparse.dense_len + 2 * sparse.block_size),
          .dense_len = sparse.dense_len};
}

BatchConfig ScaleBatch(const BatchConfig& from, int64_t seq_len) {
  BatchConfig to = from;
  to.seq_len_tokens = seq_len;
  to.micro_batch_sequences = std::min(from.micro_batch_sequences, kSequences);
  const int64_t batches = std::min(from.micro_batches(), kMicroBatches);
  int64_t sequences = batches * to.micro_batch_sequences;
  const bool ragged = from.global_batch_sequences() % from.micro_batch_sequences != 0;
  if (ragged && to.micro_batch_sequences > 1) --sequences;  // the last one stays smaller
  to.global_batch_tokens = sequences * seq_len;
  to.steps = kVerifySteps;
  return to;
}

void ScaleWarmup(int64_t from_steps, ScheduleConfig* schedule) {
  if (schedule->warmup_steps == 0) return;
  schedule->warmup_steps =
      Clamped(Share(schedule->warmup_steps, kVerifySteps, from_steps), 1, kVerifySteps - 1);
}

std::string BatchLine(const std::string& where, const BatchConfig& from, const BatchConfig& to) {
  return where + ": " + Arrow("seq_len_tokens", from.seq_len_tokens, to.seq_len_tokens) + ", " +
         Arrow("sequences a step", from.global_batch_sequences(), to.global_batch_sequences()) +
         ", " + Arrow("of a micro-batch", from.micro_batch_sequences, to.micro_batch_sequences) +
         ", " + Arrow("steps", from.steps, to.steps);
}

class Scaler {
 public:
  Scaler(const PipelineConfig& config, const ModelConfig& start, std::string directory)
      : from_(config), from_start_(start), directory_(std::move(directory)) {}

  StatusOr<ScaledPipeline> Scale() {
    SALA_RETURN_IF_ERROR(Start());
    to_.config = from_;
    to_.config.run = RunConfig();
    to_.config.run.threads = std::min<int64_t>(from_.run.threads, 2);
    for (StageConfig& stage : to_.config.stages) Stage(stage);
    StageConfig& first = to_.config.stages[0];
    if (first.init_from) {
      PutStartBefore();
    } else {
      first.model = to_.start;
    }
    for (const auto& [path, dataset] : datasets_) {
      to_.datasets.push_back(dataset);
      to_.changes.push_back(
          "dataset " + path + ": made documents of " + std::to_string(kLeastDocument) + " to " +
          std::to_string(dataset.long_max) + " bytes" + (dataset.chat ? ", with a loss mask" : ""));
    }
    return to_;
  }

 private:
  Status Start() {
    ModelConfig from = from_start_;
    // What a tokenizer would say; sizes are all that is needed here.
    if (from.vocab_size == 0) from.vocab_size = kBytesVocabulary;
    SALA_RETURN_IF_ERROR(from.Resolve());
    SALA_ASSIGN_OR_RETURN(to_.start, ScaleModel(from));
    lengths_ = LengthsOf(to_.start.sparse);
    to_.changes.push_back(ModelLine(from, to_.start));
    to_.changes.push_back(SparseLine(from.sparse, to_.start.sparse));
    from_layers_ = from.num_hidden_layers;
    return OkStatus();
  }

  void Stage(StageConfig& stage) {
    stage.tokenizer = "bytes";
    Data(stage);
    if (stage.validation.every_steps > 0) stage.validation.every_steps = kVerifySteps / 2;
    stage.checkpoint = {.every_steps = 0, .keep_last = 1, .max_failures = 1};
    Mesh(stage);
    if (stage.kind == StageKind::kHalo) return Halo(stage);
    const BatchConfig batch = stage.batch;
    stage.batch = ScaleBatch(batch, stage.sparse_attention ? lengths_.sparse : lengths_.dense);
    ScaleWarmup(batch.steps, &stage.schedule);
    to_.changes.push_back(BatchLine("stage " + stage.name, batch, stage.batch));
  }

  void Mesh(StageConfig& stage) {
    parallel::MeshConfig mesh = stage.parallel;
    mesh.dp = 0;
    mesh.cp = std::min<int64_t>(mesh.cp, 2);
    mesh.tp = std::min<int64_t>(mesh.tp, 2);
    if (!to_.start.TensorParallelProblem(mesh.tp).empty()) mesh.tp = 1;
    if (mesh.cp != stage.parallel.cp || mesh.tp != stage.parallel.tp) {
      to_.changes.push_back("stage " + stage.name + ": " + Arrow("cp", stage.parallel.cp, mesh.cp) +
                            ", " + Arrow("tp", stage.parallel.tp, mesh.tp));
    }
    to_.meshes.push_back(mesh);
    stage.parallel = {.zero_stage = mesh.zero_stage, .transport = mesh.transport};
  }

  // The store that stands for a dataset: chat if any stage of kind sft reads it.
  std::string Dataset(const std::string& path, bool chat) {
    const auto [it, added] = datasets_.try_emplace(path);
    VerifyDataset& made = it->second;
    if (added) {
      made.directory = directory_ + "/dataset-" + std::to_string(datasets_.size());
      made.short_tokens = lengths_.dense / 2 + kLeastDocument;  // several in a sample
      made.long_min = std::max(lengths_.dense_len, kLeastDocument);
      made.long_max = lengths_.sparse;
    }
    made.chat = made.chat || chat;
    return made.directory;
  }

  void Data(StageConfig& stage) {
    data::DataConfig& data = stage.data;
    const bool chat = stage.kind == StageKind::kSft;
    for (data::ViewConfig& view : data.mixture) {
      view.dataset = Dataset(view.dataset, chat);
      view.min_tokens = 0;
      view.max_tokens.reset();
      view.max_epochs = 1000;  // few documents, read again
    }
    for (std::string& path : data.validation.datasets) path = Dataset(path, chat);
    if (data.validation.fraction > 0) {
      // Of a hundred documents some are held out for certain.
      data.validation.fraction = std::max(data.validation.fraction, 0.1);
      data.validation.max_tokens = 2 * lengths_.sparse;
    }
  }

  void Halo(StageConfig& stage) {
    HaloConfig& halo = *stage.halo;
    const int64_t layers = to_.start.num_hidden_layers;
    const auto phase = [&](const char* name, HaloPhaseConfig& config) {
      const BatchConfig batch = config.batch;
      config.batch = ScaleBatch(batch, lengths_.dense);
      ScaleWarmup(batch.steps, &config.schedule);
      to_.changes.push_back(BatchLine("stage " + stage.name + ", " + name, batch, config.batch));
    };
    phase("align", halo.align);
    phase("distil", halo.distil);
    if (halo.finetune) phase("finetune", *halo.finetune);

    const int64_t from_softmax = halo.softmax_layers > 0 ? halo.softmax_layers : from_layers_ / 4;
    halo.keep = ScaleLayers(halo.keep, from_layers_, layers);
    if (halo.selector == Selector::kExplicit) {
      halo.explicit_layers = ScaleLayers(halo.explicit_layers, from_layers_, layers);
      halo.softmax_layers = 0;  // as many as are named
    } else {
      // As many as the share says, one more than are kept by decision where there was a choice, and
      // one layer that becomes linear where there was one.
      const auto forced = static_cast<int64_t>(halo.keep.size());
      const int64_t choice = from_softmax > forced ? 1 : 0;
      const int64_t most = layers - (from_softmax < from_layers_ ? 1 : 0);
      halo.softmax_layers =
          std::min(std::max(Share(from_softmax, layers, from_layers_), forced + choice), most);
      to_.changes.push_back("stage " + stage.name + ": " +
                            Arrow("softmax layers", from_softmax, halo.softmax_layers) + " of " +
                            std::to_string(layers));
    }
    halo.score.text_tokens = std::min(halo.score.text_tokens, 4 * lengths_.dense);
    halo.score.recall_items = std::min<int64_t>(halo.score.recall_items, 4);
    halo.score.recall_length_tokens = kRecallTokens;
    halo.score.bootstrap = std::min<int64_t>(halo.score.bootstrap, 20);
    if (!halo.logit_scale_grid.empty()) halo.logit_scale_length_tokens = 2 * lengths_.dense;
  }

  // A model to start from, trained as the stages are.
  void PutStartBefore() {
    const StageConfig& first = to_.config.stages[0];
    StageConfig before;
    before.name = "verify_start";
    before.tokenizer = first.tokenizer;
    before.model = to_.start;
    before.seed = first.seed;
    before.batch =
        ScaleBatch({.seq_len_tokens = 1, .global_batch_tokens = 2, .steps = 1}, lengths_.dense);
    before.schedule = {.shape = ScheduleShape::kConstant, .peak_lr = 1e-3};
    before.data = first.data;
    before.checkpoint = first.checkpoint;
    before.parallel = first.parallel;
    to_.changes.push_back("stage " + first.name + ": init_from " + first.init_from->path +
                          " -> random weights of the same form, trained for " +
                          std::to_string(before.batch.steps) + " steps");
    to_.config.stages[0].carry_optimizer = first.init_from->carry_optimizer;
    to_.config.stages[0].init_from.reset();
    to_.config.stages.insert(to_.config.stages.begin(), before);
    to_.meshes.insert(to_.meshes.begin(), before.parallel);
    to_.config.single_stage = false;
  }

  const PipelineConfig& from_;
  const ModelConfig& from_start_;
  std::string directory_;
  ScaledPipeline to_;
  Lengths lengths_;
  int64_t from_layers_ = 0;
  std::map<std::string, VerifyDataset> datasets_;  // by the path the user gave
};

}  // namespace

kernels::SparseAttentionConfig ScaleSparse(const kernels::SparseAttentionConfig& from) {
  constexpr int64_t kBlocks = 8;  // that a token sees, about
  kernels::SparseAttentionConfig to = from;
  to.kernel_stride = ScaleStride(from);
  to.kernel_size = 2 * to.kernel_stride;
  to.block_size = to.kernel_stride * (from.block_size / from.kernel_stride);
  int64_t window = from.window_size / from.block_size;
  int64_t free = from.free_blocks();
  const int64_t total = from.total_blocks();
  if (total > kBlocks) {
    to.init_blocks = std::min<int64_t>(from.init_blocks, 1);
    window = Clamped(Share(window, kBlocks, total), std::min<int64_t>(window, 1), kBlocks);
    free = Clamped(Share(free, kBlocks, total), std::min<int64_t>(free, 1), kBlocks);
  }
  to.window_size = window * to.block_size;
  to.topk = free + to.init_blocks + 1;  // SparseAttentionConfig::free_blocks
  // Both kinds of documents stay: those that are dense and those that select.
  const int64_t seen = (to.total_blocks() + 2) * to.block_size;
  to.dense_len = std::min(from.dense_len, seen);
  return to;
}

std::vector<std::string> ScaleMixers(const std::vector<std::string>& types, int64_t layers) {
  const auto from = static_cast<int64_t>(types.size());
  if (from == layers) return types;
  const std::string softmax = model::NameOf(MixerType::kSoftmax);
  const std::string linear = model::NameOf(MixerType::kLightning);
  std::vector<std::string> scaled(static_cast<size_t>(layers), linear);
  scaled.front() = types.front();
  scaled.back() = types.back();
  const auto all = static_cast<int64_t>(std::count(types.begin(), types.end(), softmax));
  const auto ends = static_cast<int64_t>(std::count(scaled.begin(), scaled.end(), softmax));
  const int64_t inner = layers - 2;
  const int64_t inner_all = all - ends;  // of the layers between first and last
  int64_t wanted = Share(inner_all, inner, std::max<int64_t>(1, from - 2));
  if (inner_all > 0) wanted = std::max<int64_t>(wanted, 1);
  if (inner_all < from - 2) wanted = std::min(wanted, inner - 1);
  // At the middles of equal parts.
  for (int64_t i = 0; i < wanted; ++i)
    scaled[static_cast<size_t>(1 + (2 * i + 1) * inner / (2 * wanted))] = softmax;
  return scaled;
}

std::vector<int64_t> ScaleLayers(const std::vector<int64_t>& named, int64_t from, int64_t to) {
  std::set<int64_t> scaled;
  for (int64_t layer : named) {
    if (layer < 0) layer += from;
    scaled.insert(from > 1 ? Clamped(Share(layer, to - 1, from - 1), 0, to - 1) : 0);
  }
  return {scaled.begin(), scaled.end()};
}

StatusOr<ModelConfig> ScaleModel(const ModelConfig& given) {
  ModelConfig from = given;
  SALA_RETURN_IF_ERROR(from.Resolve());
  ModelConfig to = from;
  to.vocab_size = kBytesVocabulary;
  to.hidden_size = std::min(from.hidden_size, kHidden);
  const int64_t intermediate = Share(from.intermediate_size, to.hidden_size, from.hidden_size);
  if (to.hidden_size < from.hidden_size)
    to.intermediate_size = std::max<int64_t>(8, intermediate / 8 * 8);
  to.num_hidden_layers = std::min(from.num_hidden_layers, kLayers);
  to.mixer_types = ScaleMixers(from.mixer_types, to.num_hidden_layers);
  ScaleHeads(from, &to);
  static_cast<kernels::SparseAttentionConfig&>(to.sparse) = ScaleSparse(from.sparse);
  // dim_model_base is at least 1 (ModelConfig::Bind).
  to.dim_model_base = std::max(1.0, static_cast<double>(to.hidden_size) / from.width_multiplier());
  // A residual factor that is switched off (1) stays off.
  const double off = std::sqrt(static_cast<double>(from.num_hidden_layers));
  if (std::abs(from.scale_depth - off) < 1e-6 * off)
    to.scale_depth = std::sqrt(static_cast<double>(to.num_hidden_layers));
  to.bos_token_id = kBytesBos;
  to.eos_token_id = kBytesEos;
  to.pad_token_id = kBytesPad;
  SALA_RETURN_IF_ERROR(to.Resolve());
  return to;
}

StatusOr<ScaledPipeline> ScalePipeline(const PipelineConfig& config, const ModelConfig& start,
                                       const std::string& directory) {
  return Scaler(config, start, directory).Scale();
}

}  // namespace sala::recipes
