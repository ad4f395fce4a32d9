// The whole stage on a tiny teacher trained here: claims 3, 8, 14 and 15 of docs/math/halo.md's
// checks at unit scale.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>

#include "core/checkpoint.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/rng.h"
#include "data/token_store.h"
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

// As many updates of the distillation as the trials that the margins come from (halo.md 12.1); 120
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
  stage.halo = halo;
  return stage;
}

class HaloStageTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new TempDir();
    WriteCorpus(directory_->path() + "/corpus");
    Run("run");
  }
  static void TearDownTestSuite() {
    delete directory_;
    directory_ = nullptr;
  }

  static std::string Path(const std::string& run) { return directory_->path() + "/" + run; }

  static void Run(const std::string& run) {
    PipelineConfig config;
    config.name = "tiny";
    config.run.dir = Path(run);
    config.stages = {BaseStage(Path("corpus")), HaloStageConfig(Path("corpus"))};
    const auto comm = parallel::MakeSelfCommunicator();
    const Status status = RunPipeline(*comm, config);
    ASSERT_TRUE(status.ok()) << MessageOf(status);
  }

  static Checkpoint Final(const std::string& run) {
    const auto all = ListCheckpoints(Path(run) + "/checkpoints");
    EXPECT_TRUE(all.back().stage_final);
    return std::move(Checkpoint::Open(all.back().directory)).value();
  }

  // The run as it was after the checkpoint of this phase and step, all later ones gone: what a kill
  // leaves behind.
  static void KilledAfter(const std::string& run, const std::string& phase, int64_t step) {
    ASSERT_EQ(std::system(("cp -r '" + Path("run") + "' '" + Path(run) + "'").c_str()), 0);
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

  static void ExpectSameResult(const std::string& run) {
    const Checkpoint expected = Final("run");
    const Checkpoint result = Final(run);
    const auto differences = DiffCheckpoints(expected, result);
    ASSERT_TRUE(differences.ok());
    ASSERT_FALSE(differences->empty());
    for (const TensorDifference& difference : *differences)
      EXPECT_TRUE(difference.equal) << difference.name;
  }

  // Held-out lines of a phase, in order.
  static std::vector<nlohmann::json> Validation(const std::string& phase) {
    std::ifstream file(Path("run") + "/metrics/valid.jsonl");
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
  const auto lines = Validation("align");
  ASSERT_GE(lines.size(), 2u);
  for (int layer = 0; layer < 4; ++layer) {
    const std::string key = "relative_error_" + std::to_string(layer);
    const double before = lines.front().at(key).get<double>();
    const double after = lines.back().at(key).get<double>();
    EXPECT_LT(after, 0.35) << layer;  // halo.md 12.3 (3)
    EXPECT_LT(after, 0.5 * before) << layer;
  }
}

TEST_F(HaloStageTest, DistillationRecoversTheTeacher) {
  if (!kTrained) GTEST_SKIP() << "needs a trained model";
  const auto lines = Validation("distil");
  ASSERT_GE(lines.size(), 2u);
  const double before = lines.front().at("kl").get<double>();
  const double after = lines.back().at("kl").get<double>();
  EXPECT_LT(after, before / 5);  // halo.md 12.3 (8)
  EXPECT_LT(lines.back().at("student_loss").get<double>(),
            1.03 * lines.back().at("teacher_loss").get<double>());
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

TEST_F(HaloStageTest, KilledInAnyPhaseAndResumedGivesTheSameBits) {
  KilledAfter("align", "align", 2 * kCheckpointSteps);
  Run("align");
  ExpectSameResult("align");

  // Between the phases, with half of the layers scored.
  KilledAfter("score", "align", kAlignSteps);
  nlohmann::json scores = nlohmann::json::parse(*ReadFile(Path("score") + "/halo/scores.json"));
  auto& layers = scores.at("items").at("layers");
  layers.erase(layers.begin() + 2, layers.end());
  ASSERT_TRUE(WriteFileAtomically(Path("score") + "/halo/scores.json", scores.dump()).ok());
  Run("score");
  ExpectSameResult("score");

  KilledAfter("distil", "distil", 2 * kCheckpointSteps);
  Run("distil");
  ExpectSameResult("distil");

  // After the last update, before the result was saved.
  KilledAfter("end", "distil", kDistilSteps);
  Run("end");
  ExpectSameResult("end");
}

TEST_F(HaloStageTest, RefusesAStageWithoutATeacher) {
  PipelineConfig config;
  config.name = "alone";
  config.run.dir = Path("alone");
  config.stages = {HaloStageConfig(Path("corpus"))};
  const auto comm = parallel::MakeSelfCommunicator();
  const Status status = RunPipeline(*comm, config);
  EXPECT_EQ(ErrorCodeOf(status), "CFG-HALO");
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(status), ::testing::HasSubstr("init_from"));
}

}  // namespace
}  // namespace sala::recipes
