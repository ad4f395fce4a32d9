// A tokenizer is made of the same files as an ingest, with the same refusals.
#include "data/train_tokenizer.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "tests/data/archives.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

constexpr int64_t kVocab = 340;

// Another text than SampleText, so that it shows which of the two was read.
std::string OtherText(int repeat) {
  std::string text;
  for (int i = 0; i < repeat; ++i) {
    text += "Eleven purple zebras wandered past chapel " + std::to_string(i * 31 % 97) +
            ".\n\n\tTheir keepers whistled;  nobody answered.\n";
  }
  return text;
}

std::string Record(const std::string& text) {
  return nlohmann::json({{"text", text}}).dump() + "\n";
}

class TrainTokenizerTest : public ::testing::Test {
 protected:
  TrainTokenizerTest() { std::filesystem::create_directories(dir_ / "in/deeper"); }
  TrainTokenizerOptions Options(const std::vector<std::string>& inputs) {
    std::vector<std::string> paths;
    for (const std::string& name : inputs) paths.push_back(dir_ / name);
    return {
        .inputs = paths, .vocab_size = kVocab, .output = dir_ / ("tok" + std::to_string(++runs_))};
  }
  // The model that the inputs give.
  std::string Model(const TrainTokenizerOptions& options) {
    report_ = Value(TrainSentencePiece(options));
    return ReadText(options.output + "/tokenizer.model");
  }
  std::string Model(const std::vector<std::string>& inputs) { return Model(Options(inputs)); }
  // The error, which leaves no tokenizer.
  Status Failure(const TrainTokenizerOptions& options) {
    const Status status = TrainSentencePiece(options).status();
    EXPECT_FALSE(PathExists(options.output + "/tokenizer.model"));
    return status;
  }
  Status Failure(const std::vector<std::string>& inputs) { return Failure(Options(inputs)); }

  TempDir dir_;
  int runs_ = 0;
  TrainTokenizerReport report_;
  const std::string first_ = SampleText(20), second_ = OtherText(40);
};

TEST_F(TrainTokenizerTest, ARecordCountsAsTheSameTextInATextFile) {
  std::filesystem::create_directories(dir_ / "plain");
  WriteText(dir_ / "plain/a.txt", first_);
  WriteText(dir_ / "plain/b.txt", second_);
  const std::string expected = Model({"plain"});
  EXPECT_EQ(report_.files, 2);
  const int64_t bytes = report_.text_bytes;
  EXPECT_NE(Model({"plain/a.txt"}), expected);  // both texts tell

  WriteText(dir_ / "in/a.txt", first_);
  const size_t half = second_.find('\n', second_.size() / 2) + 1;
  WriteText(dir_ / "in/deeper/b.jsonl.gz",
            Gzip(Record(second_.substr(0, half)) + "\n" + Record(second_.substr(half))));
  EXPECT_EQ(Model({"in"}), expected);
  EXPECT_EQ(report_.files, 2);
  EXPECT_EQ(report_.text_bytes, bytes);
  EXPECT_EQ(report_.passed_over, std::vector<std::string>());
  EXPECT_EQ(Model({"in"}), expected);  // once more

  const nlohmann::json array = {{{"text", second_.substr(0, half)}},
                                {{"text", second_.substr(half)}}};
  const std::vector<std::pair<std::string, std::string>> ways = {
      {"b.txt.zst", Zstd(second_)},
      {"b.txt.gz", Gzip("\xef\xbb\xbf" + second_)},
      {"b.ndjson.zst", Zstd(Record(second_))},
      {"b.json", array.dump(1)},
      {"b.json.gz", Gzip(array.dump())},
      {"b.jsonl", nlohmann::json({{"messages",
                                   {{{"role", "user"}, {"content", second_.substr(0, half)}},
                                    {{"role", "assistant"}, {"content", second_.substr(half)}}}}})
                      .dump()}};
  for (const auto& [name, bytes_of_file] : ways) {
    SCOPED_TRACE(name);
    WriteText(dir_ / name, bytes_of_file);
    EXPECT_EQ(Model({"in/a.txt", name}), expected);
  }
}

TEST_F(TrainTokenizerTest, TheTextFieldAndTheTurnsOfChatsAreNamed) {
  WriteText(dir_ / "in/a.txt", first_);
  const std::string expected = Model({"in/a.txt"});
  WriteText(dir_ / "field.jsonl", nlohmann::json({{"doc", {{"body", first_}}}}).dump());
  TrainTokenizerOptions options = Options({"field.jsonl"});
  options.reading.text_field = "doc.body";
  EXPECT_EQ(Model(options), expected);
  WriteText(dir_ / "turns.jsonl",
            nlohmann::json({{"talk", {{{"role", "user"}, {"content", first_}}}}}).dump());
  options = Options({"turns.jsonl"});
  options.reading.messages_field = "talk";
  EXPECT_EQ(Model(options), expected);

  ExpectError(Failure({"field.jsonl"}), "ING-FIELD", ExitCode::kData,
              {"field.jsonl:1 (byte 0)", "no field \"text\"", "the record has: doc"});
  options = Options({"field.jsonl"});
  options.reading.text_field = "doc.boody";
  ExpectError(Failure(options), "ING-FIELD", ExitCode::kData, {"field.jsonl:1", "doc.boody"});
}

TEST_F(TrainTokenizerTest, MoreTextThanIsTakenIsDrawnAlikeFromAllKindsOfFiles) {
  WriteText(dir_ / "a.txt", first_ + second_);
  WriteText(dir_ / "a.jsonl.zst", Zstd(Record(first_) + Record(second_)));
  const auto model = [&](const char* name, int64_t seed) {
    TrainTokenizerOptions options = Options({name});
    options.max_bytes = 4000;
    options.seed = seed;
    return Model(options);
  };
  EXPECT_EQ(model("a.txt", 1), model("a.jsonl.zst", 1));
  EXPECT_NE(model("a.txt", 1), model("a.txt", 2));
  EXPECT_NE(model("a.txt", 1), Model({"a.txt"}));
}

TEST_F(TrainTokenizerTest, BrokenRecordsAreNamedOrLeftOutByRule) {
  const std::string lines = Record(first_) + "{\"text\": broken\n" + Record(second_);
  WriteText(dir_ / "in/a.jsonl.gz", Gzip(lines));
  const std::string place = "in/a.jsonl.gz:2 (byte " + std::to_string(Record(first_).size()) + ")";
  ExpectError(Failure({"in"}), "ING-JSON", ExitCode::kData, {place, "not JSON"});
  TrainTokenizerOptions options = Options({"in"});
  options.reading.rules = {{"not_json", RecordRule::kSkip}};
  const std::string model = Model(options);
  EXPECT_EQ(report_.cases, (std::map<std::string, int64_t>{{"not_json", 1}}));
  WriteText(dir_ / "whole.txt", first_ + second_);
  EXPECT_EQ(model, Model({"whole.txt"}));
  options = Options({"in"});
  options.reading.rules = {{"not_jason", RecordRule::kSkip}};
  ExpectError(Failure(options), "ING-RULE", ExitCode::kConfig, {"did you mean not_json?"});

  WriteText(dir_ / "bad.txt", first_ + "caf\xe9\n");
  const auto line = std::count(first_.begin(), first_.end(), '\n') + 1;
  ExpectError(Failure({"bad.txt"}), "ING-UTF8", ExitCode::kData,
              {"bad.txt:" + std::to_string(line) + " ", "0xe9"});
  WriteText(dir_ / "shapes.jsonl", R"({"instruction": "add", "output": "done"})"
                                   "\n"
                                   R"({"messages": [{"role": "user", "content": "a"}]})");
  ExpectError(Failure({"shapes.jsonl"}), "ING-SHAPE", ExitCode::kData, {"shapes.jsonl:2"});
}

TEST_F(TrainTokenizerTest, ArchivesThatAreCutOrDamagedAreRefused) {
  const std::string packed = Gzip(Record(first_)), zipped = Zstd(first_);
  WriteText(dir_ / "a.jsonl.gz", packed.substr(0, packed.size() - 5));
  ExpectError(Failure({"a.jsonl.gz"}), "ING-TRUNCATED", ExitCode::kData, {"a.jsonl.gz"});
  WriteText(dir_ / "a.txt.zst", zipped.substr(0, zipped.size() / 2));
  ExpectError(Failure({"a.txt.zst"}), "ING-TRUNCATED", ExitCode::kData, {"a.txt.zst"});
  WriteText(dir_ / "b.txt.gz", first_);  // packed by name only
  ExpectError(Failure({"b.txt.gz"}), "ING-CRC", ExitCode::kData, {"b.txt.gz"});
}

TEST_F(TrainTokenizerTest, WhatIsNotReadIsNamed) {
  WriteText(dir_ / "in/notes.md", first_);
  WriteText(dir_ / "in/b.json", Record(first_));
  WriteText(dir_ / "in/deeper/c.csv", first_);
  ExpectError(Failure({"in"}), "TOK-TRAIN", ExitCode::kData,
              {dir_ / "in: no text", "3 files are not read: ", "in/b.json, ", "in/deeper/c.csv, ",
               "in/notes.md", ".json only by name"});
  WriteText(dir_ / "in/a.txt", first_);
  for (int i = 0; i < 2; ++i) WriteText(dir_ / ("in/z" + std::to_string(i)), "");
  Model({"in"});
  EXPECT_EQ(report_.passed_over.size(), 5U);
  EXPECT_THAT(NamePassedOver(report_.passed_over), ::testing::HasSubstr("notes.md and 2 more ("));
  EXPECT_THAT(NamePassedOver({"in/x.md"}), ::testing::StartsWith("1 file is not read: in/x.md ("));
  EXPECT_EQ(NamePassedOver({}), "");

  ExpectError(Failure({"in/notes.md"}), "ING-FORMAT", ExitCode::kData, {"in/notes.md", ".jsonl"});
  ExpectError(Failure({"none"}), "ING-INPUT", ExitCode::kNoInput, {"none"});
  WriteText(dir_ / "empty.jsonl", Record("") + Record(""));
  ExpectError(Failure({"empty.jsonl"}), "TOK-TRAIN", ExitCode::kData,
              {"no text", "in 1 files, empty 2"});
  WriteText(dir_ / "in/d.parquet", "PAR1");
  ExpectError(Failure({"in"}), "ING-FORMAT", ExitCode::kData, {"in/d.parquet", "Parquet"});
}

}  // namespace
}  // namespace sala::data
