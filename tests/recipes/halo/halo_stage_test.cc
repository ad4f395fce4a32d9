// The whole stage on a tiny teacher trained here: claims 3, 8, 14 and 15 of docs/math/halo.md's
// checks at unit scale.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <set>

#include "core/checkpoint.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/rng.h"
#include "data/token_store.h"
#include "recipes/checkpointing.h"
#include "recipes/halo/distil.h"
#include "recipes/halo/fold_qk_norm.h"
#include "recipes/halo/items.h"
#include "recipes/hf_config.h"
#include "recipes/stage.h"
#include "tests/core/temp_dir.h"

namespace sala::recipes {
namespace {

// Sentences of a small grammar in which later words repeat earlier ones, as bytes.
void WriteCorpus(const std::string& directory) {
  const std::vector<std::string> nouns = {"river",  "lamp",   "garden", "window",
                                          "letter", "bridge", "stone",  "train"};
  const std::vector<std::string> verbs = {"sees", "finds", "keeps", "moves"};
  const auto tokenizer = data::MakeByteTokenizer();
  auto writer = data::TokenStoreWriter::Create(
      {.directory = directory, .name = "corpus", .shard_tokens = 1 << 20}, *tokenizer);
  ASSERT_TRUE(writer.ok()) << MessageOf(writer.status());
  (*writer)->AddSource("made", "CC0-1.0", "");
  for (int document = 0; document < 1200; ++document) {
    PhiloxStream rng("v1|1|halo_stage_test||0|document|" + std::to_string(document));
    const std::string& hero = nouns[rng.Bounded(nouns.size())];
    std::string text;
    while (text.size() < 110) {
      text += "the " + hero + " " + verbs[rng.Bounded(verbs.size())] + " the " +
              nouns[rng.Bounded(nouns.size())] + ". ";
    }
    ASSERT_TRUE((*writer)
                    ->Add({.tokens = tokenizer->Encode(text), .loss_mask = {}, .hash = Xxh3(text)})
                    .ok());
  }
  ASSERT_TRUE((*writer)->Finish({{"command", "test"}}).ok());
}

// As many updates of the distillation as the trials that the margins come from; 120
// leave the student 5.6 % above the teacher. Under a sanitizer, ten times slower, only what does
// not depend on a trained model is tested.
#ifdef SALA_SANITIZED
constexpr bool kTrained = false;
constexpr int64_t kBaseSteps = 20, kAlignSteps = 12, kDistilSteps = 14, kCheckpointSteps = 4;
#else
constexpr bool kTrained = true;
constexpr int64_t kBaseSteps = 200, kAlignSteps = 120, kDistilSteps = 300, kCheckpointSteps = 40;
#endif

BatchConfig Batches(int64_t steps) {
  return {.seq_len_tokens = 128,
          .global_batch_tokens = 512,
          .micro_batch_sequences = 4,
          .steps = steps};
}

ScheduleConfig Cosine(double peak) {
  return {
      .shape = ScheduleShape::kCosine, .peak_lr = peak, .final_lr = peak / 20, .warmup_steps = 5};
}

StageConfig BaseStage(const std::string& corpus) {
  StageConfig stage;
  stage.kind = StageKind::kPretrain;
  stage.name = "base";
  stage.tokenizer = "bytes";
  stage.data.validation = {.fraction = 0.05, .max_tokens = 2048};
  data::ViewConfig view;
  view.dataset = corpus;
  view.max_epochs = 1000;
  stage.data.mixture = {view};
  stage.checkpoint.keep_last = 100;
  stage.batch = Batches(kBaseSteps);
  stage.schedule = Cosine(6e-3);
  stage.optimizer.weight_decay = 0;
  stage.optimizer.matrix_lr_multiplier = 1;
  model::ModelConfig model;
  model.hidden_size = 48;
  model.intermediate_size = 96;
  model.num_hidden_layers = 4;
  model.num_attention_heads = 8;
  model.num_key_value_heads = 2;
  model.head_dim = 8;
  model.dim_model_base = 48;
  model.attn_qk_norm = true;
  stage.model = model;
  return stage;
}

// Reading C: everything trains, softmax layers are position-free and gated from the start of the
// distillation.
StageConfig HaloStageConfig(const std::string& corpus) {
  StageConfig stage = BaseStage(corpus);
  stage.kind = StageKind::kHalo;
  stage.name = "halo";
  stage.model.reset();
  stage.batch = {};
  stage.schedule = {};
  stage.optimizer = {};
  stage.checkpoint.every_steps = kCheckpointSteps;
  HaloConfig halo;
  halo.keep = {0};
  halo.softmax_layers = 2;
  halo.score.text_tokens = 1024;
  halo.score.recall_items = 4;
  halo.score.recall_length_tokens = 512;
  halo.score.bootstrap = 20;
  OptimizerConfig optimizer;
  optimizer.weight_decay = 0;
  optimizer.matrix_lr_multiplier = 1;
  halo.align = {.batch = Batches(kAlignSteps), .schedule = Cosine(3e-3), .optimizer = optimizer};
  halo.distil = {.batch = Batches(kDistilSteps), .schedule = Cosine(3e-3), .optimizer = optimizer};
  halo.trainable = HaloTrainable::kAll;
  halo.nope_at = HaloMoment::kDistil;
  halo.softmax_gate_at = HaloMoment::kDistil;
  halo.qk_norm_fold_at = HaloMoment::kDistil;
  stage.halo = halo;
  return stage;
}

// Reading A, the defaults, in a few updates of each phase: only linear mixers train in the
// distillation, softmax layers change their form behind it, the finetuning trains everything.
StageConfig ReadingA(const std::string& corpus, const std::string& teacher) {
  StageConfig stage = HaloStageConfig(corpus);
  stage.init_from = InitConfig{.path = teacher};
  stage.checkpoint.every_steps = 10;
  HaloConfig& halo = *stage.halo;
  halo.softmax_layers = 0;
  halo.selector = Selector::kExplicit;
  halo.explicit_layers = {2};
  halo.align.batch = Batches(10);
  halo.distil.batch = Batches(20);
  halo.trainable = HaloTrainable::kLinearMixers;
  halo.nope_at = HaloMoment::kNextStage;
  halo.softmax_gate_at = HaloMoment::kNextStage;
  halo.qk_norm_fold_at = HaloMoment::kNextStage;
  halo.finetune = HaloPhaseConfig{.batch = Batches(20), .schedule = Cosine(1e-3)};
  halo.logit_scale_grid = {4, 64};
  halo.logit_scale_length_tokens = 128;
  return stage;
}

class HaloStageTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new TempDir();
    WriteCorpus(directory_->path() + "/corpus");
    Run("run");
    Run("a");
    if (kTrained) {
      for (const auto& [run, seed] : Seeds()) {
        if (run != "run") Run(run, seed);
      }
    }
  }
  static void TearDownTestSuite() {
    delete directory_;
    directory_ = nullptr;
  }

  static std::string Path(const std::string& run) { return directory_->path() + "/" + run; }

  // What trained models promise is asked of each of these, chosen before any was run: a seed that
  // fails is a failure, not a reason to take another. "run" is the one the other tests look at.
  static std::map<std::string, int64_t> Seeds() {
    return {{"run", StageConfig().seed}, {"seed_1", 1}, {"seed_2", 2}};
  }

  // Runs whose names begin with "a" are of reading A, with the teacher of "run". The seed is that
  // of teacher, mixers, gates and recall prompts, and of what is held out and the order of the
  // rest.
  static void Run(const std::string& run, int64_t seed = StageConfig().seed) {
    PipelineConfig config;
    config.name = "tiny";
    config.run.dir = Path(run);
    if (run.front() == 'a') {
      config.stages = {ReadingA(Path("corpus"), Teacher())};
    } else {
      config.stages = {BaseStage(Path("corpus")), HaloStageConfig(Path("corpus"))};
    }
    for (StageConfig& stage : config.stages) {
      stage.seed = seed;
      stage.data.seed = seed;
    }
    const auto comm = parallel::MakeSelfCommunicator();
    const Status status = RunPipeline(*comm, config);
    ASSERT_TRUE(status.ok()) << MessageOf(status);
  }

  static Checkpoint Final(const std::string& run) {
    const auto all = ListCheckpoints(Path(run) + "/checkpoints");
    EXPECT_TRUE(all.back().stage_final);
    return std::move(Checkpoint::Open(all.back().directory)).value();
  }

  static std::string Teacher() {
    for (const CheckpointListing& listing : ListCheckpoints(Path("run") + "/checkpoints")) {
      if (listing.stage == "base" && listing.stage_final) return listing.directory;
    }
    ADD_FAILURE() << "no teacher";
    return "";
  }

  static LoadedModel At(const std::string& run, const std::string& phase, int64_t step) {
    for (const CheckpointListing& listing : ListCheckpoints(Path(run) + "/checkpoints")) {
      const StagePosition position = PositionOf(*Checkpoint::Open(listing.directory));
      if (position.phase == phase && position.phase_step == step)
        return std::move(LoadModel(listing.directory)).value();
    }
    ADD_FAILURE() << run << " has no checkpoint of " << phase << " " << step;
    return {};
  }

  // A copy of the run as it was after the checkpoint of this phase and step, all later ones gone:
  // what a kill leaves behind.
  static void KilledAfter(const std::string& whole, const std::string& run,
                          const std::string& phase, int64_t step) {
    ASSERT_EQ(std::system(("cp -r '" + Path(whole) + "' '" + Path(run) + "'").c_str()), 0);
    bool found = false;
    for (const CheckpointListing& listing : ListCheckpoints(Path(run) + "/checkpoints")) {
      const Checkpoint checkpoint = std::move(Checkpoint::Open(listing.directory)).value();
      const StagePosition position = PositionOf(checkpoint);
      if (found) {
        ASSERT_TRUE(RemoveTree(listing.directory).ok());
      }
      found = found ||
              (position.stage == "halo" && position.phase == phase && position.phase_step == step);
    }
    ASSERT_TRUE(found) << phase << " " << step;
  }

  static void ExpectSameResult(const std::string& whole, const std::string& run) {
    const Checkpoint expected = Final(whole);
    const Checkpoint result = Final(run);
    const auto differences = DiffCheckpoints(expected, result);
    ASSERT_TRUE(differences.ok());
    ASSERT_FALSE(differences->empty());
    for (const TensorDifference& difference : *differences)
      EXPECT_TRUE(difference.equal) << difference.name;
  }

  // Held-out lines of a phase, in order.
  static std::vector<nlohmann::json> Validation(const std::string& run, const std::string& phase) {
    std::ifstream file(Path(run) + "/metrics/valid.jsonl");
    std::vector<nlohmann::json> lines;
    for (std::string line; std::getline(file, line);) {
      nlohmann::json json = nlohmann::json::parse(line);
      if (json.at("phase") == phase) lines.push_back(json);
    }
    return lines;
  }

  static TempDir* directory_;
};

TempDir* HaloStageTest::directory_ = nullptr;

TEST_F(HaloStageTest, EveryLayerIsAligned) {
  if (!kTrained) GTEST_SKIP() << "needs a trained model";
  for (const auto& [run, seed] : Seeds()) {
    const auto lines = Validation(run, "align");
    ASSERT_GE(lines.size(), 2u);
    for (int layer = 0; layer < 4; ++layer) {
      const std::string key = "relative_error_" + std::to_string(layer);
      const double before = lines.front().at(key).get<double>();
      const double after = lines.back().at(key).get<double>();
      EXPECT_LT(after, 0.35) << "seed " << seed << ", layer " << layer;  // docs/math/halo.md 9 (3)
      EXPECT_LT(after, 0.5 * before) << "seed " << seed << ", layer " << layer;
    }
  }
}

TEST_F(HaloStageTest, DistillationRecoversTheTeacher) {
  if (!kTrained) GTEST_SKIP() << "needs a trained model";
  for (const auto& [run, seed] : Seeds()) {
    const auto lines = Validation(run, "distil");
    ASSERT_GE(lines.size(), 2u);
    const double before = lines.front().at("kl").get<double>();
    const double after = lines.back().at("kl").get<double>();
    EXPECT_LT(after, before / 5) << "seed " << seed;  // docs/math/halo.md 9 (8)
    EXPECT_LT(lines.back().at("student_loss").get<double>(),
              1.03 * lines.back().at("teacher_loss").get<double>())
        << "seed " << seed;
  }
}

TEST_F(HaloStageTest, ResultIsAHybridWithTheChosenLayers) {
  const Checkpoint result = Final("run");
  const nlohmann::json halo = result.info().trainer.at("halo");
  const auto chosen = halo.at("softmax_layers").get<std::vector<int64_t>>();
  ASSERT_EQ(chosen.size(), 2u);
  EXPECT_EQ(chosen.front(), 0);
  const auto config = ModelConfigOf(result);
  ASSERT_TRUE(config.ok());
  EXPECT_FALSE(config->attn_use_rope);
  EXPECT_TRUE(config->attn_use_output_gate);
  for (int64_t layer = 0; layer < 4; ++layer) {
    const bool softmax = std::find(chosen.begin(), chosen.end(), layer) != chosen.end();
    EXPECT_EQ(config->mixer(layer) == model::MixerType::kSoftmax, softmax) << layer;
  }
  EXPECT_EQ(halo.at("scores").at("layers").size(), 4u);
  const auto selection = ReadFile(Path("run") + "/halo/selection.json");
  ASSERT_TRUE(selection.ok());
  EXPECT_EQ(nlohmann::json::parse(*selection).at("softmax_layers").get<std::vector<int64_t>>(),
            chosen);
}

// The teacher's norms are folded in either reading, at the moment that is asked for.
TEST_F(HaloStageTest, SoftmaxLayersLoseTheQueryKeyNorm) {
  EXPECT_TRUE(ModelConfigOf(*Checkpoint::Open(Teacher()))->attn_qk_norm);
  EXPECT_FALSE(At("run", "distil", kCheckpointSteps).config.attn_qk_norm);
  EXPECT_TRUE(At("a", "distil", 10).config.attn_qk_norm);
  EXPECT_FALSE(At("a", "finetune", 10).config.attn_qk_norm);
  for (const std::string run : {"run", "a"}) {
    const Checkpoint result = Final(run);
    EXPECT_TRUE(HfConfig(*ModelConfigOf(result)).ok()) << run;
    EXPECT_EQ(result.info().trainer.at("halo").at("qk_norm_scales").size(), 4u) << run;
  }
}

// Held-out loss of the teacher, before anything is repaired: with its norms, with the norms folded,
// and with the gains alone folded (every factor 1).
TEST_F(HaloStageTest, FoldingCostsTheTrainedTeacherLittle) {
  if (!kTrained) GTEST_SKIP() << "needs a trained model";
  LoadedModel teacher = std::move(LoadModel(Teacher())).value();
  ThreadPool pool(1);
  Arena arena;
  Arena scratch;
  Context ctx;
  ctx.pool = &pool;
  ctx.scratch = &scratch;
  const auto comm = parallel::MakeSelfCommunicator();
  const auto mesh = std::move(parallel::Mesh::Create(*comm, {})).value();
  const StageConfig stage = HaloStageConfig(Path("corpus"));
  const auto tokenizer = data::MakeByteTokenizer();
  const auto held_out = data::ValidationSet::Open(stage.data, 128, *tokenizer);
  const auto batches = HeldOutBatches(**held_out, *mesh);
  const auto calibration = CalibrationBatches(stage, *tokenizer, *mesh);
  ASSERT_TRUE(batches.ok() && calibration.ok());
  Hybrid whole{teacher.config, std::move(teacher.params)};
  const model::Model model(whole.config, whole.params);
  const std::vector<QkScales> scales =
      std::move(MeasureQkScales(ctx, arena, model, *calibration, *mesh)).value();
  std::vector<QkScales> ones = scales;
  for (QkScales& layer : ones) {
    std::fill(layer.q.begin(), layer.q.end(), 1.0);
    std::fill(layer.k.begin(), layer.k.end(), 1.0);
  }
  const auto compare = [&](const std::vector<QkScales>& by) {
    Hybrid changed = FoldQkNorm({whole.config, whole.params}, by);
    const model::Model other(changed.config, changed.params);
    return std::move(CompareModels(ctx, arena, model, other, *batches, *mesh)).value();
  };
  const DistilReport folded = compare(scales);
  const DistilReport dropped = compare(ones);
  std::printf("held-out loss: kept %.4f, folded %.4f (KL %.4f), gains alone %.4f (KL %.4f)\n",
              folded.teacher_loss, folded.student_loss, folded.kl, dropped.student_loss,
              dropped.kl);
  // Heads of 8 channels have an RMS that varies by a quarter from token to token, wider ones by
  // less: much is left to repair here. The factors must be worth their measuring all the same.
  EXPECT_LT(folded.kl, 0.5 * dropped.kl);
}

TEST_F(HaloStageTest, KilledInAnyPhaseAndResumedGivesTheSameBits) {
  KilledAfter("run", "from_align", "align", 2 * kCheckpointSteps);
  Run("from_align");
  ExpectSameResult("run", "from_align");

  // Between the phases, with half of the layers scored.
  KilledAfter("run", "from_score", "align", kAlignSteps);
  nlohmann::json scores =
      nlohmann::json::parse(*ReadFile(Path("from_score") + "/halo/scores.json"));
  auto& layers = scores.at("items").at("layers");
  layers.erase(layers.begin() + 2, layers.end());
  ASSERT_TRUE(WriteFileAtomically(Path("from_score") + "/halo/scores.json", scores.dump()).ok());
  Run("from_score");
  ExpectSameResult("run", "from_score");

  KilledAfter("run", "from_distil", "distil", 2 * kCheckpointSteps);
  Run("from_distil");
  ExpectSameResult("run", "from_distil");

  // After the last update, before the result was saved.
  KilledAfter("run", "from_end", "distil", kDistilSteps);
  Run("from_end");
  ExpectSameResult("run", "from_end");
}

bool IsLinearMixer(const model::ModelConfig& config, const std::string& name) {
  const std::string prefix = "model.layers.";
  return name.find(".self_attn.") != std::string::npos &&
         config.mixer(std::stoll(name.substr(prefix.size()))) == model::MixerType::kLightning;
}

std::vector<float> ValuesOf(LoadedModel& model, const std::string& name) {
  const Tensor tensor = model.params.Get(name);
  return {tensor.Data<float>(), tensor.Data<float>() + tensor.numel()};
}

TEST_F(HaloStageTest, FrozenMeansFrozenThroughKillAndResume) {
  KilledAfter("a", "a_distil", "distil", 10);
  Run("a_distil");
  ExpectSameResult("a", "a_distil");
  LoadedModel teacher = std::move(LoadModel(Teacher())).value();
  LoadedModel before = At("a_distil", "distil", 10);
  LoadedModel after = At("a_distil", "distil", 20);
  EXPECT_TRUE(after.config.attn_use_rope);
  EXPECT_FALSE(after.config.attn_use_output_gate);
  int64_t frozen = 0;
  for (const model::ParameterSpec& spec : after.params.specs()) {
    const std::vector<float> values = ValuesOf(after, spec.name);
    if (IsLinearMixer(after.config, spec.name)) {
      EXPECT_NE(values, ValuesOf(before, spec.name)) << spec.name;
      continue;
    }
    EXPECT_EQ(values, ValuesOf(teacher, spec.name)) << spec.name;
    ++frozen;
  }
  // Embedding, head, last norm; five of each layer besides its mixer; six of each softmax mixer.
  EXPECT_EQ(frozen, 3 + 4 * 5 + 2 * 6);
}

TEST_F(HaloStageTest, FinetuningTrainsTheFormThatIsHandedOn) {
  LoadedModel first = At("a", "finetune", 10);
  LoadedModel last = At("a", "finetune", 20);
  for (const LoadedModel* model : {&first, &last}) {
    EXPECT_FALSE(model->config.attn_use_rope);
    EXPECT_TRUE(model->config.attn_use_output_gate);
  }
  for (const model::ParameterSpec& spec : last.params.specs())
    EXPECT_NE(ValuesOf(first, spec.name), ValuesOf(last, spec.name)) << spec.name;
  LoadedModel result =
      std::move(LoadModel(ListCheckpoints(Path("a") + "/checkpoints").back().directory)).value();
  EXPECT_EQ(result.config.attn_use_rope, last.config.attn_use_rope);
  for (const model::ParameterSpec& spec : result.params.specs())
    EXPECT_EQ(ValuesOf(result, spec.name), ValuesOf(last, spec.name)) << spec.name;
}

TEST_F(HaloStageTest, LogitScaleIsFittedAtTheEnd) {
  const nlohmann::json fit = Final("a").info().trainer.at("halo").at("logit_scale");
  EXPECT_EQ(fit, nlohmann::json::parse(*ReadFile(Path("a") + "/halo/logit_scale.json")));
  const auto& curve = fit.at("curve");
  ASSERT_EQ(curve.size(), 3u);
  nlohmann::json best;
  double lowest = INFINITY;
  std::set<double> losses;
  for (const auto& point : curve) {
    const double loss = point.at("loss").get<double>();
    EXPECT_GT(loss, 0) << point;
    losses.insert(loss);
    if (loss < lowest) best = point.at("a");
    lowest = std::min(lowest, loss);
  }
  EXPECT_EQ(losses.size(), 3u) << "the scale reaches the model: " << curve;
  EXPECT_EQ(fit.at("a"), best);
  EXPECT_EQ(curve[0].at("a"), "none");
  EXPECT_EQ(curve[1].at("a"), 4.0);
  EXPECT_EQ(curve[2].at("a"), 64.0);
}

TEST_F(HaloStageTest, KilledAroundFinetuningAndResumedGivesTheSameBits) {
  KilledAfter("a", "a_before", "distil", 20);
  Run("a_before");
  ExpectSameResult("a", "a_before");
  KilledAfter("a", "a_finetune", "finetune", 10);
  Run("a_finetune");
  ExpectSameResult("a", "a_finetune");
}

TEST_F(HaloStageTest, RefusesAStageWithoutATeacher) {
  PipelineConfig config;
  config.name = "alone";
  config.run.dir = Path("no_teacher");
  config.stages = {HaloStageConfig(Path("corpus"))};
  const auto comm = parallel::MakeSelfCommunicator();
  const Status status = RunPipeline(*comm, config);
  EXPECT_EQ(ErrorCodeOf(status), "CFG-HALO");
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(status), ::testing::HasSubstr("init_from"));
}

}  // namespace
}  // namespace sala::recipes
