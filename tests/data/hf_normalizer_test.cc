// The composed forms against utf8proc's own, and runs that its sort would not come back from.
#include "data/hf_normalizer.h"

#include <utf8proc.h>

#include <array>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <random>

#include "data/code_points.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

std::string Normalized(const HfNormalizer& normalizer, const std::string& given) {
  AlignedText text{.text = given, .tracked = false, .at_start = true, .origin = {}};
  normalizer.Apply(&text);
  return text.text;
}

HfNormalizer Form(const std::string& type) {
  const nlohmann::json node = {{"type", type}};
  const std::string file = "tokenizer.json";
  return Value(HfNormalizer::Read(HfNode(&node, &file)));
}

std::string OfLibrary(const std::string& text, int more) {
  utf8proc_uint8_t* made = nullptr;
  const auto size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &made,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE | more));
  std::string out(reinterpret_cast<const char*>(made), static_cast<size_t>(size));
  std::free(made);  // NOLINT(cppcoreguidelines-no-malloc): utf8proc allocates it so
  return out;
}

TEST(HfNormalizer, ComposedFormsAreThoseOfUtf8proc) {
  // Letters, marks of several classes, Hangul, singletons, exclusions, ligatures.
  constexpr std::array<uint32_t, 32> kAlphabet = {
      'a',   'e',   's',   0xE9,   0x1E69, 0x300,  0x301,  0x308,  0x316,   0x323,  0x327,
      0x328, 0x344, 0x345, 0x1100, 0x1161, 0x11A8, 0xAC00, 0x212B, 0x958,   0x93C,  0x915,
      0x9C7, 0x9BE, 0xF71, 0xF72,  0xF73,  0xFB01, 0xFDFA, 0x2460, 0x1D15E, 0x1D165};
  const HfNormalizer nfc = Form("NFC"), nfkc = Form("NFKC");
  std::mt19937 draw(1);
  for (int i = 0; i < 20'000; ++i) {
    std::string text;
    for (uint32_t left = 1 + draw() % 12; left > 0; --left)
      AppendCodePoint(kAlphabet[draw() % kAlphabet.size()], &text);
    ASSERT_EQ(Normalized(nfc, text), OfLibrary(text, 0)) << text;
    ASSERT_EQ(Normalized(nfkc, text), OfLibrary(text, UTF8PROC_COMPAT)) << text;
  }
}

TEST(HfNormalizer, LongRunsOfMarksAreSorted) {
  // 100,000 marks, above and below in turn: below come first, and one above joins the letter.
  std::string text = "a", expected = "\u00e1";
  for (int i = 0; i < 50'000; ++i) text += "\u0301\u0316";
  for (int i = 0; i < 50'000; ++i) expected += "\u0316";
  for (int i = 1; i < 50'000; ++i) expected += "\u0301";
  EXPECT_TRUE(Normalized(Form("NFC"), text) == expected);
}

// Where a Metaspace of scheme "first" writes its mark, as tokenizers 0.22.2 does.
TEST(HfNormalizer, TheStartAfterAReplace) {
  const auto stays = [](const std::string& pattern, const std::string& content) {
    AlignedText text{.text = "\xC3\xA9xa", .tracked = false, .at_start = true, .origin = {}};
    ReplaceText(pattern, content, &text);
    return text.at_start;
  };
  EXPECT_TRUE(stays("\xC3\xA9", "ab"));  // one character
  EXPECT_FALSE(stays("\xC3\xA9", ""));
  EXPECT_FALSE(stays("\xC3\xA9x", "a"));  // stands for the x, which is not the first
  EXPECT_TRUE(stays("xa", "b"));
}

}  // namespace
}  // namespace sala::data
