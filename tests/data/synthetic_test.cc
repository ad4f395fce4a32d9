#include "data/synthetic.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "data/commands.h"
#include "data/data_config.h"
#include "data/stream.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

using SyntheticTest = TrainedTokenizerTest<500>;

constexpr RecallTask kTasks[] = {RecallTask::kPasskey, RecallTask::kMultiKey,
                                 RecallTask::kTracking};

// A text dataset of documents of `repeat` pieces of text or a few more.
void MakeTextStore(const std::string& directory, const Tokenizer& tokenizer, int documents,
                   int repeat = 10) {
  auto writer =
      Value(TokenStoreWriter::Create({.directory = directory, .name = "text"}, tokenizer));
  writer->AddSource("text", "CC0-1.0", "");
  for (int d = 0; d < documents; ++d) {
    const std::string text =
        "Document " + std::to_string(d) + " begins here and goes on. " + SampleText(repeat + d % 3);
    const auto ids = tokenizer.Encode(text);
    SALA_ASSERT_OK(writer->Add({.tokens = ids, .hash = Xxh3(text)}));
  }
  Value(writer->Finish({}));
}

TEST_F(SyntheticTest, ItemsFillTheLengthAndAnswersStartOnAToken) {
  const Haystack haystack = Haystack::Filler();
  for (const RecallTask task : kTasks) {
    for (const int64_t length : {600, 2000}) {
      for (const bool chat : {false, true}) {
        for (int64_t index = 0; index < 4; ++index) {
          const RecallOptions options{.task = task, .length_tokens = length, .chat = chat};
          const RecallItem item = Value(MakeRecallItem(options, haystack, *tokenizer_, index));
          const int64_t used = static_cast<int64_t>(item.prompt.size() + item.answer.size());
          EXPECT_LE(used, length);
          // One more unit would not fit: a unit of the filler has at most 60 bytes, a token at
          // least one.
          EXPECT_GT(used, length - 62) << NameOf(task);
          EXPECT_EQ(item.prompt.front(), tokenizer_->bos_id());
          std::vector<int32_t> all(item.prompt.begin() + 1, item.prompt.end());
          all.insert(all.end(), item.answer.begin(), item.answer.end());
          EXPECT_EQ(all, tokenizer_->Encode(item.prompt_text + item.answer_text));
          EXPECT_EQ(tokenizer_->Decode(item.answer), item.answer_text);
        }
      }
    }
  }
}

TEST_F(SyntheticTest, TheAnswerFollowsFromTheContext) {
  const Haystack haystack = Haystack::Filler();
  std::set<std::string> answers;
  std::set<double> depths;
  for (int64_t index = 0; index < 40; ++index) {
    const RecallItem key = Value(MakeRecallItem(
        {.task = RecallTask::kPasskey, .length_tokens = 900}, haystack, *tokenizer_, index));
    EXPECT_THAT(key.prompt_text, ::testing::HasSubstr("The pass key is" + key.answer_text + "."));
    answers.insert(key.answer_text);
    depths.insert(key.depth);
    const RecallItem multi = Value(MakeRecallItem(
        {.task = RecallTask::kMultiKey, .length_tokens = 900}, haystack, *tokenizer_, index));
    const std::string lead = multi.prompt_text.substr(multi.prompt_text.find_last_of('\n') + 1);
    EXPECT_THAT(multi.prompt_text, ::testing::HasSubstr(lead + multi.answer_text + "."));
    const RecallItem chain = Value(MakeRecallItem(
        {.task = RecallTask::kTracking, .length_tokens = 900}, haystack, *tokenizer_, index));
    std::string before;
    for (size_t at = 1; at < chain.answer_text.size(); at += 6) {  // five letters and a space each
      const std::string name = chain.answer_text.substr(at, 5);
      const size_t line = chain.prompt_text.find("VAR " + name + " = " +
                                                 (before.empty() ? "" : "VAR " + before + "."));
      EXPECT_NE(line, std::string::npos) << name;
      before = name;
    }
  }
  EXPECT_GE(answers.size(), 39U);
  EXPECT_GE(depths.size(), 15U);
}

// How often each word stands in the text, whatever is around it.
std::map<std::string, int> Counts(const std::string& text) {
  std::map<std::string, int> counts;
  std::istringstream words(text);
  for (std::string word; words >> word;) ++counts[word];
  return counts;
}

std::vector<std::string> WordsOf(const std::string& text) {
  std::istringstream words(text);
  return {std::istream_iterator<std::string>(words), {}};
}

RecallItem Item(RecallTask task, int64_t length, const Haystack& haystack, int64_t index) {
  return Value(MakeRecallItem({.task = task, .length_tokens = length}, haystack,
                              *MakeByteTokenizer(), index));
}

TEST_F(SyntheticTest, NeedlesSayWhatTheQuestionAsks) {
  const Haystack haystack = Haystack::Filler();
  for (int64_t index = 0; index < 12; ++index) {
    for (const RecallTask task :
         {RecallTask::kSingle1, RecallTask::kSingle2, RecallTask::kSingle3, RecallTask::kMultiKey1,
          RecallTask::kMultiKey2, RecallTask::kMultiKey3}) {
      const RecallItem item = Item(task, 3000, haystack, index);
      const std::string& text = item.prompt_text;
      const std::string lead = text.substr(text.find_last_of('\n') + 1);
      // Exactly one needle begins like the answer.
      const size_t needle = text.find(lead + item.answer_text + ".\n");
      ASSERT_NE(needle, std::string::npos) << NameOf(task);
      EXPECT_EQ(text.find(lead + " ", needle + 1), std::string::npos) << NameOf(task);
      EXPECT_EQ(text.find(lead + " "), needle) << NameOf(task);
    }
    const RecallItem values = Item(RecallTask::kMultiValue, 3000, haystack, index);
    size_t at = 0;
    for (const std::string& value : WordsOf(values.answer_text)) {
      at = values.prompt_text.find(" is " + value.substr(0, 7) + ".", at + 1);
      EXPECT_NE(at, std::string::npos) << "in the order of appearance";
    }
    const RecallItem query = Item(RecallTask::kMultiQuery, 3000, haystack, index);
    std::string question = query.prompt_text.substr(query.prompt_text.rfind("What are"));
    for (const std::string& value : WordsOf(query.answer_text)) {
      const size_t end = query.prompt_text.find(" is " + value.substr(0, 7) + ".");
      ASSERT_NE(end, std::string::npos);
      const size_t begin = query.prompt_text.rfind("The number of ", end) + 14;
      const std::string thing = query.prompt_text.substr(begin, end - begin);
      const size_t place = question.find(thing);
      ASSERT_NE(place, std::string::npos) << thing;
      question = question.substr(place + thing.size());  // the next one is asked for behind it
    }
  }
}

TEST_F(SyntheticTest, KeysAndValuesAreAJsonObject) {
  const Haystack haystack = Haystack::Filler();
  for (int64_t index = 0; index < 12; ++index) {
    const RecallItem item = Item(RecallTask::kKeyValue, 2000, haystack, index);
    const std::string& text = item.prompt_text;
    const size_t begin = text.find('{');
    const auto json =
        nlohmann::json::parse(text.substr(begin, text.find('}') - begin + 1), nullptr, false);
    ASSERT_TRUE(json.is_object()) << text;
    EXPECT_EQ(static_cast<int64_t>(json.size()), item.units + 1);
    const std::string key = text.substr(text.rfind("the key ") + 8, 36);
    EXPECT_EQ(" " + json.at(key).get<std::string>(), item.answer_text);
  }
}

TEST_F(SyntheticTest, WordsAreTheOnesThatComeOften) {
  const Haystack haystack = Haystack::Filler();
  for (const int64_t length : {2000, 9000}) {
    const RecallItem common = Item(RecallTask::kCommonWords, length, haystack, 1);
    const auto counts = Counts(common.prompt_text);
    const std::vector<std::string> answer = WordsOf(common.answer_text);
    ASSERT_EQ(answer.size(), 10U);
    size_t before = 0;
    for (const std::string& word : answer) {
      EXPECT_EQ(counts.at(word), length < 4096 ? 6 : 30);
      const size_t first = common.prompt_text.find(" " + word + "\n");
      EXPECT_GT(first, before) << "in order of first appearance";
      before = first;
    }
    EXPECT_EQ(common.depth, kNoDepth);

    const RecallItem frequent = Item(RecallTask::kFrequentWords, length, haystack, 1);
    auto words = Counts(frequent.prompt_text);
    const std::vector<std::string> three = WordsOf(frequent.answer_text);
    ASSERT_EQ(three.size(), 3U);
    EXPECT_GT(words["..."], words[three[0]]);
    EXPECT_GT(words[three[0]], words[three[1]]);
    EXPECT_GT(words[three[1]], words[three[2]]);
    for (const auto& [word, count] : words) {
      const bool named = word == "..." || std::count(three.begin(), three.end(), word) > 0;
      if (named || word.size() != 6) continue;
      EXPECT_LT(count, words[three[2]]) << word;
    }
  }
}

TEST_F(SyntheticTest, ItemsAreDeterministicAndDiffer) {
  const Haystack haystack = Haystack::Filler();
  const RecallOptions options{.task = RecallTask::kMultiKey, .length_tokens = 800};
  const auto text = [&](const RecallOptions& o, int64_t index) {
    return Value(MakeRecallItem(o, haystack, *tokenizer_, index)).prompt_text;
  };
  EXPECT_EQ(text(options, 3), text(options, 3));
  EXPECT_NE(text(options, 3), text(options, 4));
  RecallOptions training = options;
  training.purpose = "train";
  EXPECT_NE(text(options, 3), text(training, 3));
  RecallOptions seeded = options;
  seeded.seed = 5;
  EXPECT_NE(text(options, 3), text(seeded, 3));
}

TEST_F(SyntheticTest, LengthsThatAreTooShort) {
  const auto status =
      MakeRecallItem({.length_tokens = 20}, Haystack::Filler(), *tokenizer_, 0).status();
  ExpectError(status, "EVAL-LENGTH", ExitCode::kConfig, {"passkey", "length 20"});
  ExpectError(MakeRecallItem({.keys = 99}, Haystack::Filler(), *tokenizer_, 0).status(),
              "EVAL-TASK", ExitCode::kConfig, {"99"});
  ExpectError(RecallTaskNamed("needles").status(), "EVAL-TASK", ExitCode::kConfig,
              {"needles", "tracking"});
}

TEST_F(SyntheticTest, RunningTextAsHaystack) {
  TempDir dir;
  MakeTextStore(dir / "text", *tokenizer_, 3);
  const Haystack haystack = Value(Haystack::FromDataset(dir / "text", *tokenizer_));
  EXPECT_GT(haystack.units().size(), 40U);
  const RecallItem item = Value(MakeRecallItem({.length_tokens = 700}, haystack, *tokenizer_, 0));
  EXPECT_THAT(item.prompt_text, ::testing::HasSubstr("river bank."));
  ExpectError(MakeRecallItem({.length_tokens = 100000}, haystack, *tokenizer_, 0).status(),
              "EVAL-HAYSTACK", ExitCode::kConfig, {"larger dataset"});
  ExpectError(Haystack::FromDataset(dir / "none", *tokenizer_).status(), "EVAL-HAYSTACK",
              ExitCode::kConfig, {"none"});
  const Haystack::Part nothing{.split = Split::kHeldOut, .seed = 1, .fraction = 0};
  ExpectError(Haystack::FromDataset(dir / "text", *tokenizer_, 1 << 20, &nothing).status(),
              "EVAL-HAYSTACK", ExitCode::kConfig, {"held out"});
}

TEST_F(SyntheticTest, HaystacksForTrainingShowNothingThatIsHeldOut) {
  constexpr int kDocuments = 40;
  TempDir dir;
  MakeTextStore(dir / "text", *tokenizer_, kDocuments, /*repeat=*/1);
  const auto opening = [](int d) {
    return "Document " + std::to_string(d) + " begins here and goes on.";
  };
  auto store = Value(TokenStore::Open(dir / "text"));
  TokenFile* file = Value(store->File(0));
  const SyntheticOptions defaults;
  std::set<int> held_out;
  for (int d = 0; d < kDocuments; ++d) {
    if (IsHeldOut(file->hash(d), defaults.held_out_seed, defaults.held_out_fraction))
      held_out.insert(d);
  }
  ASSERT_FALSE(held_out.empty());
  for (const Split split : {Split::kTraining, Split::kHeldOut}) {
    const Haystack::Part part = {split, defaults.held_out_seed, defaults.held_out_fraction};
    const Haystack haystack =
        Value(Haystack::FromDataset(dir / "text", *tokenizer_, Haystack::kMaxBytes, &part));
    for (int d = 0; d < kDocuments; ++d) {
      const bool found =
          std::count(haystack.units().begin(), haystack.units().end(), opening(d)) > 0;
      EXPECT_EQ(found, (held_out.count(d) > 0) == (split == Split::kHeldOut)) << d;
    }
  }

  // As a dataset, with enough text that every sentence of the haystack is somewhere in it.
  SyntheticOptions options;
  options.recall.length_tokens = 1500;
  options.documents = 30;
  options.haystack_dataset = dir / "text";
  options.output = dir / "set";
  options.name = "passkeys";
  Value(MaterialiseSynthetic(options, *tokenizer_));
  std::string all;
  for (int64_t i = 0; i < options.documents; ++i)
    all += Value(ShowDocument(dir / "set", i, tokenizer_.get()));
  int shown = 0;
  for (int d = 0; d < kDocuments; ++d) {
    const bool found = all.find(opening(d)) != std::string::npos;
    shown += found ? 1 : 0;
    EXPECT_FALSE(found && held_out.count(d) > 0) << d;
  }
  EXPECT_EQ(shown, kDocuments - static_cast<int>(held_out.size()));
}

// A tokenizer that joins the space of the answer to the word before it.
class GreedySpace : public Tokenizer {
 public:
  std::string TokenBytes(int32_t id) const override {
    return std::string(1, static_cast<char>(id & 0xff));
  }
  int64_t vocab_size() const override { return 512; }
  int32_t bos_id() const override { return -1; }
  int32_t eos_id() const override { return -1; }
  int32_t pad_id() const override { return -1; }
  int32_t unk_id() const override { return -1; }
  Status SaveTo(const std::string&) const override { return OkStatus(); }

 protected:
  void AppendPieces(std::string_view, int64_t, std::vector<Piece>*) const override {}
  void AppendIds(std::string_view text, int64_t offset, std::vector<int32_t>* out) const override {
    for (size_t i = 0; i < text.size(); ++i) {
      const bool joined = i + 1 < text.size() && text[i + 1] == ' ';
      out->push_back(static_cast<uint8_t>(text[i]) + (joined ? 256 : 0));
      if (joined) ++i;
    }
  }
};

TEST_F(SyntheticTest, AnswersInsideATokenAreRefused) {
  ExpectError(
      MakeRecallItem({.length_tokens = 2000}, Haystack::Filler(), GreedySpace(), 0).status(),
      "EVAL-BOUNDARY", ExitCode::kConfig, {"passkey", "does not start on a token"});
}

TEST_F(SyntheticTest, MaterialisedTextTrainsLikeAnyDataset) {
  TempDir dir;
  SyntheticOptions options;
  options.recall.length_tokens = 400;
  options.min_length_tokens = 200;
  options.documents = 12;
  options.output = dir / "set";
  options.name = "passkeys";
  const DatasetInfo info = Value(MaterialiseSynthetic(options, *tokenizer_));
  EXPECT_EQ(info.documents, 12);
  EXPECT_EQ(info.kind, "pretrain");
  EXPECT_LE(info.files[0].max_document, 400);
  SyntheticOptions again = options;
  again.output = dir / "again";
  EXPECT_EQ(Value(MaterialiseSynthetic(again, *tokenizer_)).fingerprint, info.fingerprint);
  DataConfig config;
  config.mixture.resize(1);
  config.mixture[0].dataset = dir / "set";
  auto stream = Value(SampleStream::Open(config, "decay", 512, *tokenizer_));
  EXPECT_GT(Value(stream->Get(0)).targets(), 100);
}

TEST_F(SyntheticTest, MaterialisedChatLearnsTheAnswerOnly) {
  TempDir dir;
  SyntheticOptions options;
  options.recall.task = RecallTask::kMultiKey;
  options.recall.length_tokens = 500;
  options.recall.chat = true;
  options.documents = 3;
  options.output = dir / "set";
  options.name = "needles";
  const DatasetInfo info = Value(MaterialiseSynthetic(options, *tokenizer_));
  EXPECT_TRUE(info.sft());
  EXPECT_LE(info.files[0].max_document, 500);
  const std::string shown = Value(ShowDocument(dir / "set", 0, tokenizer_.get()));
  EXPECT_THAT(shown, ::testing::HasSubstr("assistant\n[[The number of the "));
  EXPECT_THAT(shown, ::testing::EndsWith("<|im_end|>]]\n\n"));
}

TEST_F(SyntheticTest, ContinuationOfRealDocuments) {
  TempDir dir;
  MakeTextStore(dir / "text", *tokenizer_, 3);
  const ContinuationOptions options{.dataset = dir / "text",
                                    .output = dir / "set",
                                    .name = "go-on",
                                    .prompt_tokens = 60,
                                    .answer_tokens = 40,
                                    .documents = 7};
  const DatasetInfo info = Value(MaterialiseContinuation(options, *tokenizer_));
  EXPECT_EQ(info.documents, 7);
  const std::string shown = Value(ShowDocument(dir / "set", 0, tokenizer_.get()));
  EXPECT_THAT(
      shown, ::testing::HasSubstr("<|im_start|>user\nContinue this text:\nDocument 0 begins here"));
  const size_t begin = shown.find("[[") + 2;
  const std::string answer = shown.substr(begin, shown.find("<|im_end|>]]") - begin);
  const std::string question =
      shown.substr(shown.find("text:\n") + 6, shown.find("<|im_end|>") - shown.find("text:\n") - 6);
  const std::string original = "Document 0 begins here and goes on. " + SampleText(10);
  EXPECT_EQ(original.substr(0, question.size() + answer.size()), question + answer);
  ContinuationOptions longer = options;
  longer.output = dir / "longer";
  longer.prompt_tokens = 1 << 20;
  ExpectError(MaterialiseContinuation(longer, *tokenizer_).status(), "DS-EMPTY", ExitCode::kData,
              {"tokens with a space"});
}

}  // namespace
}  // namespace sala::data
