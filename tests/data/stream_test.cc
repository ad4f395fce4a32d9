#include "data/stream.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/config.h"
#include "core/rng.h"
#include "data/view.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

std::vector<int64_t> RandomLengths(const std::string& seed, size_t count, uint64_t longest) {
  PhiloxStream rng(seed);
  std::vector<int64_t> lengths(count);
  for (auto& length : lengths) length = 1 + static_cast<int64_t>(rng.Bounded(longest));
  return lengths;
}

DataConfig Config(const std::vector<std::string>& datasets, Packing packing) {
  DataConfig config;
  config.packing = packing;
  for (size_t i = 0; i < datasets.size(); ++i) {
    ViewConfig view;
    view.dataset = datasets[i];
    view.name = "view" + std::to_string(i);
    view.max_epochs = 3;
    config.mixture.push_back(view);
  }
  return config;
}

std::unique_ptr<SampleStream> Open(const DataConfig& config, int64_t seq_len = 16,
                                   const std::string& stage = "stable") {
  const auto tokenizer = MakeByteTokenizer();
  return Value(SampleStream::Open(config, stage, seq_len, *tokenizer));
}

// Checks one sample against the store: tokens, positions, labels, boundaries, padding. Adds its
// targets to *targets.
void CheckSample(const PackedSample& sample, SampleStream& stream, int64_t seq_len,
                 std::map<std::array<int64_t, 3>, int>* targets) {
  const size_t slots = static_cast<size_t>(seq_len);
  ASSERT_EQ(sample.tokens.size(), slots);
  ASSERT_EQ(sample.labels.size(), slots);
  ASSERT_EQ(sample.positions.size(), slots);
  ASSERT_EQ(sample.cu_seqlens.front(), 0);
  ASSERT_EQ(sample.cu_seqlens.back(), seq_len);
  ASSERT_EQ(sample.cu_seqlens.size(), sample.segments.size() + (sample.padding > 0 ? 2 : 1));
  for (size_t s = 0; s < sample.segments.size(); ++s) {
    const SegmentMeta& meta = sample.segments[s];
    TokenStore& store = stream.views()[static_cast<size_t>(meta.view)]->store();
    TokenFile* file = Value(store.File(meta.file));
    const int64_t length = file->length(meta.document);
    std::vector<int32_t> tokens(static_cast<size_t>(length));
    std::vector<uint8_t> mask(tokens.size(), 1);
    SALA_ASSERT_OK(file->CopyTokens(file->begin(meta.document), length, tokens.data()));
    if (store.info().sft())
      SALA_ASSERT_OK(file->CopyMask(file->begin(meta.document), length, mask.data()));
    ASSERT_EQ(sample.cu_seqlens[s + 1] - sample.cu_seqlens[s], meta.length);
    for (int64_t t = 0; t < meta.length; ++t) {
      const size_t slot = static_cast<size_t>(sample.cu_seqlens[s] + t);
      const int64_t place = meta.start + t;
      ASSERT_EQ(sample.tokens[slot], tokens[static_cast<size_t>(place)]);
      ASSERT_EQ(sample.positions[slot], t);
      const bool learned = place + 1 < length && mask[static_cast<size_t>(place + 1)] == 1;
      ASSERT_EQ(sample.labels[slot], learned ? tokens[static_cast<size_t>(place + 1)] : -1);
      if (learned) ++(*targets)[{meta.file, meta.document, place + 1}];
    }
  }
  for (size_t slot = slots - static_cast<size_t>(sample.padding); slot < slots; ++slot) {
    EXPECT_EQ(sample.tokens[slot], 258);  // pad of the byte tokenizer
    EXPECT_EQ(sample.labels[slot], -1);
  }
}

struct OrderCase {
  Packing packing;
  bool sft;
};
class SampleOrder : public ::testing::TestWithParam<OrderCase> {};

TEST_P(SampleOrder, EveryTargetExactlyOncePerEpochAndEpochsAreOtherPermutations) {
  TempDir dir;
  // Several files, documents longer than a sample, a loss mask for chat.
  MakeStore(dir / "set", RandomLengths("lengths", 80, 60), /*shard_tokens=*/500, GetParam().sft);
  DataConfig config = Config({dir / "set"}, GetParam().packing);
  config.long_documents = LongDocuments::kSplit;
  auto stream = Open(config);
  const DatasetInfo& info = stream->views()[0]->store().info();
  ASSERT_GT(info.files.size(), 3U);
  const int64_t n = stream->views()[0]->samples_per_epoch();
  std::vector<std::vector<uint32_t>> crcs(2);
  for (int64_t epoch = 0; epoch < 2; ++epoch) {
    std::map<std::array<int64_t, 3>, int> targets;
    for (int64_t k = 0; k < n; ++k) {
      const PackedSample sample = Value(stream->Get(epoch * n + k));
      CheckSample(sample, *stream, 16, &targets);
      crcs[static_cast<size_t>(epoch)].push_back(DataCrc(sample));
    }
    EXPECT_EQ(static_cast<int64_t>(targets.size()), info.target_tokens);
    for (const auto& [target, count] : targets) ASSERT_EQ(count, 1);
  }
  EXPECT_NE(crcs[0], crcs[1]);
  if (GetParam().packing ==
      Packing::kOnePerSample) {  // the others cut documents at other places in every epoch
    for (auto& epoch : crcs) std::sort(epoch.begin(), epoch.end());
    EXPECT_EQ(crcs[0], crcs[1]);
  }
}

INSTANTIATE_TEST_SUITE_P(AllPackings, SampleOrder,
                         ::testing::Values(OrderCase{Packing::kConcat, false},
                                           OrderCase{Packing::kConcat, true},
                                           OrderCase{Packing::kBestFit, false},
                                           OrderCase{Packing::kBestFit, true},
                                           OrderCase{Packing::kOnePerSample, false}));

TEST(SampleStream, SamplesAreAFunctionOfG) {
  TempDir dir;
  MakeStore(dir / "a", RandomLengths("a", 60, 30), 300);
  MakeStore(dir / "b", RandomLengths("b", 60, 30), 300);
  const DataConfig config = Config({dir / "a", dir / "b"}, Packing::kBestFit);
  auto serial = Open(config);
  std::vector<uint32_t> crcs;
  for (int64_t g = 0; g < 60; ++g) crcs.push_back(DataCrc(Value(serial->Get(g))));
  for (const int64_t world :
       {2, 3, 8}) {  // what the ranks of a group deliver together is the serial list
    for (int64_t rank = 0; rank < world; ++rank) {
      auto stream = Open(config);
      for (int64_t g = rank; g < 60; g += world)
        ASSERT_EQ(DataCrc(Value(stream->Get(g))), crcs[static_cast<size_t>(g)]);
    }
  }
  auto backwards = Open(config);
  for (int64_t g = 59; g >= 0; g -= 13)
    EXPECT_EQ(DataCrc(Value(backwards->Get(g))), crcs[static_cast<size_t>(g)]);
  auto other_stage = Open(config, 16, "decay");
  int64_t same = 0;
  for (int64_t g = 0; g < 60; ++g)
    same += DataCrc(Value(other_stage->Get(g))) == crcs[static_cast<size_t>(g)] ? 1 : 0;
  EXPECT_LT(same, 30);
}

TEST(SampleStream, WithoutDocumentMaskTheSampleIsOneSegment) {
  TempDir dir;
  MakeStore(dir / "set", {5, 6, 4});
  DataConfig config = Config({dir / "set"}, Packing::kConcat);
  config.document_mask = false;
  const PackedSample sample = Value(Open(config, 16)->Get(0));
  EXPECT_EQ(sample.cu_seqlens, (std::vector<int32_t>{0, 15, 16}));
  EXPECT_EQ(sample.padding, 1);
  for (int32_t t = 0; t < 14; ++t) {
    EXPECT_EQ(sample.labels[static_cast<size_t>(t)], sample.tokens[static_cast<size_t>(t) + 1]);
    EXPECT_EQ(sample.positions[static_cast<size_t>(t)], t);
  }
  EXPECT_EQ(sample.labels[14], -1);
  EXPECT_EQ(sample.targets(), 14);
}

TEST(SampleStream, LengthRangesSplitADataset) {
  TempDir dir;
  const auto lengths = RandomLengths("ranges", 100, 60);
  MakeStore(dir / "set", lengths, 700);
  DataConfig config = Config({dir / "set", dir / "set"}, Packing::kOnePerSample);
  config.mixture[0].max_tokens = 20;
  config.mixture[1].min_tokens = 20;
  auto stream = Open(config, 64);
  const int64_t shorter =
      std::count_if(lengths.begin(), lengths.end(), [](int64_t n) { return n < 20; });
  EXPECT_EQ(stream->views()[0]->documents(), shorter);
  EXPECT_EQ(stream->views()[1]->documents(), 100 - shorter);
  for (int64_t g = 0; g < 20; ++g) {
    const PackedSample sample = Value(stream->Get(g));
    EXPECT_EQ(sample.segments[0].length < 20, sample.segments[0].view == 0);
  }
}

TEST(SampleStream, EpochLimits) {
  TempDir dir;
  MakeStore(dir / "set", {10, 10, 10});
  DataConfig config = Config({dir / "set"}, Packing::kOnePerSample);
  config.mixture[0].max_epochs = 2;
  auto stream = Open(config);
  SALA_ASSERT_OK(stream->CheckEpochs(6));
  ExpectError(stream->CheckEpochs(7), "MIX-EPOCHS", ExitCode::kConfig,
              {"view view0", "7 samples", "max_epochs is 2"});
  SALA_ASSERT_OK(stream->Get(5).status());
  ExpectError(stream->Get(6).status(), "MIX-EPOCHS", ExitCode::kConfig);
}

TEST(SampleStream, EmptyViewsSayWhatEachFilterRemoved) {
  TempDir dir;
  MakeStore(dir / "set", {3, 4, 50, 60}, 1 << 20, /*sft=*/true);
  DataConfig config = Config({dir / "set"}, Packing::kBestFit);
  config.mixture[0].min_tokens = 4;
  config.mixture[0].max_tokens = 55;
  config.mixture[0].min_tokens = 5;
  const auto tokenizer = MakeByteTokenizer();
  const auto status = SampleStream::Open(config, "sft", 16, *tokenizer).status();
  ExpectError(status, "DS-EMPTY", ExitCode::kData,
              {"view0", "of 4", "0 held out", "2 shorter than min_tokens 5",
               "1 not below max_tokens 55", "1 longer than seq_len 16"});
}

TEST(SampleStream, TokenizerOfTheRunMustBeThatOfTheData) {
  TempDir dir;
  MakeStore(dir / "set", {10});
  WriteText(dir / "corpus.txt", SampleText(40));
  SALA_ASSERT_OK(
      TrainSentencePiece({.inputs = {dir / "corpus.txt"}, .vocab_size = 320, .output = dir / "tok"})
          .status());
  const auto other = Value(LoadTokenizer(dir / "tok"));
  ExpectError(SampleStream::Open(Config({dir / "set"}, Packing::kConcat), "s", 16, *other).status(),
              "TOK-MISMATCH", ExitCode::kData, {"bytes", "sentencepiece", "320"});
}

TEST(SampleStream, TwoViewsOfOneName) {
  TempDir dir;
  MakeStore(dir / "set", {10});
  DataConfig config = Config({dir / "set", dir / "set"}, Packing::kConcat);
  config.mixture[1].name = "view0";
  const auto tokenizer = MakeByteTokenizer();
  ExpectError(SampleStream::Open(config, "s", 16, *tokenizer).status(), "CFG-CONFLICT",
              ExitCode::kConfig, {"view0"});
}

TEST(SampleCursor, CountsAddUpAndUnchangedDataIsAccepted) {
  TempDir dir;
  MakeStore(dir / "a", RandomLengths("a", 60, 30));
  MakeStore(dir / "b", RandomLengths("b", 60, 30));
  DataConfig config = Config({dir / "a", dir / "b"}, Packing::kBestFit);
  config.mixture[0].weight = 3;
  auto stream = Open(config);
  const auto cursor = stream->Cursor(40);
  EXPECT_EQ(cursor["counts"]["view0"], 30);
  EXPECT_EQ(cursor["counts"]["view1"], 10);
  SALA_ASSERT_OK(Open(config)->CheckCursor(cursor));
  config.mixture[1].max_epochs = 50;  // decides no sample
  SALA_ASSERT_OK(Open(config)->CheckCursor(cursor));
}

TEST(SampleCursor, ChangesAreNamedFieldByField) {
  TempDir dir;
  MakeStore(dir / "a", RandomLengths("a", 60, 30));
  MakeStore(dir / "b", RandomLengths("b", 60, 30));
  const DataConfig config = Config({dir / "a", dir / "b"}, Packing::kBestFit);
  const auto cursor = Open(config)->Cursor(40);
  DataConfig changed = config;
  changed.seed = 99;
  changed.mixture[1].min_tokens = 4;
  ExpectError(Open(changed)->CheckCursor(cursor), "DATA-CHANGED", ExitCode::kConfig,
              {"seed was 1234, is 99", "views.1.min_tokens was 0, is 4"});
  changed = config;
  changed.mixture.pop_back();
  ExpectError(Open(changed)->CheckCursor(cursor), "DATA-CHANGED", ExitCode::kConfig,
              {"views.1 was {", "is null"});
  ExpectError(Open(config, 32)->CheckCursor(cursor), "DATA-CHANGED", ExitCode::kConfig,
              {"seq_len was 16, is 32"});
  auto damaged = cursor;
  damaged["counts"]["view0"] = 7;
  ExpectError(Open(config)->CheckCursor(damaged), "DATA-CHANGED", ExitCode::kConfig,
              {"cursor.counts.view0 was 7, is 20"});
  ExpectError(Open(config)->CheckCursor(nlohmann::json::array()), "DATA-CHANGED", ExitCode::kConfig,
              {"no sample index"});
}

TEST(Validation, HeldOutDocumentsAreInNoTrainingView) {
  TempDir dir;
  MakeStore(dir / "a", RandomLengths("a", 300, 30), 900);
  MakeStore(dir / "b", RandomLengths("b", 200, 30), 900);
  DataConfig config = Config({dir / "a", dir / "b", dir / "a"}, Packing::kBestFit);
  config.validation.fraction = 0.2;
  config.mixture[0].max_tokens = 15;
  config.mixture[2].min_tokens = 15;
  for (ViewConfig& view : config.mixture) view.max_epochs = 100;
  auto stream = Open(config, 32);
  const auto tokenizer = MakeByteTokenizer();
  const auto set = Value(ValidationSet::Open(config, 32, *tokenizer));
  using Document = std::tuple<std::string, int64_t, int64_t>;
  const auto documents_of = [&](const PackedSample& sample, std::set<Document>* out) {
    for (const SegmentMeta& s : sample.segments)
      out->insert({config.mixture[static_cast<size_t>(s.view)].dataset, s.file, s.document});
  };
  std::set<Document> held_out;
  std::set<Document> trained;
  for (int64_t i = 0; i < set->size(); ++i) documents_of(Value(set->Get(i)), &held_out);
  int64_t total = 0;
  for (const auto& view : stream->views()) total += view->samples_per_epoch();
  // Equal weights: after 3 * total samples every view gave `total` of them, more than one epoch.
  for (int64_t g = 0; g < total * 3; ++g) documents_of(Value(stream->Get(g)), &trained);
  for (const Document& d : held_out) EXPECT_EQ(trained.count(d), 0U);
  EXPECT_EQ(held_out.size() + trained.size(), 500U);
  EXPECT_EQ(set->documents(), static_cast<int64_t>(held_out.size()));
  // 500 draws of probability 0.2: mean 100, standard deviation sqrt(500 * 0.2 * 0.8) = 9; five of
  // them.
  EXPECT_NEAR(static_cast<double>(held_out.size()), 100.0, 45.0);
}

TEST(Validation, FixedOrderAndLimit) {
  TempDir dir;
  MakeStore(dir / "a", RandomLengths("a", 300, 30), 900);
  DataConfig config = Config({dir / "a"}, Packing::kConcat);
  config.validation = {.fraction = 0.3, .max_tokens = 32 * 5};
  const auto tokenizer = MakeByteTokenizer();
  const auto first = Value(ValidationSet::Open(config, 32, *tokenizer));
  const auto second = Value(ValidationSet::Open(config, 32, *tokenizer));
  ASSERT_EQ(first->size(), 5);
  for (int64_t i = 0; i < 5; ++i)
    EXPECT_EQ(DataCrc(Value(first->Get(i))), DataCrc(Value(second->Get(i))));
  config.validation.fraction = 0;
  EXPECT_EQ(Value(ValidationSet::Open(config, 32, *tokenizer))->size(), 0);
}

TEST(Validation, SplitFollowsTheHashRule) {
  EXPECT_FALSE(IsHeldOut(12345, 1, 0.0));
  EXPECT_TRUE(IsHeldOut(12345, 1, 1.0));
  // The rule written out: 16 little-endian bytes of (hash, seed), top 32 bits against
  // floor(fraction * 2^32).
  const std::string bytes("\x39\x30\0\0\0\0\0\0\x01\0\0\0\0\0\0\0", 16);
  const double share = static_cast<double>(Xxh3(bytes) >> 32) / 4294967296.0;
  EXPECT_FALSE(IsHeldOut(12345, 1, share));
  EXPECT_TRUE(IsHeldOut(12345, 1, share + 1.0 / 4294967296.0));
}

TEST(DataConfig, ReadsAndChecksYaml) {
  const auto read = [](const std::string& text, DataConfig* config) {
    auto document = ConfigDocument::Parse(text, "stage.yaml");
    return document.ok() ? BindConfig(*document, config) : document.status();
  };
  DataConfig config;
  SALA_ASSERT_OK(
      read("seed: 7\npacking: concat\nvalidation: {fraction: 0.01}\nmixture:\n"
           "  - {dataset: a, weight: 0.5, max_tokens: 4K}\n  - {dataset: a, name: long, "
           "min_tokens: 4096}\n",
           &config));
  EXPECT_EQ(config.packing, Packing::kConcat);
  EXPECT_EQ(config.mixture[0].max_tokens, 4096);
  EXPECT_EQ(config.mixture[1].name, "long");
  DataConfig again;
  SALA_ASSERT_OK(read(EmitConfig(config), &again));
  EXPECT_EQ(EmitConfig(again), EmitConfig(config));
  DataConfig bad;
  EXPECT_EQ(ExitCodeOf(read("mixture:\n  - {dataset: a, min_tokens: 10, max_tokens: 10}\n", &bad)),
            ExitCode::kConfig);
  EXPECT_EQ(ErrorCodeOf(read("mixture:\n  - {dataset: a, wieght: 2}\n", &bad)), "CFG-KEY");
}

}  // namespace
}  // namespace sala::data
