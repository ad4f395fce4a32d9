// Tokenizers of the tokenizer.json form against the `tokenizers` package: tokenizer_goldens.json is
// what the package gave (tests/oracle/tokenizer_goldens.py).
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
        // The package gives unk after the bytes of the characters behind it.
        if (id == tokenizer.unk_id()) continue;
        EXPECT_GE(begin, before);
        before = begin;
      }
      EXPECT_EQ(placed, ids);
      tokenizer.AddSpecial(&ids);
      EXPECT_EQ(ids, row.value("special", row["ids"]).get<List>());
    }
  }
}

}  // namespace
}  // namespace sala::data
