#include "data/ingest.h"

#include <nlohmann/json.hpp>

#include "data/commands.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

class IngestTest : public ::testing::Test {
 protected:
  IngestOptions Options(const std::vector<std::string>& inputs) {
    std::vector<std::string> paths;
    paths.reserve(inputs.size());
    for (const std::string& name : inputs) paths.push_back(dir_ / name);
    return {.sources = {{.name = "src", .license = "CC0-1.0", .note = "a test", .inputs = paths}},
            .output = dir_ / ("out" + std::to_string(++runs_)),
            .name = "set"};
  }
  StatusOr<IngestReport> Run(const IngestOptions& options) {
    return RunIngest(options, *tokenizer_);
  }

  // The texts of the documents of the last run, bos and eos left out.
  std::vector<std::string> Texts() {
    std::vector<std::string> out;
    auto store = Value(TokenStore::Open(dir_ / ("out" + std::to_string(runs_))));
    for (int64_t f = 0; f < store->files(); ++f) {
      TokenFile* file = Value(store->File(f));
      for (int64_t d = 0; d < file->documents(); ++d) {
        std::vector<int32_t> ids(static_cast<size_t>(file->length(d)));
        EXPECT_TRUE(file->CopyTokens(file->begin(d), file->length(d), ids.data()).ok());
        EXPECT_EQ(ids.front(), tokenizer_->bos_id());
        EXPECT_EQ(ids.back(), tokenizer_->eos_id());
        out.push_back(tokenizer_->Decode(ids));
      }
    }
    return out;
  }
  std::string LogText() {
    return ReadText(dir_ / ("out" + std::to_string(runs_)) + "/ingest.log.jsonl");
  }

  TempDir dir_;
  int runs_ = 0;
  std::unique_ptr<Tokenizer> tokenizer_ = MakeByteTokenizer();
};

using Strings = std::vector<std::string>;

TEST_F(IngestTest, TextFilesOfADirectoryInSortedOrder) {
  std::filesystem::create_directories(dir_ / "in/sub");
  WriteText(dir_ / "in/b.txt", "second\n");
  WriteText(dir_ / "in/a.txt", "first\n\nwith a blank line\n");
  WriteText(dir_ / "in/sub/c.txt", "\xef\xbb\xbfthird");
  WriteText(dir_ / "in/ignored.md", "no");
  const IngestReport report = Value(Run(Options({"in"})));
  EXPECT_EQ(Texts(), (Strings{"first\n\nwith a blank line\n", "second\n", "third"}));
  EXPECT_EQ(report.info.kind, "pretrain");
  EXPECT_EQ(report.info.sources[0].license, "CC0-1.0");
  EXPECT_EQ(report.info.ingest["inputs"].size(), 3U);
}

TEST_F(IngestTest, SplitAtBlankLinesAndAtSeparators) {
  WriteText(dir_ / "a.txt", "\n\none\nstill one\n \t\n\ntwo\n");
  IngestOptions options = Options({"a.txt"});
  options.split = TextSplit::kBlankLines;
  Value(Run(options));
  EXPECT_EQ(Texts(), (Strings{"one\nstill one", "two"}));
  WriteText(dir_ / "b.txt", "one\n\nstill\n---\ntwo\n");
  options = Options({"b.txt"});
  options.split = TextSplit::kSeparator;
  options.separator = "---";
  Value(Run(options));
  EXPECT_EQ(Texts(), (Strings{"one\n\nstill", "two"}));
}

TEST_F(IngestTest, JsonLinesWithADottedFieldAndShards) {
  std::string lines;
  for (int i = 0; i < 30; ++i)
    lines += nlohmann::json({{"doc", {{"body", "text " + std::to_string(i)}}}}).dump() + "\n\n";
  WriteText(dir_ / "a.jsonl", lines);
  IngestOptions options = Options({"a.jsonl"});
  options.text_field = "doc.body";
  options.shard_tokens = 100;
  const IngestReport report = Value(Run(options));
  EXPECT_EQ(report.info.documents, 30);
  EXPECT_GE(report.info.files.size(), 3U);
  EXPECT_EQ(Texts()[29], "text 29");
  SALA_ASSERT_OK(VerifyDataset(options.output, true).status());
}

TEST_F(IngestTest, TheSameInputGivesTheSameTokens) {
  WriteText(dir_ / "a.jsonl", "{\"text\": \"x y\"}\n{\"text\": \"z\"}\n");
  const auto first = Value(Run(Options({"a.jsonl"}))).info;
  const auto second = Value(Run(Options({"a.jsonl"}))).info;
  EXPECT_EQ(first.fingerprint, second.fingerprint);
}

struct BadRecord {
  std::string rule, line, code, message;
  RecordRule standard;
};

// Each bad record stands on line 2 behind one good record of 15 bytes.
const std::vector<BadRecord>& BadRecords() {
  static const auto* records = new std::vector<BadRecord>{
      {"not_json", "{\"text\": ", "ING-JSON", "not JSON", RecordRule::kError},
      {"not_object", "[1, 2]", "ING-JSON", "found a JSON array", RecordRule::kError},
      {"field_missing", "{\"body\": \"x\"}", "ING-FIELD", "the record has: body",
       RecordRule::kError},
      {"wrong_type", "{\"text\": 5}", "ING-FIELD", "of type number, expected a string",
       RecordRule::kError},
      {"invalid_utf8", "{\"text\": \"a\xff\"}", "ING-UTF8",
       "invalid UTF-8 on line 2, byte 11 of the record (0xff)", RecordRule::kError},
      {"lone_surrogate", "{\"text\": \"a\\ud800b\"}", "ING-UTF8",
       "half of a surrogate pair at byte 11", RecordRule::kSkip},
      {"nul", "{\"text\": \"a\\u0000b\"}", "ING-NUL", "NUL character at byte 1", RecordRule::kFix},
      {"empty", "{\"text\": \"\"}", "ING-EMPTY", "has no text", RecordRule::kSkip},
      {"duplicate", "{\"text\": \"ok\"}", "ING-DUP", "came before", RecordRule::kSkip},
  };
  return *records;
}

TEST_F(IngestTest, EveryRuleAsErrorNamesFileLineAndByte) {
  for (const BadRecord& bad : BadRecords()) {
    WriteText(dir_ / "a.jsonl", "{\"text\": \"ok\"}\n" + bad.line + "\n");
    IngestOptions options = Options({"a.jsonl"});
    options.dedup = true;
    options.rules[bad.rule] = RecordRule::kError;
    ExpectError(Run(options).status(), bad.code, ExitCode::kData,
                {"a.jsonl:2 (byte 15)", bad.message});
  }
}

TEST_F(IngestTest, EveryRuleAsSkipDropsTheRecordAndLogsIt) {
  for (const BadRecord& bad : BadRecords()) {
    WriteText(dir_ / "a.jsonl", "{\"text\": \"ok\"}\n" + bad.line + "\n{\"text\": \"end\"}\n");
    IngestOptions options = Options({"a.jsonl"});
    options.dedup = true;
    options.max_rejects = 1;
    options.rules[bad.rule] = RecordRule::kSkip;
    const IngestReport report = Value(Run(options));
    EXPECT_EQ(Texts(), (Strings{"ok", "end"})) << bad.rule;
    EXPECT_EQ(report.cases.at(bad.rule), 1);
    const auto log = nlohmann::json::parse(LogText());
    EXPECT_EQ(log["line"], 2);
    EXPECT_EQ(log["offset"], 15);
    EXPECT_EQ(log["rule"], bad.rule);
    EXPECT_EQ(log["action"], "skip");
  }
}

TEST_F(IngestTest, TheStandardActionOfEveryRule) {
  for (const BadRecord& bad : BadRecords()) {
    WriteText(dir_ / "a.jsonl", "{\"text\": \"ok\"}\n" + bad.line + "\n");
    IngestOptions options = Options({"a.jsonl"});
    options.dedup = true;
    options.max_rejects = 1;
    const auto report = Run(options);
    EXPECT_EQ(report.ok(), bad.standard != RecordRule::kError) << bad.rule;
    if (!report.ok()) continue;
    EXPECT_EQ(nlohmann::json::parse(LogText())["action"],
              bad.standard == RecordRule::kSkip ? "skip" : "fix")
        << bad.rule;
  }
}

TEST_F(IngestTest, Repairs) {
  WriteText(dir_ / "a.jsonl",
            "{\"text\": \"a\xff\"}\n{\"text\": \"b\\ud800\\\\ud800\"}\n{\"text\": "
            "\"c\\u0000d\"}\n{\"text\": \"\\ud83d\\ude00\"}\n");
  IngestOptions options = Options({"a.jsonl"});
  options.rules = {{"invalid_utf8", RecordRule::kFix}, {"lone_surrogate", RecordRule::kFix}};
  Value(Run(options));
  EXPECT_EQ(Texts(), (Strings{"a\xef\xbf\xbd", "b\xef\xbf\xbd\\ud800", "cd", "\xf0\x9f\x98\x80"}));
}

TEST_F(IngestTest, InvalidUtf8InATextFileNamesItsLine) {
  WriteText(dir_ / "a.txt", "fine\nfine too\nbad \xfe here\n");
  ExpectError(Run(Options({"a.txt"})).status(), "ING-UTF8", ExitCode::kData,
              {"a.txt:1", "on line 3, byte 18"});
}

TEST_F(IngestTest, RulesThatCannotBe) {
  IngestOptions options = Options({});
  options.rules["emtpy"] = RecordRule::kSkip;
  ExpectError(Run(options).status(), "ING-RULE", ExitCode::kConfig,
              {"emtpy", "did you mean empty"});
  options.rules = {{"not_json", RecordRule::kFix}};
  ExpectError(Run(options).status(), "ING-RULE", ExitCode::kConfig,
              {"not_json", "cannot be repaired"});
}

TEST_F(IngestTest, InputsThatAreMissingEmptyOrOfAnotherKind) {
  ExpectError(Run(Options({"nothing"})).status(), "ING-INPUT", ExitCode::kNoInput, {"nothing"});
  std::filesystem::create_directories(dir_ / "empty");
  ExpectError(Run(Options({"empty"})).status(), "ING-EMPTY", ExitCode::kData,
              {"0 records of 0 files"});
  WriteText(dir_ / "a.jsonl", "{\"text\": \"\"}\n");
  ExpectError(Run(Options({"a.jsonl"})).status(), "ING-EMPTY", ExitCode::kData,
              {"1 records of 1 files", "empty 1"});
  WriteText(dir_ / "a.pdf", "x");
  ExpectError(Run(Options({"a.pdf"})).status(), "ING-FORMAT", ExitCode::kData, {"a.pdf", ".jsonl"});
  WriteText(dir_ / "b.jsonl",
            "{\"text\": \"t\"}\n{\"messages\": [{\"role\": \"assistant\", \"content\": \"c\"}]}\n");
  ExpectError(Run(Options({"b.jsonl"})).status(), "ING-KIND", ExitCode::kData,
              {"b.jsonl:2", "chat record among text"});
}

TEST_F(IngestTest, DirectoriesWithPackingsThatAreNotRead) {
  std::filesystem::create_directories(dir_ / "in");
  WriteText(dir_ / "in/a.txt", "text");
  for (const std::string passed :
       {"b.json", "b.json.gz", "b.json.xz", "B.JSON", "notes.xz", "notes.zip", "README.MD"})
    WriteText(dir_ / ("in/" + passed), "x");
  EXPECT_EQ(Value(Run(Options({"in"}))).info.documents, 1);
  for (const auto& [name, way] : {std::pair<std::string, std::string>{"b.jsonl.xz", "xz -dc"},
                                  {"b.txt.bz2", "bzip2 -dc"},
                                  {"b.ndjson.zip", "unzip"},
                                  {"b.jsonl.zstd", "mv FILE.zstd FILE.zst"},
                                  {"b.JSONL.XZ", "xz -dc"},
                                  {"B.TXT", "in capitals"},
                                  {"b.JsonL.gz", "in capitals"},
                                  {"b.jsonl.GZ", "in capitals"},
                                  {"B.PARQUET", "Parquet"}}) {
    WriteText(dir_ / ("in/" + name), "x");
    ExpectError(Run(Options({"in"})).status(), "ING-FORMAT", ExitCode::kData, {name, way});
    ExpectError(Run(Options({"in/" + name})).status(), "ING-FORMAT", ExitCode::kData, {name, way});
    std::filesystem::remove(dir_ / ("in/" + name));
  }
}

TEST_F(IngestTest, NamesAndExistingOutputAreChecked) {
  WriteText(dir_ / "a.txt", "x");
  IngestOptions options = Options({"a.txt"});
  Value(Run(options));
  ExpectError(Run(options).status(), "DS-EXISTS", ExitCode::kIo, {"out1"});
  options = Options({"a.txt"});
  options.name = "no/slash";
  ExpectError(Run(options).status(), "ING-NAME", ExitCode::kUsage, {"no/slash"});
}

TEST_F(IngestTest, TooManyRejectsEndTheRun) {
  std::string lines;
  for (int i = 0; i < 10; ++i) lines += i % 2 == 0 ? "{\"text\": \"x\"}\n" : "broken\n";
  WriteText(dir_ / "a.jsonl", lines);
  IngestOptions options = Options({"a.jsonl"});
  options.rules["not_json"] = RecordRule::kSkip;
  ExpectError(Run(options).status(), "ING-REJECTS", ExitCode::kData,
              {"5 malformed records of 10", "at most 0"});
  options = Options({"a.jsonl"});
  options.rules["not_json"] = RecordRule::kSkip;
  options.max_rejects = 5;
  EXPECT_EQ(Value(Run(options)).info.documents, 5);
}

std::string Chat(const std::string& answer_extra = "") {
  return R"({"id":"q","messages":[{"role":"user","content":"Hello"},{"role":"assistant","content":"Hi.")" +
         answer_extra + "}]}\n";
}

TEST_F(IngestTest, ChatBecomesTokensWithALossMask) {
  WriteText(dir_ / "a.jsonl", Chat());
  const IngestOptions options = Options({"a.jsonl"});
  const IngestReport report = Value(Run(options));
  EXPECT_TRUE(report.info.sft());
  EXPECT_EQ(report.info.target_tokens, 4);  // H i . <|im_end|>
  EXPECT_THAT(Value(ShowDocument(options.output, 0, tokenizer_.get())),
              ::testing::HasSubstr(
                  "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[[Hi.<|im_end|>]]\n"));
}

TEST_F(IngestTest, ChatMaskModes) {
  WriteText(dir_ / "a.jsonl", Chat());
  IngestOptions options = Options({"a.jsonl"});
  options.chat_mask = ChatMask::kAllTokens;
  const IngestReport report = Value(Run(options));
  EXPECT_EQ(report.info.target_tokens, report.info.tokens - 1);  // everything behind bos
}

TEST_F(IngestTest, ChatRolesAreChecked) {
  WriteText(dir_ / "a.jsonl", Chat() + "{\"messages\":[{\"role\":\"robot\",\"content\":\"x\"}]}\n");
  ExpectError(Run(Options({"a.jsonl"})).status(), "CHAT-ROLE", ExitCode::kData,
              {"a.jsonl:2", "robot"});
  IngestOptions options = Options({"a.jsonl"});
  options.rules["chat"] = RecordRule::kSkip;
  options.max_rejects = 1;
  EXPECT_EQ(Value(Run(options)).info.documents, 1);
}

TEST_F(IngestTest, RecordsWithNothingToLearn) {
  const std::string silent = Chat(R"(,"train":false)");
  WriteText(dir_ / "a.jsonl", silent + Chat());
  const IngestReport report = Value(Run(Options({"a.jsonl"})));
  EXPECT_EQ(report.info.documents, 1);
  EXPECT_EQ(report.cases.at("empty_target"), 1);
  IngestOptions dedup = Options({"a.jsonl"});  // the text of both is one
  dedup.dedup = true;
  EXPECT_EQ(Value(Run(dedup)).info.documents, 1);
  WriteText(dir_ / "twice.jsonl", silent + Chat() + Chat() + silent);
  dedup = Options({"twice.jsonl"});
  dedup.dedup = true;
  const IngestReport twice = Value(Run(dedup));
  EXPECT_EQ(twice.info.documents, 1);
  EXPECT_EQ(twice.cases.at("empty_target"), 1);
  EXPECT_EQ(twice.cases.at("duplicate"), 2);
  IngestOptions strict = Options({"a.jsonl"});
  strict.rules["empty_target"] = RecordRule::kError;
  ExpectError(Run(strict).status(), "CHAT-NOMASK", ExitCode::kData, {"a.jsonl:1"});
  WriteText(dir_ / "b.jsonl", silent);
  ExpectError(Run(Options({"b.jsonl"})).status(), "CHAT-NOMASK", ExitCode::kData,
              {"none of its 1 records"});
  std::string many;
  for (int i = 0; i < 100; ++i) many += silent;
  WriteText(dir_ / "c.jsonl", many + Chat());
  ExpectError(Run(Options({"c.jsonl"})).status(), "CHAT-NOMASK", ExitCode::kData,
              {"c.jsonl:100", "first 100 records of source src"});
}

}  // namespace
}  // namespace sala::data
