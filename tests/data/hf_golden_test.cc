// Tokenizers of the tokenizer.json form against the `tokenizers` package: tokenizer_goldens.json is
// what the package gave (tests/oracle/tokenizer_goldens.py).
#include <future>
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "data/hf_tokenizer.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

using List = std::vector<int32_t>;

TEST(HfTokenizerGoldens, IdsAndTextsAreThoseOfThePackage) {
  const auto cases = nlohmann::json::parse(ReadText(SALA_TEST_DATA "/tokenizer_goldens.json"));
  ASSERT_GT(cases.size(), 100U);
  for (const auto& golden : cases) {
    SCOPED_TRACE(golden["name"].get<std::string>());
    const TempDir dir;
    WriteText(dir / "tokenizer.json", golden["tokenizer"].get<std::string>());
    const auto loaded = LoadTokenizer(dir.path());
    ASSERT_TRUE(loaded.ok()) << MessageOf(loaded.status());
    const Tokenizer& tokenizer = **loaded;
    for (const auto& row : golden["texts"]) {
      const auto text = row["text"].get<std::string>();
      SCOPED_TRACE(text);
      List ids = tokenizer.Encode(text);
      EXPECT_EQ(ids, row["ids"].get<List>());
      EXPECT_EQ(tokenizer.Encode(text), ids) << "from the cache";
      EXPECT_EQ(tokenizer.Decode(row["ids"].get<List>()), row["decoded"].get<std::string>());
      List placed;
      int64_t before = 0;
      for (const auto& [id, begin] : tokenizer.EncodeWithOffsets(text)) {
        placed.push_back(id);
        EXPECT_LT(begin, static_cast<int64_t>(text.size()));
        EXPECT_GE(begin, before);
        before = begin;
      }
      EXPECT_EQ(placed, ids);
      tokenizer.AddSpecial(&ids);
      EXPECT_EQ(ids, row.value("special", row["ids"]).get<List>());
    }
  }
}

TEST(HfTokenizerThreads, EncodeAndDecodeTheSameAsOne) {
  const auto cases = nlohmann::json::parse(ReadText(SALA_TEST_DATA "/tokenizer_goldens.json"));
  const TempDir dir;
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  for (const auto& golden : cases) {
    WriteText(dir / "tokenizer.json", golden["tokenizer"].get<std::string>());
    tokenizers.push_back(Value(LoadTokenizer(dir.path())));
  }
  // Each thread goes through all tokenizers from another one on, so that caches of several
  // tokenizers meet, and the same one is used at once.
  const auto mistakes = [&](size_t first) {
    int64_t found = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
      const size_t at = (first + i) % cases.size();
      for (const auto& row : cases[at]["texts"]) {
        const auto ids = row["ids"].get<List>();
        found += tokenizers[at]->Encode(row["text"].get<std::string>()) == ids ? 0 : 1;
        found += tokenizers[at]->Decode(ids) == row["decoded"].get<std::string>() ? 0 : 1;
      }
    }
    return found;
  };
  std::vector<std::future<int64_t>> threads;
  for (size_t t = 0; t < 8; ++t)
    threads.push_back(std::async(std::launch::async, mistakes, t / 2 * 17));
  for (auto& thread : threads) EXPECT_EQ(thread.get(), 0);
}

}  // namespace
}  // namespace sala::data
