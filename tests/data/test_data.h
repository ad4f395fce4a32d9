// What the tests of this room share: texts, tiny tokenizers, tiny stores, matchers of errors.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "core/hash.h"
#include "core/status.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "data/train_tokenizer.h"
#include "tests/core/temp_dir.h"

namespace sala::data {

inline void WriteText(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A status with this code, exit code, and these parts in its message.
inline void ExpectError(const Status& status, const std::string& code, ExitCode exit_code,
                        const std::vector<std::string>& parts = {}) {
  EXPECT_EQ(ErrorCodeOf(status), code) << MessageOf(status);
  EXPECT_EQ(static_cast<int>(ExitCodeOf(status)), static_cast<int>(exit_code));
  for (const std::string& part : parts) EXPECT_THAT(MessageOf(status), ::testing::HasSubstr(part));
}

#define SALA_ASSERT_OK(expr)                                                   \
  do {                                                                         \
    const ::sala::Status sala_test_status = (expr);                            \
    ASSERT_TRUE(sala_test_status.ok()) << ::sala::MessageOf(sala_test_status); \
  } while (false)

// The value of a StatusOr that has to be OK.
template <typename T>
T Value(StatusOr<T> result) {
  if (!result.ok()) ADD_FAILURE() << MessageOf(result.status());
  return std::move(result).value();
}

// English-like text with code, tabs, blank lines and other scripts; `repeat` varies it.
inline std::string SampleText(int repeat) {
  std::string text;
  for (int i = 0; i < repeat; ++i) {
    text +=
        "The quick brown fox number " + std::to_string(i * 7919 % 1000) +
        " jumps over the lazy dog near the river bank.\n\n"
        "When the evening comes, people walk home along the quiet street, and the lamps are lit.\n"
        "  if (value > limit) {\n\treturn value - limit;  // two spaces\n  }\n"
        "Caf\xc3\xa9 na\xc3\xafve \xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x98\x80.\n";
  }
  return text;
}

// Trains a tokenizer on sample text, in the folder `name` of dir.
inline void TrainTokenizer(const TempDir& dir, const std::string& name, int64_t vocab) {
  WriteText(dir / "corpus.txt", SampleText(80));
  SALA_ASSERT_OK(TrainSentencePiece(
                     {.inputs = {dir / "corpus.txt"}, .vocab_size = vocab, .output = dir / name})
                     .status());
}

// A trained tokenizer of kVocab tokens, made once for all tests of a suite.
template <int64_t kVocab>
class TrainedTokenizerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = std::make_unique<TempDir>();
    TrainTokenizer(*dir_, "tok", kVocab);
    tokenizer_ = Value(LoadTokenizer(*dir_ / "tok"));
  }
  static void TearDownTestSuite() {
    tokenizer_.reset();
    dir_.reset();
  }
  static inline std::unique_ptr<TempDir> dir_;
  static inline std::unique_ptr<Tokenizer> tokenizer_;
};

// Documents of the given lengths: token j of document d is (d * 31 + j) % 200, its first token d %
// 200.
inline std::unique_ptr<TokenStore> MakeStore(const std::string& directory,
                                             const std::vector<int64_t>& lengths,
                                             int64_t shard_tokens = int64_t{1} << 20,
                                             bool sft = false) {
  const auto tokenizer = MakeByteTokenizer();
  auto writer = Value(TokenStoreWriter::Create(
      {.directory = directory, .name = "made", .sft = sft, .shard_tokens = shard_tokens},
      *tokenizer));
  writer->AddSource("made", "CC0-1.0", "");
  for (size_t d = 0; d < lengths.size(); ++d) {
    std::vector<int32_t> tokens;
    std::vector<uint8_t> mask;
    for (int64_t j = 0; j < lengths[d]; ++j) {
      tokens.push_back(static_cast<int32_t>((static_cast<int64_t>(d) * 31 + j) % 200));
      if (sft) mask.push_back(j % 3 == 1 ? 1 : 0);
    }
    const auto status =
        writer->Add({.tokens = tokens, .loss_mask = mask, .hash = Xxh3(std::to_string(d))});
    EXPECT_TRUE(status.ok()) << MessageOf(status);
  }
  Value(writer->Finish({{"command", "test"}}));
  return Value(TokenStore::Open(directory));
}

}  // namespace sala::data
