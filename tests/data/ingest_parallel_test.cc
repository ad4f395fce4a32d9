// What must not depend on how an ingest is done: number of workers, size of pieces, packing,
// damage.
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "data/commands.h"
#include "data/ingest.h"
#include "data/record_reader.h"
#include "tests/data/archives.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

std::string Records(int count) {
  std::string out;
  for (int i = 0; i < count; ++i) {
    if (i % 17 == 3) out += "{\"id\": " + std::to_string(i) + ", \"text\": broken\n";
    if (i % 19 == 4) out += "\n";
    // Every 13th text comes twice.
    const int text = i % 13 == 5 ? i - 1 : i;
    out += nlohmann::json({{"id", i}, {"text", SampleText(1 + text % 3) + std::to_string(text)}})
               .dump() +
           "\n";
  }
  return out;
}

class IngestWays : public ::testing::Test {
 protected:
  // dataset.json, the log and all token files.
  std::string Ingested(const std::vector<std::string>& inputs, int workers, int64_t piece_bytes) {
    const std::string out = dir_ / ("out" + std::to_string(++runs_));
    const auto report = Run(inputs, out, workers, piece_bytes);
    if (!report.ok()) return MessageOf(report.status());
    std::string all;
    for (const auto& entry : Value(ListDirectory(out)))
      all += entry + "\n" + ReadText(out + "/" + entry);
    return all;
  }
  StatusOr<IngestReport> Run(const std::vector<std::string>& inputs, const std::string& out,
                             int workers = 2, int64_t piece_bytes = 1 << 24) {
    IngestOptions options;
    options.sources = {{.name = "src", .inputs = inputs}};
    options.output = out;
    options.name = "set";
    options.rules = rules_;
    options.chat_template = template_;
    options.tokenizer_path = "bytes";
    options.dedup = true;
    options.max_rejects_ppm = 1'000'000;
    options.shard_tokens = 20'000;
    options.workers = workers;
    options.piece_bytes = piece_bytes;
    return RunIngest(options, *tokenizer_);
  }
  Status Failure(const std::string& name, const std::string& bytes) {
    WriteText(dir_ / name, bytes);
    const std::string out = dir_ / ("out" + std::to_string(++runs_));
    Status status = Run({dir_ / name}, out).status();
    EXPECT_FALSE(PathExists(out + "/dataset.json") && !status.ok());
    EXPECT_FALSE(PathExists(out + "/ingest.pieces"));  // of no use after a mistake of the input
    return status;
  }

  TempDir dir_;
  int runs_ = 0;
  std::string template_ = "plain";
  std::map<std::string, RecordRule> rules_ = {{"not_json", RecordRule::kSkip}};
  std::unique_ptr<Tokenizer> tokenizer_ = MakeByteTokenizer();
};

TEST_F(IngestWays, WorkersAndPiecesDoNotShowInTheBytes) {
  WriteText(dir_ / "a.jsonl", Records(150));
  WriteText(dir_ / "b.jsonl.gz", Gzip(Records(60)));
  WriteText(dir_ / "c.txt", "some text\n");
  const std::vector<std::string> inputs = {dir_ / "a.jsonl", dir_ / "b.jsonl.gz", dir_ / "c.txt"};
  const std::string one = Ingested(inputs, 1, 1 << 24);
  EXPECT_GT(one.size(), 50'000U);
  EXPECT_THAT(one, ::testing::HasSubstr("\"rule\":\"duplicate\""));
  EXPECT_EQ(Ingested(inputs, 7, 1 << 24), one);
  EXPECT_EQ(Ingested(inputs, 1, 3000), one);
  EXPECT_EQ(Ingested(inputs, 7, 3000), one);
  EXPECT_EQ(Ingested(inputs, 7, 500), one);  // shorter than most lines
}

TEST_F(IngestWays, PiecesThatEndInAByteOrderMark) {
  const std::string records = "{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
  for (const std::string first : {"", "\n"}) {
    WriteText(dir_ / "a.jsonl", "\xef\xbb\xbf" + first + records);
    const std::string one = Ingested({dir_ / "a.jsonl"}, 1, 1 << 24);
    EXPECT_THAT(one, ::testing::HasSubstr("\"documents\": 2"));
    for (const int64_t piece_bytes : {1, 2, 3, 4, 5})
      EXPECT_EQ(Ingested({dir_ / "a.jsonl"}, 2, piece_bytes), one) << piece_bytes;
  }
}

TEST_F(IngestWays, TheFirstMistakeIsReportedWithItsLine) {
  rules_.clear();
  WriteText(dir_ / "a.jsonl", Records(150));  // the first broken record is on line 4
  std::string late;
  for (int i = 0; i < 200; ++i) late += "{\"text\": \"fine " + std::to_string(i) + "\"}\n";
  WriteText(dir_ / "b.jsonl", late + "broken\nbroken\n");
  for (const int workers : {1, 7}) {
    EXPECT_THAT(Ingested({dir_ / "a.jsonl"}, workers, 1000), ::testing::HasSubstr("a.jsonl:4 ("));
    EXPECT_THAT(Ingested({dir_ / "b.jsonl", dir_ / "a.jsonl"}, workers, 300),
                ::testing::HasSubstr("b.jsonl:201 (byte " + std::to_string(late.size()) + ")"));
  }
}

std::string Chats(int count, const std::string& role) {
  std::string out;
  for (int i = 0; i < count; ++i) {
    const std::string name = std::to_string(i % 11 == 4 ? i - 1 : i);
    out += nlohmann::json({{"messages",
                            {{{"role", "user"}, {"content", "Question " + name}},
                             {{"role", role}, {"content", SampleText(1) + name}}}}})
               .dump() +
           "\n";
  }
  return out;
}

TEST_F(IngestWays, WorkersAndPiecesDoNotShowInChats) {
  const std::string odd =
      R"({"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "b"}]})";
  WriteText(dir_ / "a.jsonl", Chats(60, "assistant") + odd + "\n" + Chats(5, "user"));
  WriteText(dir_ / "b.jsonl.gz", Gzip(Chats(90, "assistant")));
  WriteText(dir_ / "t.jinja",
            "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judge') }}"
            "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}");
  rules_["chat"] = RecordRule::kSkip;
  const std::vector<std::string> inputs = {dir_ / "a.jsonl", dir_ / "b.jsonl.gz"};
  for (const std::string& name : {std::string("plain"), dir_ / "t.jinja"}) {
    template_ = name;
    const std::string one = Ingested(inputs, 1, 1 << 24);
    EXPECT_GT(one.size(), 50'000U) << one;
    EXPECT_THAT(one, ::testing::HasSubstr("\"rule\":\"chat\""));
    EXPECT_THAT(one, ::testing::HasSubstr("\"rule\":\"duplicate\""));
    EXPECT_THAT(one, ::testing::HasSubstr("\"rule\":\"empty_target\""));
    EXPECT_EQ(Ingested(inputs, 5, 1 << 24) == one, true) << name;
    EXPECT_EQ(Ingested(inputs, 5, 2000) == one, true) << name;
  }
}

TEST_F(IngestWays, MistakesOfChatsAreTheFirstOfTheFileWhateverTheWorkers) {
  const std::string share_gpt =
      R"({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})";
  // The record of another shape has a role that the template does not know, too.
  const std::string both =
      R"({"conversations": [{"from": "human", "value": "a"}, {"from": "judge", "value": "b"}]})";
  WriteText(dir_ / "a.jsonl", Chats(40, "assistant") + both + "\n" + share_gpt + "\nbroken\n");
  WriteText(dir_ / "b.jsonl", Chats(40, "assistant") + "{\"text\": \"a\"}\n");
  WriteText(dir_ / "c.jsonl", share_gpt + "\n");
  WriteText(dir_ / "d.jsonl", Chats(130, "user"));
  for (const int workers : {1, 5}) {
    for (const int64_t piece_bytes : {300, 1 << 24}) {
      EXPECT_THAT(Ingested({dir_ / "a.jsonl"}, workers, piece_bytes),
                  ::testing::HasSubstr("ING-SHAPE: " + (dir_ / "a.jsonl") + ":41 ("));
      EXPECT_THAT(Ingested({dir_ / "b.jsonl"}, workers, piece_bytes),
                  ::testing::HasSubstr("ING-KIND: " + (dir_ / "b.jsonl") + ":41 ("));
      // Copies of chats that were left out count too.
      EXPECT_THAT(Ingested({dir_ / "d.jsonl"}, workers, piece_bytes),
                  ::testing::AllOf(::testing::HasSubstr("CHAT-NOMASK"),
                                   ::testing::HasSubstr("none of the first 100 records"),
                                   ::testing::HasSubstr("d.jsonl:100 (")));
    }
  }
  // Files may differ.
  WriteText(dir_ / "e.jsonl", Chats(3, "assistant"));
  EXPECT_THAT(Ingested({dir_ / "c.jsonl", dir_ / "e.jsonl"}, 2, 300),
              ::testing::HasSubstr("dataset.json"));
}

TEST_F(IngestWays, PackedAndArrayFilesGiveTheSameDocuments) {
  rules_.clear();
  std::string lines = "\xef\xbb\xbf";
  std::string array = "\xef\xbb\xbf [\n";
  for (int i = 0; i < 40; ++i) {
    const std::string record =
        nlohmann::json({{"text", SampleText(1) + "]},{[\"\\ " + std::to_string(i)}}).dump();
    lines += record + (i % 2 == 0 ? "\r\n" : "\n");
    array += (i > 0 ? ",\n" : "") + record;
  }
  array += "\n]\n";
  const std::string half = lines.substr(0, 1000);
  const std::string rest = lines.substr(1000);
  const std::map<std::string, std::string> files = {
      {"a.jsonl", lines},
      {"a.ndjson.gz", Gzip(half) + Gzip(rest)},  // two members
      {"a.jsonl.zst", Zstd(half) + Zstd(rest)},  // two frames
      {"a.json", array},
      {"a.json.gz", Gzip(array)},
      {"a.json.zst", Zstd(array)}};
  std::string first;
  for (const auto& [name, bytes] : files) {
    WriteText(dir_ / name, bytes);
    const std::string out = dir_ / ("out" + std::to_string(++runs_));
    EXPECT_EQ(Value(Run({dir_ / name}, out, 2, 700)).info.documents, 40) << name;
    const std::string shard = ReadText(out + "/tokens-00000.h5");
    if (first.empty()) first = shard;
    EXPECT_EQ(shard == first, true) << name;
  }
}

TEST_F(IngestWays, CutArchivesAreNeverTakenForWholeOnes) {
  const std::string text = Records(30);
  for (const auto& [name, bytes] : std::map<std::string, std::string>{
           {"a.jsonl.gz", Gzip(text)}, {"a.jsonl.zst", Zstd(text)}}) {
    for (size_t i = 0; i <= 40; ++i) {
      const size_t length = i < 20 ? i : bytes.size() - 1 - (i - 20) * (bytes.size() / 25);
      ExpectError(Failure(name, bytes.substr(0, length)), "ING-TRUNCATED", ExitCode::kData,
                  {name, "byte " + std::to_string(length) + " of the file"});
    }
  }
}

// A few bits carry nothing of the text: of gzip the time and the hints of its header, of zstd the
// size of the window and reserved bits of its sections. All others have to be noticed.
TEST_F(IngestWays, FlippedBitsOfArchivesNeverChangeTheText) {
  const std::string text = Records(30);
  WriteText(dir_ / "whole.jsonl", text);
  const std::string whole = dir_ / "whole";
  Value(Run({dir_ / "whole.jsonl"}, whole));
  const std::string tokens = ReadText(whole + "/tokens-00000.h5");
  for (const auto& [name, bytes] : std::map<std::string, std::string>{
           {"a.jsonl.gz", Gzip(text)}, {"a.jsonl.zst", Zstd(text)}}) {
    int same = 0;
    for (size_t i = 0; i < 60; ++i) {
      const size_t at = i < 12 ? i : 12 + (i - 12) * (bytes.size() - 13) / 47;
      std::string flipped = bytes;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << (i % 8)));
      WriteText(dir_ / name, flipped);
      const std::string out = dir_ / ("out" + std::to_string(++runs_));
      const Status status = Run({dir_ / name}, out).status();
      if (status.ok()) {
        ++same;
        EXPECT_EQ(ReadText(out + "/tokens-00000.h5") == tokens, true) << name << " byte " << at;
        continue;
      }
      const std::string code = ErrorCodeOf(status);
      EXPECT_TRUE(code == "ING-CRC" || code == "ING-TRUNCATED" || code == "ING-FORMAT")
          << name << " byte " << at << ": " << MessageOf(status);
    }
    EXPECT_LT(same, 12) << name << ": no more than one flip of each byte of a header";
  }
}

TEST_F(IngestWays, ARecordMayBeAsLongAsTheLimit) {
  const auto first = [&](const std::string& name, size_t bytes) {
    // A buffer is never smaller than 1 MiB, and a line has its newline in it.
    ReadOptions options{.path = dir_ / name, .longest_record = size_t{3} << 20};
    options.kind = Value(KindOfFile(options.path));
    const std::string start = "{\"text\": \"b\"}\n";
    WriteText(options.path, start + std::string(bytes, 'a') + "\n");
    RecordReader reader = Value(RecordReader::Open(options));
    RawRecord record;
    EXPECT_TRUE(Value(reader.Next(&record)));
    return reader.Next(&record).status();
  };
  EXPECT_EQ(first("a.jsonl", (size_t{3} << 20) - 1), OkStatus());
  ExpectError(first("a.jsonl", size_t{3} << 20), "ING-LONG", ExitCode::kData,
              {"a.jsonl", "record at byte 14", "longer than 3 MiB", "cut it"});
}

TEST_F(IngestWays, TextBehindAnArchiveIsNoPartOfIt) {
  const std::string text = "{\"text\": \"a\"}\n";
  EXPECT_EQ(ErrorCodeOf(Failure("a.jsonl.gz", Gzip(text) + "more")), "ING-CRC");
  EXPECT_EQ(ErrorCodeOf(Failure("a.jsonl.zst", Zstd(text) + "more")), "ING-CRC");
  EXPECT_EQ(ErrorCodeOf(Failure("b.jsonl.gz", text)), "ING-CRC");  // not packed at all
  EXPECT_EQ(ErrorCodeOf(Failure("b.jsonl.zst", text)), "ING-CRC");
}

TEST_F(IngestWays, LongWindowsOfZstdAreAskedFor) {
  WriteText(dir_ / "a.jsonl.zst", Zstd("{\"text\": \"a\"}\n", 28));
  IngestOptions options;
  options.sources = {{.name = "src", .inputs = {dir_ / "a.jsonl.zst"}}};
  options.output = dir_ / "long";
  options.name = "set";
  ExpectError(RunIngest(options, *tokenizer_).status(), "ING-FORMAT", ExitCode::kData,
              {"a.jsonl.zst", "--zstd-long"});
  options.zstd_window_log = 28;
  EXPECT_EQ(Value(RunIngest(options, *tokenizer_)).info.documents, 1);
}

TEST_F(IngestWays, BrokenArraysNameThePlace) {
  rules_.clear();
  const std::vector<std::pair<std::string, std::string>> bad = {
      {"{\"text\": \"a\"}", "found no JSON array"},
      {"", "found no JSON array"},
      {"[{\"text\": \"a\"}", "ends inside the array"},
      {"[{\"text\": \"a\"", "ends inside the element"},
      {"[{\"text\": \"a\"} {\"text\": \"b\"}]", "no comma"},
      {"[{\"text\": \"a\"},]", "no element behind a comma"},
      {"[{\"text\": \"a\"}]\n x", "behind the array"},
      {"[\n{\"text\": \"a\"},\n5]", "a.json:3 (byte 17): found a JSON number"}};
  for (const auto& [text, message] : bad)
    EXPECT_THAT(MessageOf(Failure("a.json", text)), ::testing::HasSubstr(message)) << text;
}

TEST_F(IngestWays, TheFastAndTheSlowParserAgree) {
  rules_.clear();
  // A key that makes a record a chat sends it to the slow parser; here it is one of a nested object
  // or comes with the wrong name, so both give a text.
  const std::vector<std::pair<std::string, std::string>> same = {
      {R"({"text": "a", "text": "b"})", "b"},  // the last of two
      {R"({"text": "a\u00e9\ud83d\ude00\n\"\\"})", "a\xc3\xa9\xf0\x9f\x98\x80\n\"\\"},
      {R"({"n": 123456789012345678901234567890, "text": "big"})", "big"},  // simdjson refuses it
      {R"({"id": 1.5, "text": "fraction"})", "fraction"},
      {R"({"id": {"deep": [1]}, "text": "no name"})", "no name"},
      {R"({"instruction": 1, "text": "slow"})", "slow"}};
  for (const auto& [record, text] : same) {
    WriteText(dir_ / "a.jsonl", record + "\n");
    const std::string out = dir_ / ("out" + std::to_string(++runs_));
    Value(Run({dir_ / "a.jsonl"}, out));
    EXPECT_THAT(Value(ShowDocument(out, 0, tokenizer_.get())),
                ::testing::HasSubstr("\n" + text + "\n"));
  }
  // So deep that what calls itself for every level would not come back.
  const std::string deep(1'000'000, '[');
  const std::string end(1'000'000, ']');
  for (const std::string start :
       {R"({"text": "a", "x": )",
        R"({"messages": [{"role": "assistant", "content": "a"}], "tools": )",
        R"({"messages": [{"role": "assistant", "content": "a", "x": "\"[", "y": )"}) {
    const bool turn = start.find("\"y\"") != std::string::npos;
    ExpectError(Failure("deep.jsonl", start + deep + end + (turn ? "}]}" : "}") + "\n"), "ING-JSON",
                ExitCode::kData, {"deep.jsonl:1", "deeper than 500 levels"});
  }
  // Broken behind the field that is asked for.
  ExpectError(Failure("b.jsonl", "{\"text\": \"a\", \"x\": }\n"), "ING-JSON", ExitCode::kData,
              {"b.jsonl:1"});
}

}  // namespace
}  // namespace sala::data
