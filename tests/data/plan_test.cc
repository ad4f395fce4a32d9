// The plan of a stage's data must say what its samples turn out to be.
#include "data/plan.h"

#include <nlohmann/json.hpp>

#include "data/chat_sample.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

constexpr int64_t kSeqLen = 16;

struct Counts {
  int64_t targets = 0, padding = 0, segments = 0, min_segments = 1 << 20, max_segments = 0;
};

// Plans an epoch of one view and compares with what the stream delivers.
void ExpectPlanned(const DataConfig& config) {
  const auto tokenizer = MakeByteTokenizer();
  const auto stream = Value(SampleStream::Open(config, "s", kSeqLen, *tokenizer));
  const int64_t samples = stream->views()[0]->samples_per_epoch();
  const DataPlan plan = Value(PlanData(*stream, samples));
  Counts found;
  for (int64_t g = 0; g < samples; ++g) {
    const PackedSample sample = Value(stream->Get(g));
    const auto segments = static_cast<int64_t>(sample.segments.size());
    found.targets += sample.targets();
    found.padding += sample.padding;
    found.segments += segments;
    found.min_segments = std::min(found.min_segments, segments);
    found.max_segments = std::max(found.max_segments, segments);
  }
  const ViewPlan& view = plan.views[0];
  EXPECT_EQ(view.measured, samples);
  EXPECT_EQ(view.targets, found.targets);
  EXPECT_EQ(view.padding, found.padding);
  EXPECT_EQ(view.segments, found.segments);
  EXPECT_EQ(view.min_segments, found.min_segments);
  EXPECT_EQ(view.max_segments, found.max_segments);
  EXPECT_EQ(plan.tokens(), samples * kSeqLen - found.padding);
}

TEST(DataPlan, CountsWhatTheStreamDelivers) {
  TempDir dir;
  const std::vector<int64_t> lengths = {5, 40, 3, 16, 9, 7, 2, 11, 6, 1, 17, 16};
  for (const bool chat : {false, true}) {
    const std::string store = dir / (chat ? "chat" : "text");
    MakeStore(store, lengths, /*shard_tokens=*/50, chat);
    for (const Packing packing : {Packing::kConcat, Packing::kBestFit, Packing::kOnePerSample}) {
      for (const LongDocuments rule : {LongDocuments::kSplit, LongDocuments::kTruncate,
                                       LongDocuments::kDrop, LongDocuments::kAuto}) {
        for (const bool document_mask : {true, false}) {
          SCOPED_TRACE(testing::Message() << chat << static_cast<int>(packing)
                                          << static_cast<int>(rule) << document_mask);
          DataConfig config;
          config.packing = packing;
          config.long_documents = rule;
          config.document_mask = document_mask;
          config.mixture = {ViewConfig{.dataset = store}};
          ExpectPlanned(config);
        }
      }
    }
  }
}

TEST(DataPlan, EpochsFiltersAndVerdict) {
  TempDir dir;
  MakeStore(dir / "a", {4, 4, 8, 20, 40});
  const auto tokenizer = MakeByteTokenizer();
  DataConfig config;
  config.packing = Packing::kOnePerSample;
  config.long_documents = LongDocuments::kTruncate;
  config.mixture = {
      ViewConfig{.dataset = dir / "a", .weight = 1, .max_tokens = 10, .max_epochs = 3},
      ViewConfig{.dataset = dir / "a", .name = "long", .weight = 3, .min_tokens = 10}};
  const auto stream = Value(SampleStream::Open(config, "s", kSeqLen, *tokenizer));
  const DataPlan plan = Value(PlanData(*stream, 12));
  const ViewPlan& small = plan.views[0];
  const ViewPlan& large = plan.views[1];
  EXPECT_EQ(small.samples, 3);
  EXPECT_DOUBLE_EQ(small.epochs(), 1.0);
  EXPECT_FALSE(small.used_too_often());
  EXPECT_EQ(small.removed.too_long, 2);
  EXPECT_EQ(small.truncated, 0);
  EXPECT_EQ(large.samples, 9);
  EXPECT_DOUBLE_EQ(large.epochs(), 4.5);
  EXPECT_TRUE(large.used_too_often());
  EXPECT_EQ(large.removed.too_short, 3);
  EXPECT_EQ(large.truncated, 2);
  EXPECT_DOUBLE_EQ(large.padding_share(kSeqLen), 0.0);
  EXPECT_EQ(ToJson(plan)["views"][1]["verdict"], "MIX-EPOCHS");
  EXPECT_EQ(ErrorCodeOf(stream->CheckEpochs(12)), "MIX-EPOCHS");
  EXPECT_EQ(ErrorCodeOf(TraceSamples(*stream, 0, 12).status()), "MIX-EPOCHS");
  EXPECT_THAT(Value(TraceSamples(*stream, 0, 1)),
              ::testing::MatchesRegex("sample 0: view long, 1 segments, 16 targets, 0 slots of "
                                      "padding, crc [0-9a-f]+\n  tokens-00000.h5 document [34] "
                                      "tokens 0 to 16\n"));
}

TEST(MarkedText, IsOneLineWithMarksAndLimits) {
  const auto tokenizer = MakeByteTokenizer();
  const auto marked = [&](const std::string& text, const std::string& mask, int64_t run,
                          int64_t most) {
    std::vector<uint8_t> learned;
    for (const char c : mask) learned.push_back(c == 'x' ? 1 : 0);
    return MarkedText(*tokenizer, tokenizer->Encode(text), learned, {}, run, most);
  };
  EXPECT_EQ(marked("a\nb\x1b[1m", "..xxxxx", 0, 0), "a\\n[[b\\x1b[1m]]");
  EXPECT_EQ(marked("\xc3\xa9\xff", "..x", 0, 0), "\xc3\xa9[[\xef\xbf\xbd]]");
  EXPECT_EQ(marked("aaaaaaaaaabb", "..........xx", 4, 0), "aa ... aa[[bb]]");
  EXPECT_EQ(marked("\xc3\xa9\xc3\xa9\xc3\xa9", "......", 3, 0), " ... ");
  EXPECT_EQ(marked("aabbcc", "..xx..", 0, 3), "aa ... (4 more tokens)");
}

}  // namespace
}  // namespace sala::data
