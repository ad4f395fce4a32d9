// The arithmetic of the claims' verdicts, the documents they are measured on, and a trial of a few
// steps: taken up where it was left, refused where it is another one's. Whether the claims hold is
// measured by `sala bench halo`, not tested.
#include "recipes/halo/claims.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "core/file.h"
#include "recipes/halo/claim_trial.h"
#include "tests/core/temp_dir.h"

namespace sala::recipes {
namespace {

using ::testing::HasSubstr;

// Numbers at training length 10 for which all five claims hold with nothing to spare, in binary
// fractions where a margin is met exactly.
ClaimNumbers JustHolding() {
  ClaimNumbers numbers;
  numbers.length = 10;
  numbers.teacher_stream = {{10, 0.9}};
  numbers.teacher_needle = {{10, 0.8}};
  const auto conversion = [](double kl, double stream, double needle) {
    ConversionNumbers found;
    found.kl = kl;
    found.stream = {{10, stream}, {80, 0.5}, {160, 0.5}};
    found.needle = {{10, needle}, {20, 0.25}};
    return found;
  };
  numbers.conversions[kSelectedHybrid] = conversion(0.25, 1, 1);
  numbers.conversions[kNotAligned] = conversion(0.5, 1, 1);
  numbers.conversions[kAllLinear] = conversion(0.5, 0.5, 0.6875);  // mean 0.59375
  numbers.conversions[kRopeEverywhere] = conversion(0.25, 1, 1);
  numbers.conversions[kRopeEverywhere].stream = {{80, 0.375}, {160, 0.375}};
  numbers.conversions["random_1"] = conversion(0.125, 1, 1);
  numbers.conversions["random_2"] = conversion(0.5, 1, 1);  // mean 0.3125
  numbers.scale = ClaimNumbers::Scale{
      .base = 64, .candidates = {0, 64}, .losses = {2, 1}, .needle = {{20, 0.3125}}};
  return numbers;
}

ClaimVerdict VerdictOf(int number, const ClaimNumbers& numbers) {
  for (const ClaimResult& result : JudgeClaims(numbers)) {
    if (result.number == number) return result.verdict;
  }
  ADD_FAILURE() << "no claim " << number;
  return ClaimVerdict::kNotMeasured;
}

TEST(ClaimsTest, HoldAtTheirMargins) {
  for (int number = 9; number <= 13; ++number)
    EXPECT_EQ(VerdictOf(number, JustHolding()), ClaimVerdict::kHolds) << number;
}

TEST(ClaimsTest, EachFailsAloneBelowItsMargin) {
  const std::vector<std::pair<int, std::function<void(ClaimNumbers&)>>> changes = {
      {9, [](ClaimNumbers& n) { n.conversions[kNotAligned].kl = 0.49; }},
      {10, [](ClaimNumbers& n) { n.conversions[kAllLinear].stream[10] = 0.53; }},
      {10, [](ClaimNumbers& n) { n.conversions[kAllLinear].kl = 0.49; }},
      {11, [](ClaimNumbers& n) { n.conversions["random_2"].kl = 0.375; }},  // the mean is as good
      {12, [](ClaimNumbers& n) { n.conversions[kRopeEverywhere].stream[80] = 0.41; }},
      {12, [](ClaimNumbers& n) { n.conversions[kRopeEverywhere].stream[160] = 0.41; }},
      {13, [](ClaimNumbers& n) { n.scale->needle[20] = 0.29; }},
  };
  for (const auto& [broken, change] : changes) {
    ClaimNumbers numbers = JustHolding();
    change(numbers);
    for (int number = 9; number <= 13; ++number) {
      EXPECT_EQ(VerdictOf(number, numbers),
                number == broken ? ClaimVerdict::kDoesNotHold : ClaimVerdict::kHolds)
          << number << ", broken " << broken;
    }
  }
}

TEST(ClaimsTest, SayNothingWhereTheTeacherRecallsTooLittle) {
  ClaimNumbers numbers = JustHolding();
  numbers.teacher_needle = {{10, 0.45}};  // the mean of both tasks is 0.675
  EXPECT_EQ(VerdictOf(9, numbers), ClaimVerdict::kHolds);
  EXPECT_EQ(VerdictOf(10, numbers), ClaimVerdict::kNotMeasured);
  EXPECT_EQ(VerdictOf(11, numbers), ClaimVerdict::kHolds);
  EXPECT_EQ(VerdictOf(12, numbers), ClaimVerdict::kHolds);
  EXPECT_EQ(VerdictOf(13, numbers), ClaimVerdict::kNotMeasured);
  EXPECT_THAT(JudgeClaims(numbers).back().found,
              HasSubstr("not measured: the teacher recalls only 0.450"));
  numbers.teacher_stream = {{10, 0.69}};
  EXPECT_EQ(VerdictOf(12, numbers), ClaimVerdict::kNotMeasured);
}

TEST(ClaimsTest, NumbersSurviveTheirFile) {
  const ClaimNumbers numbers = JustHolding();
  EXPECT_EQ(ClaimNumbers::FromJson(nlohmann::json::parse(numbers.ToJson().dump())).ToJson(),
            numbers.ToJson());
}

// Every question can be answered from a fact before it, and from nothing else: its value is drawn.
TEST(ClaimDataTest, EveryAnswerWasToldBefore) {
  for (const ClaimTask task : {ClaimTask::kStream, ClaimTask::kNeedle}) {
    ClaimDataOptions options = {.task = task,
                                .seed = 3,
                                .purpose = "test",
                                .length = 96,
                                .least_keys = 5,
                                .keys = 9,
                                .questions = 7,
                                .filler_share = 0.3};
    int64_t answers = 0;
    std::set<int32_t> values;
    for (int64_t index = 0; index < 40; ++index) {
      const ClaimDocument document = MakeClaimDocument(options, index);
      ASSERT_EQ(document.tokens.size(), 96u);
      ASSERT_EQ(document.recalled.size(), 96u);
      for (size_t t = 0; t < 96; ++t) {
        if (document.recalled[t] == 0) continue;
        ++answers;
        ASSERT_GT(t, 0u);
        const int32_t key = document.tokens[t - 1];
        const int32_t value = document.tokens[t] - 32;
        values.insert(value);
        const int32_t fact = 38 + key * 6 + value;  // 32 keys, then 6 values, then the facts
        EXPECT_THAT(std::vector<int32_t>(document.tokens.begin(),
                                         document.tokens.begin() + static_cast<int64_t>(t)),
                    ::testing::Contains(fact));
      }
    }
    EXPECT_GT(answers, 40 * 5);
    EXPECT_EQ(values.size(), 6u);
  }
}

TEST(ClaimDataTest, DocumentsDependOnSeedPurposeAndIndexOnly) {
  const ClaimDataOptions options = {.task = ClaimTask::kNeedle,
                                    .seed = 3,
                                    .purpose = "test",
                                    .length = 48,
                                    .least_keys = 5,
                                    .keys = 5,
                                    .questions = 5};
  const std::vector<int32_t> tokens = MakeClaimDocument(options, 4).tokens;
  EXPECT_EQ(MakeClaimDocument(options, 4).tokens, tokens);
  EXPECT_NE(MakeClaimDocument(options, 5).tokens, tokens);
  ClaimDataOptions other = options;
  other.purpose = "other";
  EXPECT_NE(MakeClaimDocument(other, 4).tokens, tokens);
  other = options;
  other.seed = 4;
  EXPECT_NE(MakeClaimDocument(other, 4).tokens, tokens);
}

TEST(ClaimTrialTest, RunsIsTakenUpAndRefusesWhatIsNotItsOwn) {
  const TempDir directory;
  const ClaimSettings settings = QuickClaimSettings();
  const std::string path = directory.path() + "/seed";
  std::vector<std::string> said;
  const auto trial = [&](const ClaimSettings& with, const std::string& origin) {
    said.clear();
    return ClaimTrial(with, 1, path, 2, origin,
                      [&](const std::string& line) { said.push_back(line); })
        .Run();
  };
  const auto first = trial(settings, "test");
  ASSERT_TRUE(first.ok()) << MessageOf(first.status());
  // teacher, alignment, selection, four hybrids, eight random sets
  EXPECT_EQ(said.size(), 15u);
  EXPECT_EQ(first->conversions.size(), 12u);
  std::set<std::vector<int64_t>> sets;
  for (const auto& [name, conversion] : first->conversions) {
    if (name.rfind(kRandomSet, 0) == 0) sets.insert(conversion.softmax_layers);
    EXPECT_GT(conversion.kl, 0) << name;
    EXPECT_EQ(conversion.stream.size(), 5u) << name;
    EXPECT_EQ(conversion.needle.size(), 3u) << name;
  }
  EXPECT_EQ(sets.size(), 8u);
  EXPECT_EQ(sets.count(first->selected), 0u);
  EXPECT_EQ(first->conversions.at(kNotAligned).softmax_layers, first->selected);
  EXPECT_TRUE(first->conversions.at(kAllLinear).softmax_layers.empty());
  EXPECT_EQ(JudgeClaims(*first).size(), 5u);
  EXPECT_EQ(first->choices.size(), 4u);
  EXPECT_EQ(first->choices.at("halo"), first->selected);

  // Nothing is done again.
  const auto again = trial(settings, "test");
  ASSERT_TRUE(again.ok()) << MessageOf(again.status());
  EXPECT_TRUE(said.empty());
  EXPECT_EQ(again->ToJson(), first->ToJson());

  // As if the program had ended before the third random set and the selected hybrid: these two are
  // measured again, from the teacher and the mixers on disk, and come out the same.
  const std::string results = path + "/results.json";
  nlohmann::json saved = nlohmann::json::parse(*ReadFile(results));
  saved["numbers"]["conversions"].erase("random_3");
  saved["numbers"]["conversions"].erase(kSelectedHybrid);
  std::ofstream(results) << saved.dump();
  const auto resumed = trial(settings, "test");
  ASSERT_TRUE(resumed.ok()) << MessageOf(resumed.status());
  EXPECT_EQ(said.size(), 2u);
  for (const char* name : {"random_3", kSelectedHybrid}) {
    EXPECT_EQ(resumed->conversions.at(name).kl, first->conversions.at(name).kl) << name;
    EXPECT_EQ(resumed->conversions.at(name).stream, first->conversions.at(name).stream) << name;
  }

  const auto other_program = trial(settings, "another");
  EXPECT_EQ(ErrorCodeOf(other_program.status()), "BENCH-DIR");
  EXPECT_EQ(ExitCodeOf(other_program.status()), ExitCode::kConfig);
  ClaimSettings changed = settings;
  changed.recall_documents += 1;
  EXPECT_EQ(ErrorCodeOf(trial(changed, "test").status()), "BENCH-DIR");

  std::ofstream(results) << "{\"settings\": 3";
  const auto damaged = trial(settings, "test");
  EXPECT_EQ(ErrorCodeOf(damaged.status()), "BENCH-RESULTS");
  EXPECT_EQ(ExitCodeOf(damaged.status()), ExitCode::kData);
}

}  // namespace
}  // namespace sala::recipes
