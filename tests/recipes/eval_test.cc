#include "recipes/eval.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "core/file.h"
#include "core/rng.h"
#include "parallel/communicator.h"
#include "recipes/eval_compare.h"
#include "recipes/eval_files.h"
#include "recipes/eval_report.h"
#include "recipes/eval_sources.h"
#include "tests/core/temp_dir.h"

namespace sala::recipes {
namespace {

using ::testing::HasSubstr;

// A model of whatever logits [T, V] a function gives: they are the hidden states of a head that is
// the identity, so the losses are those of the real head and its rule for ties.
using LogitsOf = std::function<std::vector<float>(const model::Batch&, int64_t vocab)>;

class EvalTest : public ::testing::Test {
 protected:
  EvalTest() : tokenizer_(data::MakeByteTokenizer()), world_(parallel::MakeSelfCommunicator()) {
    ctx_.pool = &pool_;
    ctx_.scratch = &scratch_;
    mesh_ = parallel::Mesh::Create(*world_, {}).value();
  }

  ScoreDocument Stub(const LogitsOf& logits_of) {
    return
        [this, logits_of](const model::Batch& batch, std::span<const std::vector<int32_t>> labels) {
          const int64_t vocab = tokenizer_->vocab_size();
          std::vector<float> logits = logits_of(batch, vocab);
          std::vector<float> identity(static_cast<size_t>(vocab * vocab), 0.0F);
          for (int64_t v = 0; v < vocab; ++v) identity[static_cast<size_t>(v * vocab + v)] = 1.0F;
          std::vector<kernels::CrossEntropyResult> results;
          for (const std::vector<int32_t>& set : labels) {
            const ConstTensor targets(set.data(), {batch.size()});
            results.push_back(kernels::CrossEntropy(
                ctx_, ConstTensor(logits.data(), {batch.size(), vocab}),
                ConstTensor(identity.data(), {vocab, vocab}), targets, {}, {}, {}, {}));
          }
          return results;
        };
  }

  TaskResult MeasureTask(const std::string& task, int64_t length, int64_t samples,
                         const LogitsOf& logits_of) {
    EvalRequest request;
    request.config.tasks = {task};
    request.config.lengths_tokens = {length};
    request.config.samples = samples;
    const auto evaluation = Evaluation::Open(request, *tokenizer_);
    EXPECT_TRUE(evaluation.ok()) << evaluation.status();
    return evaluation->Run(*mesh_, Stub(logits_of)).value()[0];
  }

  ThreadPool pool_{1};
  Arena scratch_;
  Context ctx_;
  std::unique_ptr<data::Tokenizer> tokenizer_;
  std::unique_ptr<parallel::Communicator> world_;
  std::unique_ptr<parallel::Mesh> mesh_;
};

// Of the text so far: finds where the last 24 tokens stood before, and repeats what came then. In a
// passkey and a single needle the words in front of the value stand in the needle too.
std::vector<float> Copying(const model::Batch& batch, int64_t vocab, int64_t shift) {
  constexpr int64_t kMatch = 14;
  const std::vector<int32_t>& t = batch.tokens;
  const auto n = static_cast<int64_t>(t.size());
  std::vector<float> logits(static_cast<size_t>(n * vocab), 0.0F);
  for (int64_t at = kMatch - 1; at < n; ++at) {
    for (int64_t then = kMatch - 1; then < at; ++then) {
      if (!std::equal(t.begin() + at - kMatch + 1, t.begin() + at + 1,
                      t.begin() + then - kMatch + 1))
        continue;
      const int64_t from = std::min(then + 1 + shift, n - 1);
      logits[static_cast<size_t>(at * vocab + t[static_cast<size_t>(from)])] = 20.0F;
      break;
    }
  }
  return logits;
}

TEST_F(EvalTest, ACopyingModelIsRightAndAShiftedOneIsNot) {
  for (const char* task : {"passkey", "niah_single_1", "niah_multikey_3"}) {
    const auto copy = [](int64_t shift) {
      return [shift](const model::Batch& batch, int64_t vocab) {
        return Copying(batch, vocab, shift);
      };
    };
    const TaskResult right = MeasureTask(task, 600, 8, copy(0));
    EXPECT_EQ(right.share(), 1.0) << task;
    EXPECT_GT(right.mean_log_probability(), -1e-3) << task;  // 20 nats ahead of 260 others
    EXPECT_EQ(MeasureTask(task, 600, 8, copy(1)).share(), 0.0) << task;
  }
}

TEST_F(EvalTest, AUniformModelIsNeverRight) {
  const TaskResult result =
      MeasureTask("passkey", 400, 6, [](const model::Batch& batch, int64_t vocab) {
        return std::vector<float>(static_cast<size_t>(batch.size() * vocab), 0.0F);
      });
  EXPECT_EQ(result.share(), 0.0);
  // Ties go to id 0, which is no byte of an answer; float32 keeps seven digits.
  EXPECT_NEAR(result.mean_log_probability(),
              -std::log(static_cast<double>(tokenizer_->vocab_size())), 1e-5);
}

TEST_F(EvalTest, DepthBucketsAddUp) {
  const TaskResult result = MeasureTask(
      "niah_single_1", 500, 40,
      [](const model::Batch& batch, int64_t vocab) { return Copying(batch, vocab, 0); });
  const auto line = SummaryLine(result, 7, {});
  int64_t count = 0;
  int64_t right = 0;
  for (const auto& bucket : line["depths"]) {
    count += bucket["count"].get<int64_t>();
    right += bucket["right"].get<int64_t>();
  }
  EXPECT_EQ(line["depths"].size(), 7U);
  EXPECT_EQ(count, 40);
  EXPECT_EQ(right, result.right());
  EXPECT_EQ(line["count"], 40);
  EXPECT_FALSE(line.contains("buckets"));
}

// Documents of drawn tokens.
std::string MakeStore(const TempDir& dir, const data::Tokenizer& tokenizer,
                      std::vector<std::vector<int32_t>>* documents) {
  PhiloxStream rng("eval_test");
  auto writer =
      data::TokenStoreWriter::Create({.directory = dir / "text", .name = "text"}, tokenizer)
          .value();
  writer->AddSource("text", "CC0-1.0", "");
  for (const int64_t length : {90, 300, 260, 257, 256, 255}) {
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < length; ++t) ids.push_back(static_cast<int32_t>('a' + rng.Bounded(26)));
    EXPECT_TRUE(writer->Add({.tokens = ids, .hash = static_cast<uint64_t>(length)}).ok());
    documents->push_back(std::move(ids));
  }
  EXPECT_TRUE(writer->Finish({}).ok());
  return dir / "text";
}

// Some logits that depend on the position and the token before.
std::vector<float> SomeLogits(const model::Batch& batch, int64_t vocab) {
  std::vector<float> logits;
  for (int64_t t = 0; t < batch.size(); ++t) {
    for (int64_t v = 0; v < vocab; ++v) {
      const int64_t mixed = (batch.tokens[static_cast<size_t>(t)] * 31 + v * 7 + t * 13) % 97;
      logits.push_back(static_cast<float>(mixed) / 32.0F);
    }
  }
  return logits;
}

// -log softmax(logits of token t - 1)[token t], in float64.
double Loss(const std::vector<float>& logits, int64_t vocab, const std::vector<int32_t>& ids,
            int64_t t) {
  double sum = 0;
  const float* row = logits.data() + (t - 1) * vocab;
  for (int64_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v]));
  return std::log(sum) - row[ids[static_cast<size_t>(t)]];
}

TEST_F(EvalTest, LossByPositionIsTheMeanOfEachRange) {
  TempDir dir;
  std::vector<std::vector<int32_t>> documents;
  const std::string store = MakeStore(dir, *tokenizer_, &documents);
  const auto source = OpenLossSource(kLossByPosition, 256, 3, store, nullptr, *tokenizer_).value();
  ASSERT_EQ(source->size(), 3);  // of the four that are long enough
  const TaskResult result = MeasureSource(*mesh_, *source, Stub(SomeLogits)).value();
  ASSERT_EQ(result.buckets.size(), 8U);  // [1, 2) ... [128, 256)
  const int64_t vocab = tokenizer_->vocab_size();
  for (const LossBucket& bucket : result.buckets) {
    double sum = 0;
    for (const size_t d : {1U, 2U, 3U}) {
      const std::vector<int32_t> ids(documents[d].begin(), documents[d].begin() + 256);
      const std::vector<float> logits = SomeLogits(model::SingleDocument(ids), vocab);
      for (int64_t t = bucket.from; t < bucket.to; ++t) sum += Loss(logits, vocab, ids, t);
    }
    EXPECT_EQ(bucket.count, 3 * (bucket.to - bucket.from));
    // float32 logits and exponentials of 260 numbers.
    EXPECT_NEAR(bucket.loss, sum / static_cast<double>(bucket.count), 1e-5) << bucket.from;
  }
  const auto line = SummaryLine(result, 10, {});
  EXPECT_TRUE(line.contains("buckets"));
  EXPECT_FALSE(line.contains("share"));
}

TEST_F(EvalTest, LossByContextMeasuresTheSameTokensWithLessBeforeThem) {
  TempDir dir;
  std::vector<std::vector<int32_t>> documents;
  const std::string store = MakeStore(dir, *tokenizer_, &documents);
  const auto source = OpenLossSource(kLossByContext, 256, 9, store, nullptr, *tokenizer_).value();
  ASSERT_EQ(source->size(), 4);
  const TaskResult result = MeasureSource(*mesh_, *source, Stub(SomeLogits)).value();
  ASSERT_EQ(result.buckets.size(), 2U);  // 128 and 64 tokens before the last 128
  const int64_t vocab = tokenizer_->vocab_size();
  for (const LossBucket& bucket : result.buckets) {
    EXPECT_EQ(bucket.to - bucket.from, 128);
    EXPECT_EQ(bucket.count, 4 * 128);
    double sum = 0;
    for (const size_t d : {1U, 2U, 3U, 4U}) {
      const std::vector<int32_t> ids(documents[d].begin() + 256 - bucket.to,
                                     documents[d].begin() + 256);
      const std::vector<float> logits = SomeLogits(model::SingleDocument(ids), vocab);
      for (int64_t t = bucket.from; t < bucket.to; ++t) sum += Loss(logits, vocab, ids, t);
    }
    EXPECT_NEAR(bucket.loss, sum / static_cast<double>(bucket.count), 1e-5) << bucket.from;
  }
}

TEST_F(EvalTest, DocumentsThatAreTooShortOrMissing) {
  TempDir dir;
  std::vector<std::vector<int32_t>> documents;
  const std::string store = MakeStore(dir, *tokenizer_, &documents);
  const auto open = [&](const std::string& task, int64_t length, const std::string& from) {
    EvalRequest request;
    request.config.tasks = {task};
    request.config.lengths_tokens = {length};
    request.config.haystack = from;
    return Evaluation::Open(request, *tokenizer_).status();
  };
  const auto expect = [](const Status& status, const char* code, const char* text) {
    EXPECT_EQ(ErrorCodeOf(status), code);
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
    EXPECT_THAT(MessageOf(status), HasSubstr(text));
  };
  expect(open(kLossByPosition, 512, store), "EVAL-HAYSTACK", "the longest has 300 tokens");
  expect(open(kLossByPosition, 64, store), "EVAL-LENGTH", "at least 128");
  expect(open(kLossByContext, 512, ""), "EVAL-HAYSTACK", "--haystack");
  expect(open("niah_single_2", 512, ""), "EVAL-HAYSTACK", "niah_single_2");
  expect(open("niah_single_2", 512, dir / "none"), "EVAL-HAYSTACK", "no dataset there");
  expect(open("niah_singel_1", 512, store), "EVAL-TASK", "did you mean 'niah_single_1'?");
  expect(open("passkey", 30, store), "EVAL-LENGTH", "passkey of length 30");
}

TEST_F(EvalTest, PromptsOfTheUser) {
  TempDir dir;
  const auto write = [&dir](const std::string& text) {
    EXPECT_TRUE(WriteFileAtomically(dir / "p.jsonl", text).ok());
    return dir / "p.jsonl";
  };
  EvalRequest request;
  request.prompts = write(
      "{\"prompt\": \"The pass key is 123. The pass key is\", \"answer\": \" 123\", \"id\": "
      "\"x\"}\n"
      "\n{\"prompt\": \"one\", \"answer\": \" two three\", \"group\": \"other\"}\n");
  const auto evaluation = Evaluation::Open(request, *tokenizer_).value();
  const auto results = evaluation
                           .Run(*mesh_, Stub([](const model::Batch& batch, int64_t vocab) {
                             return Copying(batch, vocab, 0);
                           }))
                           .value();
  ASSERT_EQ(results.size(), 2U);
  EXPECT_EQ(results[0].task, "prompts");
  EXPECT_EQ(results[0].samples[0].id, "x");
  EXPECT_TRUE(results[0].samples[0].right);
  EXPECT_EQ(results[1].task, "prompts_other");
  EXPECT_EQ(results[1].length, 1 + 13);
  EXPECT_FALSE(results[1].samples[0].right);

  const std::map<std::string, std::string> bad = {
      {"{\"prompt\": \"a\"}\n", "line 1: \"answer\" is missing"},
      {"{\"prompt\": \"a\", \"answer\": 3}\n", "\"answer\" is no text"},
      {"{\"prompt\": \"a\", \"answer\": \" b\", \"anwser\": \"c\"}\n", "unknown key \"anwser\""},
      {"{\"prompt\": \"a\", \"answer\": \" b\"}\n[1]\nnothing\n",
       "2 of 3 lines cannot be used: line 2: no JSON object; line 3: no JSON object"},
      {"{\"prompt\": \"a\", \"answer\": \" b\", \"group\": \"../x\"}\n", "group \"../x\""},
      {"\n", "holds no record"}};
  for (const auto& [text, message] : bad) {
    request.prompts = write(text);
    const Status status = Evaluation::Open(request, *tokenizer_).status();
    EXPECT_EQ(ErrorCodeOf(status), "EVAL-PROMPTS") << text;
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kData);
    EXPECT_THAT(MessageOf(status), HasSubstr(message));
  }
  request.prompts = dir / "none.jsonl";
  EXPECT_EQ(ErrorCodeOf(Evaluation::Open(request, *tokenizer_).status()), "FILE-MISSING");
}

TEST(EvalReport, WilsonIntervals) {
  // Newcombe 1998, table I, method 3.
  EXPECT_NEAR(WilsonInterval(81, 263).low, 0.2553, 5e-5);
  EXPECT_NEAR(WilsonInterval(81, 263).high, 0.3662, 5e-5);
  EXPECT_NEAR(WilsonInterval(15, 148).low, 0.0624, 5e-5);
  EXPECT_NEAR(WilsonInterval(15, 148).high, 0.1605, 5e-5);
  EXPECT_EQ(WilsonInterval(0, 20).low, 0.0);
  EXPECT_NEAR(WilsonInterval(0, 20).high, 0.1611, 5e-5);
  EXPECT_EQ(WilsonInterval(29, 29).high, 1.0);
  EXPECT_NEAR(WilsonInterval(29, 29).low, 0.8830, 5e-5);
}

TEST(EvalReport, PairedBootstrap) {
  const PairedDifference none = PairedBootstrap(std::vector<double>(30, 0.0), 500, "s");
  EXPECT_EQ(none.mean, 0.0);
  EXPECT_EQ(none.interval.low, 0.0);
  EXPECT_EQ(none.interval.high, 0.0);
  const PairedDifference all = PairedBootstrap(std::vector<double>(30, 1.0), 500, "s");
  EXPECT_EQ(all.interval.low, 1.0);
  // Of 200 sets of 40 differences with mean 0.2 the interval holds the mean in about 95 %: below
  // 0.88 or above 0.995 would be four standard errors (0.015) or more away.
  PhiloxStream rng("coverage");
  int covered = 0;
  constexpr int kSets = 200;
  for (int set = 0; set < kSets; ++set) {
    std::vector<double> differences;
    for (int i = 0; i < 40; ++i) differences.push_back(0.2 + rng.NextNormal());
    const Interval interval =
        PairedBootstrap(differences, 500, "set" + std::to_string(set)).interval;
    covered += interval.low <= 0.2 && 0.2 <= interval.high ? 1 : 0;
  }
  EXPECT_GE(covered, 176);
  EXPECT_LE(covered, 199);
}

TaskResult Made(const std::vector<bool>& right) {
  TaskResult result;
  result.task = "passkey";
  result.length = 64;
  for (size_t i = 0; i < right.size(); ++i) {
    result.samples.push_back({.index = static_cast<int64_t>(i),
                              .depth = 0.5,
                              .right = right[i],
                              .log_probability = right[i] ? -0.1 : -2.0,
                              .hash = "h" + std::to_string(i),
                              .id = ""});
  }
  return result;
}

Status WriteEvaluation(const std::string& directory, const TaskResult& result,
                       const nlohmann::ordered_json& settings = {{"seed", 1}}) {
  SALA_ASSIGN_OR_RETURN(EvalWriter writer,
                        EvalWriter::Open({.directory = directory, .settings = settings}));
  SALA_RETURN_IF_ERROR(writer.Add(result));
  return writer.Finish();
}

TEST(EvalReport, ComparisonOfWrittenEvaluations) {
  TempDir dir;
  const std::vector<bool> few = {true, false, false, false, false, false, false, false};
  const std::vector<bool> most = {true, true, true, true, true, true, true, false};
  ASSERT_TRUE(WriteEvaluation(dir / "a", Made(few)).ok());
  ASSERT_TRUE(WriteEvaluation(dir / "b", Made(most)).ok());
  const auto lines = CompareEvaluations(dir / "a", dir / "b", 1).value();
  ASSERT_EQ(lines.size(), 1U);
  EXPECT_EQ(lines[0]["difference"], 0.75);
  EXPECT_EQ(lines[0]["verdict"], "better");
  EXPECT_EQ(CompareEvaluations(dir / "b", dir / "a", 1).value()[0]["verdict"], "worse");
  const auto same = CompareEvaluations(dir / "a", dir / "a", 1).value();
  EXPECT_EQ(same[0]["difference"], 0.0);
  EXPECT_EQ(same[0]["interval"], (nlohmann::ordered_json{0.0, 0.0}));
  EXPECT_EQ(same[0]["verdict"], "no difference shown");
  EXPECT_EQ(same[0]["log_probability_verdict"], "no difference shown");

  // As many right, all of them less likely.
  TaskResult unlikely = Made(few);
  for (auto& sample : unlikely.samples) sample.log_probability -= 1;
  ASSERT_TRUE(WriteEvaluation(dir / "unlikely", unlikely).ok());
  const auto worse = CompareEvaluations(dir / "a", dir / "unlikely", 1).value();
  EXPECT_EQ(worse[0]["verdict"], "no difference shown");
  EXPECT_EQ(worse[0]["log_probability_verdict"], "worse");
  EXPECT_THAT(ComparisonTable(worse), HasSubstr("no difference shown; by log p worse\n"));

  TaskResult others = Made(few);
  others.samples[3].hash = "else";
  ASSERT_TRUE(WriteEvaluation(dir / "c", others).ok());
  EXPECT_EQ(ErrorCodeOf(CompareEvaluations(dir / "a", dir / "c", 1).status()), "EVAL-COMPARE");
  others.task = "kv";
  ASSERT_TRUE(WriteEvaluation(dir / "d", others).ok());
  EXPECT_EQ(ErrorCodeOf(CompareEvaluations(dir / "a", dir / "d", 1).status()), "EVAL-COMPARE");
  // What only one of them has is said.
  {
    auto both = EvalWriter::Open({.directory = dir / "e", .settings = {{"seed", 1}}});
    ASSERT_TRUE(both.ok());
    ASSERT_TRUE(both->Add(Made(few)).ok() && both->Add(others).ok() && both->Finish().ok());
    const auto rows = CompareEvaluations(dir / "a", dir / "e", 1).value();
    ASSERT_EQ(rows.size(), 2U);
    EXPECT_EQ(rows[1]["task"], "kv");
    EXPECT_EQ(rows[1]["not_comparable"], "only in b");
    EXPECT_EQ(CompareEvaluations(dir / "e", dir / "a", 1).value()[1]["not_comparable"],
              "only in a");
    EXPECT_THAT(ComparisonTable(rows), HasSubstr("not comparable: only in b"));
  }
  EXPECT_EQ(ErrorCodeOf(CompareEvaluations(dir / "a", dir / "none", 1).status()), "FILE-MISSING");
  ASSERT_TRUE(WriteFileAtomically(dir / "d/summary.jsonl", "{\"task\": 3}\n").ok());
  EXPECT_EQ(ErrorCodeOf(CompareEvaluations(dir / "a", dir / "d", 1).status()), "EVAL-FORMAT");
}

TEST(EvalReport, WhatCannotBeComparedIsNamed) {
  TempDir dir;
  const std::vector<bool> few = {true, false, false, true};
  const nlohmann::ordered_json settings = {{"seed", 1}, {"chat", false}, {"tokenizer", "x"}};
  ASSERT_TRUE(WriteEvaluation(dir / "a", Made(few), settings).ok());

  // Fewer samples of the same prompts: those that both have.
  ASSERT_TRUE(WriteEvaluation(dir / "b", Made({true, true}), settings).ok());
  const auto lines = CompareEvaluations(dir / "a", dir / "b", 1).value();
  EXPECT_EQ(lines[0]["count"], 2);
  EXPECT_EQ(lines[0]["share_a"], 0.5);
  EXPECT_EQ(lines[0]["share_b"], 1.0);
  EXPECT_EQ(SamplesDifference(dir / "a", dir / "b", "passkey", 64).value(), "samples: 4 and 2");
  EXPECT_EQ(SamplesDifference(dir / "a", dir / "a", "passkey", 64).value(), "");

  // Other prompts, because of the seed; the same prompts, cut in other tokens.
  TaskResult others = Made(few);
  for (SampleResult& sample : others.samples) sample.hash += "x";
  auto changed = settings;
  changed["seed"] = 2;
  ASSERT_TRUE(WriteEvaluation(dir / "c", others, changed).ok());
  EXPECT_THAT(MessageOf(CompareEvaluations(dir / "a", dir / "c", 1).status()),
              HasSubstr("nothing can be compared; seed: 1 and 2;"));
  EXPECT_EQ(SamplesDifference(dir / "a", dir / "c", "passkey", 64).value(), "seed: 1 and 2");
  changed = settings;
  changed["tokenizer"] = "y";
  ASSERT_TRUE(WriteEvaluation(dir / "d", Made(few), changed).ok());
  EXPECT_THAT(MessageOf(CompareEvaluations(dir / "a", dir / "d", 1).status()),
              HasSubstr("tokenizer: \"x\" and \"y\""));

  // One task that can be compared and one that cannot.
  changed = settings;
  changed["seed"] = 2;
  for (const char* name : {"e", "f"}) {
    TaskResult more = others;
    more.task = "kv";
    if (name[0] == 'f') more.samples[0].hash = "else";
    auto writer = EvalWriter::Open({.directory = dir / name, .settings = changed}).value();
    ASSERT_TRUE(writer.Add(Made(few)).ok());
    ASSERT_TRUE(writer.Add(more).ok());
    ASSERT_TRUE(writer.Finish().ok());
  }
  const auto mixed = CompareEvaluations(dir / "e", dir / "f", 1).value();
  ASSERT_EQ(mixed.size(), 2U);
  EXPECT_EQ(mixed[0]["verdict"], "no difference shown");
  EXPECT_EQ(mixed[1]["not_comparable"], "they measured other prompts");
  EXPECT_THAT(ComparisonTable(mixed), HasSubstr("not comparable: they measured other prompts"));
}

TEST_F(EvalTest, AnEvaluationThatWasCutOffGoesOn) {
  TempDir dir;
  EvalRequest request;
  request.config.tasks = {"passkey", "niah_single_1", "kv"};
  request.config.lengths_tokens = {400, 600};
  request.config.samples = 4;
  const auto evaluation = Evaluation::Open(request, *tokenizer_).value();
  int64_t documents = 0;
  const ScoreDocument copies = Stub([&documents](const model::Batch& batch, int64_t vocab) {
    ++documents;
    return Copying(batch, vocab, 0);
  });
  ASSERT_TRUE(MakeDirectories(dir / "model").ok());
  ASSERT_TRUE(WriteFileAtomically(dir / "model/config.json", "{}").ok());
  EvalTarget target = {.directory = dir / "whole"};
  target.settings = EvalSettings(request, *tokenizer_, {.model_path = dir / "model"}).value();
  ASSERT_TRUE(MakeEvaluation(*mesh_, evaluation, copies, target).ok());
  const int64_t all = documents;

  const auto files_of = [&dir](const std::string& name) {
    std::map<std::string, std::string> files;
    const std::vector<std::string> names = ListDirectory(dir / name).value();
    for (const std::string& file : names) files[file] = ReadFile(dir / (name + "/" + file)).value();
    return files;
  };
  // Cut off behind each task and length, until it is whole.
  target.directory = dir / "parts";
  documents = 0;
  int starts = 0;
  Status status = MakeError(ExitCode::kInternal, "INTERNAL", "");
  while (!status.ok() && starts < 20) {
    ++starts;
    status = MakeEvaluation(*mesh_, evaluation, copies, target,
                            [] { return MakeError(ExitCode::kRequeue, "STOPPED", "stopped"); });
    EXPECT_THAT(ErrorCodeOf(status), ::testing::AnyOf("", "STOPPED"));
  }
  EXPECT_EQ(starts, 7);  // six parts, and the start that finds them all
  EXPECT_EQ(documents, all) << "measured twice";
  EXPECT_EQ(files_of("parts"), files_of("whole"));
  EXPECT_EQ(files_of("parts").count("summary.part.jsonl"), 0U);
  EXPECT_TRUE(IsCompleteWith(dir / "parts", target.settings));

  // A file that is gone, and a line that is cut: from there on it is measured again.
  const auto cut_off = [&](const std::string& name) {
    target.directory = dir / name;
    int left = 3;
    EXPECT_FALSE(MakeEvaluation(*mesh_, evaluation, copies, target, [&left] {
                   return --left > 0 ? OkStatus()
                                     : MakeError(ExitCode::kRequeue, "STOPPED", "stopped");
                 }).ok());
    EXPECT_EQ(StateOf(dir / name), EvalState::kUnfinished);
  };
  cut_off("gone");
  ASSERT_TRUE(RemoveTree(dir / "gone/passkey-600.jsonl").ok());
  EXPECT_EQ(EvalWriter::Open(target)->done(), (std::vector<std::string>{"passkey-400"}));
  ASSERT_TRUE(MakeEvaluation(*mesh_, evaluation, copies, target).ok());
  EXPECT_EQ(files_of("gone"), files_of("whole"));
  cut_off("bad");
  ASSERT_TRUE(WriteFileAtomically(dir / "bad/summary.part.jsonl", "{\"task\": \"pass").ok());
  EXPECT_TRUE(EvalWriter::Open(target)->done().empty());
  ASSERT_TRUE(MakeEvaluation(*mesh_, evaluation, copies, target).ok());
  EXPECT_EQ(files_of("bad"), files_of("whole"));
  cut_off("cut");
  const std::string parts = ReadFile(dir / "cut/summary.part.jsonl").value();
  ASSERT_TRUE(WriteFileAtomically(dir / "cut/summary.part.jsonl",
                                  parts.substr(0, parts.size() / 2 + parts.size() / 6))
                  .ok());
  EXPECT_EQ(EvalWriter::Open(target)->done().size(), 2U) << "lines in front of the damage hold";
  ASSERT_TRUE(MakeEvaluation(*mesh_, evaluation, copies, target).ok());
  EXPECT_EQ(files_of("cut"), files_of("whole"));

  // Another command, another model: refused, and everything stays.
  cut_off("other");
  const auto before = files_of("other");
  target.settings["samples"] = 5;
  EXPECT_EQ(ErrorCodeOf(EvalWriter::Open(target).status()), "EVAL-EXISTS");
  EXPECT_THAT(MessageOf(EvalWriter::Open(target).status()), HasSubstr("samples: 4 and 5"));
  ASSERT_TRUE(WriteFileAtomically(dir / "model/config.json", "{ }").ok());
  target.settings = EvalSettings(request, *tokenizer_, {.model_path = dir / "model"}).value();
  EXPECT_THAT(MessageOf(EvalWriter::Open(target).status()), HasSubstr("model: "));
  EXPECT_EQ(files_of("other"), before);
  target.replace = true;
  EXPECT_TRUE(EvalWriter::Open(target)->done().empty());
  EXPECT_EQ(files_of("other").size(), 1U);

  // A summary that is damaged is replaced, with files of prompts that no line names; others stay.
  ASSERT_TRUE(MakeEvaluation(*mesh_, evaluation, copies, target).ok());
  const auto made = files_of("other");
  nlohmann::json settings = nlohmann::json::parse(made.at("settings.json"));
  settings["prompts"] = "a hash";
  for (const auto& [name, text] :
       std::map<std::string, std::string>{{"summary.jsonl", "{\"task\": "},
                                          {"prompts_mine-0.jsonl", "orphan"},
                                          {"prompts-12.jsonl", "orphan"},
                                          {"prompts_of_mine.jsonl", "mine"},
                                          {"settings.json", settings.dump()}})
    ASSERT_TRUE(WriteFileAtomically(dir / ("other/" + name), text).ok());
  EXPECT_EQ(StateOf(dir / "other"), EvalState::kComplete);
  ASSERT_TRUE(RemoveEvaluation(dir / "other").ok());
  EXPECT_EQ(files_of("other"),
            (std::map<std::string, std::string>{{"prompts_of_mine.jsonl", "mine"}}));

  // Settings of something else are not replaced.
  for (const auto& [name, text] : std::map<std::string, std::string>{
           {"settings.json", "{\"model\": \"x\", \"tasks\": []}"}, {"summary.jsonl", ""}}) {
    ASSERT_TRUE(RemoveTree(dir / "other").ok());
    ASSERT_TRUE(MakeDirectories(dir / "other").ok());
    ASSERT_TRUE(WriteFileAtomically(dir / ("other/" + name), text).ok());
    const auto kept = files_of("other");
    EXPECT_EQ(StateOf(dir / "other"), EvalState::kForeign);
    for (const Status& refused :
         {EvalWriter::Open(target).status(), RemoveEvaluation(dir / "other")}) {
      EXPECT_EQ(ErrorCodeOf(refused), "EVAL-EXISTS");
      EXPECT_THAT(MessageOf(refused), HasSubstr("no evaluation's"));
    }
    EXPECT_EQ(files_of("other"), kept);
  }
}

}  // namespace
}  // namespace sala::recipes
