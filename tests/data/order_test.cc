// Golden vectors of mixture and packing.
#include <algorithm>
#include <map>
#include <numeric>

#include "core/rng.h"
#include "data/mixture.h"
#include "data/packing.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

std::vector<int64_t> Sequence(const std::vector<double>& weights, int64_t n) {
  Mixture mixture = Value(Mixture::Make(weights));
  std::vector<int64_t> out;
  for (int64_t g = 0; g < n; ++g) out.push_back(mixture.At(g).view);
  return out;
}

TEST(Mixture, KnownSequences) {
  EXPECT_EQ(Sequence({3, 1, 1}, 10), (std::vector<int64_t>{0, 1, 0, 2, 0, 0, 1, 0, 2, 0}));
  EXPECT_EQ(Sequence({0.7, 0.2, 0.1}, 15),
            (std::vector<int64_t>{0, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2}));
}

TEST(Mixture, CountsStayWithinTheNumberOfViewsOfTheirShare) {
  const std::vector<double> weights = {0.35, 0.1, 0.3, 0.2503, 0.0001};
  Mixture mixture = Value(Mixture::Make(weights));
  const auto& w = mixture.integer_weights();
  const double total = static_cast<double>(std::accumulate(w.begin(), w.end(), int64_t{0}));
  for (int64_t g = 1; g < 20000; g += 7) {
    const auto& counts = mixture.CountsBefore(g);
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), g);
    for (size_t i = 0; i < w.size(); ++i) {
      ASSERT_LT(std::abs(static_cast<double>(counts[i]) -
                         static_cast<double>(g) * static_cast<double>(w[i]) / total),
                5.0)
          << g;
    }
  }
}

TEST(Mixture, ChoiceIsAFunctionOfG) {
  Mixture rising = Value(Mixture::Make({0.6, 0.3, 0.1}));
  Mixture jumping = Value(Mixture::Make({0.6, 0.3, 0.1}));
  for (const int64_t g : {57, 3, 100, 99, 0, 58}) {
    const auto expected = rising.At(g);
    const auto found = jumping.At(g);
    EXPECT_EQ(found.view, expected.view);
    EXPECT_EQ(found.index, expected.index);
    jumping.At(1000);
  }
}

TEST(Mixture, WeightsMustBePositive) {
  ExpectError(Mixture::Make({1, 0}).status(), "MIX-WEIGHT", ExitCode::kConfig,
              {"entry 1", "positive"});
  ExpectError(Mixture::Make({1, -2}).status(), "MIX-WEIGHT", ExitCode::kConfig, {"-2"});
  ExpectError(Mixture::Make({}).status(), "MIX-WEIGHT", ExitCode::kConfig, {"no entries"});
}

TEST(ShuffleStreams, KnownPermutations) {
  EXPECT_EQ(PhiloxStream("v1|1234|short_decay|web|0|shard_order|").key(), 0x48cc7e05c4ad42f0ULL);
  EXPECT_EQ(PhiloxStream("v1|1234|short_decay|web|0|shard_order|").Permutation(10),
            (std::vector<int64_t>{7, 8, 6, 5, 1, 3, 9, 2, 0, 4}));
  EXPECT_EQ(PhiloxStream("v1|1234|short_decay|web|0|doc_order|shard-00003").Permutation(10),
            (std::vector<int64_t>{7, 6, 1, 4, 3, 9, 5, 0, 2, 8}));
}

// "document.start+length" of each segment of each sample.
std::vector<std::vector<std::string>> Names(const PackedFile& packed) {
  std::vector<std::vector<std::string>> out;
  for (int64_t s = 0; s < packed.samples(); ++s) {
    std::vector<std::string> names;
    for (auto i = packed.first[static_cast<size_t>(s)];
         i < packed.first[static_cast<size_t>(s) + 1]; ++i) {
      const Segment& segment = packed.segments[static_cast<size_t>(i)];
      names.push_back(std::to_string(segment.document) + "." + std::to_string(segment.start) + "+" +
                      std::to_string(segment.length));
    }
    out.push_back(names);
  }
  return out;
}

using Bins = std::vector<std::vector<std::string>>;
const std::vector<int64_t> kLengths = {5, 40, 3, 16, 9, 7, 2, 11, 6};

TEST(Packing, BestFitExample) {
  const PackRule rule{.packing = Packing::kBestFit, .seq_len = 16};
  EXPECT_EQ(Names(Pack(kLengths, rule)), (Bins{{"1.0+16"},
                                               {"1.16+16"},
                                               {"3.0+16"},
                                               {"7.0+11", "0.0+5"},
                                               {"4.0+9", "5.0+7"},
                                               {"1.32+8", "8.0+6", "6.0+2"},
                                               {"2.0+3"}}));
}

TEST(Packing, BestFitOfLongDocuments) {
  PackRule rule{
      .packing = Packing::kBestFit, .long_documents = LongDocuments::kTruncate, .seq_len = 16};
  EXPECT_EQ(Names(Pack({40, 3}, rule)), (Bins{{"0.0+16"}, {"1.0+3"}}));
  rule.long_documents = LongDocuments::kDrop;
  EXPECT_EQ(Names(Pack({40, 3}, rule)), (Bins{{"1.0+3"}}));
}

TEST(Packing, BinsCloseAtMaxSegments) {
  const PackRule rule{.packing = Packing::kBestFit, .seq_len = 16, .max_segments = 2};
  EXPECT_EQ(Names(Pack({2, 2, 2}, rule)), (Bins{{"0.0+2", "1.0+2"}, {"2.0+2"}}));
}

TEST(Packing, ConcatCutsTheStream) {
  const PackRule rule{.packing = Packing::kConcat, .seq_len = 16};
  EXPECT_EQ(Names(Pack({5, 20, 3, 10}, rule)),
            (Bins{{"0.0+5", "1.0+11"}, {"1.11+9", "2.0+3", "3.0+4"}, {"3.4+6"}}));
  EXPECT_EQ(Pack({8, 8}, rule).samples(), 1);
  EXPECT_EQ(CountSamples({5, 20, 3, 10}, rule), 3);
}

TEST(Packing, OnePerSample) {
  const PackRule rule{.packing = Packing::kOnePerSample, .seq_len = 16};
  EXPECT_EQ(Names(Pack({5, 20}, rule)), (Bins{{"0.0+5"}, {"1.0+16"}, {"1.16+4"}}));
}

// Every token of every document lies in exactly one segment, no sample is overfull, and the number
// of samples does not depend on the order of the documents.
TEST(Packing, CoversEveryTokenOnceForAnyLengthsAndOrder) {
  PhiloxStream rng("test packing");
  for (int round = 0; round < 60; ++round) {
    const PackRule rule{.packing = round % 3 == 0   ? Packing::kConcat
                                   : round % 3 == 1 ? Packing::kBestFit
                                                    : Packing::kOnePerSample,
                        .seq_len = 1 + static_cast<int64_t>(rng.Bounded(40)),
                        .max_segments = 1 + static_cast<int64_t>(rng.Bounded(6))};
    std::vector<int64_t> lengths(1 + rng.Bounded(50));
    for (auto& length : lengths) length = 1 + static_cast<int64_t>(rng.Bounded(90));
    const PackedFile packed = Pack(lengths, rule);
    EXPECT_EQ(packed.samples(), CountSamples(lengths, rule));
    std::map<std::pair<int64_t, int64_t>, int> seen;
    for (int64_t s = 0; s < packed.samples(); ++s) {
      int64_t used = 0;
      for (auto i = packed.first[static_cast<size_t>(s)];
           i < packed.first[static_cast<size_t>(s) + 1]; ++i) {
        const Segment& segment = packed.segments[static_cast<size_t>(i)];
        used += segment.length;
        for (int64_t t = 0; t < segment.length; ++t) ++seen[{segment.document, segment.start + t}];
      }
      ASSERT_GT(used, 0);
      ASSERT_LE(used, rule.seq_len);
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()),
              std::accumulate(lengths.begin(), lengths.end(), int64_t{0}));
    for (const auto& [token, count] : seen) ASSERT_EQ(count, 1);
    std::vector<int64_t> shuffled;
    for (const int64_t i : rng.Permutation(static_cast<int64_t>(lengths.size())))
      shuffled.push_back(lengths[static_cast<size_t>(i)]);
    EXPECT_EQ(CountSamples(shuffled, rule), packed.samples());
  }
}

}  // namespace
}  // namespace sala::data
