#include "core/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "core/file.h"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

enum class Shape { kCosine, kLinear };

struct Inner {
  int64_t width = 4;
  std::string name = "n";
  void Bind(ConfigBinder& b) {
    b.Field("width", &width, {.required = true, .min = 1, .max = 8192});
    b.Field("name", &name);
  }
};

struct Empty {
  void Bind(ConfigBinder&) {}
};

struct Sample {
  bool flag = false;
  int64_t warmup_steps = 0;
  double peak_lr = 1e-3;
  std::string text = "hello";
  std::vector<int64_t> sizes = {1, 2};
  std::vector<double> weights;
  std::vector<std::string> words;
  std::optional<int64_t> limit;
  std::optional<double> scale;
  std::optional<std::string> note;
  Shape shape = Shape::kCosine;
  Inner inner;
  std::optional<Inner> extra;
  Empty nothing;
  std::vector<Inner> list;
  std::vector<Empty> empties;

  void Bind(ConfigBinder& b) {
    b.Field("flag", &flag);
    b.Field("warmup_steps", &warmup_steps, {.min = 0});
    b.Field("peak_lr", &peak_lr, {.max = 10});
    b.Field("text", &text);
    b.Field("sizes", &sizes, {.min = 0});
    b.Field("weights", &weights);
    b.Field("words", &words);
    b.Field("limit", &limit);
    b.Field("scale", &scale);
    b.Field("note", &note);
    b.Enum("shape", &shape, {{"cosine", Shape::kCosine}, {"linear", Shape::kLinear}});
    b.Section("inner", &inner);
    b.Section("extra", &extra);
    b.Section("nothing", &nothing);
    b.List("list", &list);
    b.List("empties", &empties);
    if (flag && warmup_steps == 0 && b.Present("flag"))
      b.Error("flag", "CFG-CONFLICT", "needs warmup_steps");
  }
};

constexpr char kInner[] = "inner: {width: 4}\n";

StatusOr<Sample> Read(const std::string& text, const std::vector<std::string>& sets = {}) {
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document, ConfigDocument::Parse(text, "c.yaml", sets));
  Sample sample;
  SALA_RETURN_IF_ERROR(BindConfig(document, &sample));
  return sample;
}

// "CODE: text" of reading `text` together with the required section.
std::string ErrorOf(const std::string& text, const std::vector<std::string>& sets = {}) {
  const Status status = Read(kInner + text, sets).status();
  EXPECT_FALSE(status.ok()) << text;
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  return MessageOf(status);
}

TEST(Config, ReadsScalars) {
  const Sample s = Read(std::string(kInner) +
                        "flag: true\nwarmup_steps: 7_800_000\npeak_lr: 2e-3\n"
                        "text: \"two words\"\nscale: 1e9\nnote: x\n")
                       .value();
  EXPECT_TRUE(s.flag);
  EXPECT_EQ(s.warmup_steps, 7800000);
  EXPECT_EQ(s.peak_lr, 2e-3);
  EXPECT_EQ(s.text, "two words");
  EXPECT_EQ(s.scale, 1e9);
  EXPECT_EQ(s.note, "x");
}

TEST(Config, ListsOptionalsAndSections) {
  const Sample s = Read(
                       "inner: {width: 8, name: deep}\nsizes: [4K, 010]\nweights: [1, 0.5, 1_000]\n"
                       "words: [a, \"b\", 3]\nlimit: 5\nshape: linear\nextra:\n  width: 2\n"
                       "list:\n  - width: 1\n  - {width: 2, name: z}\n")
                       .value();
  EXPECT_THAT(s.sizes, ElementsAre(4096, 10));
  EXPECT_THAT(s.weights, ElementsAre(1, 0.5, 1000));
  EXPECT_THAT(s.words, ElementsAre("a", "b", "3"));
  EXPECT_EQ(s.limit, 5);
  EXPECT_FALSE(s.scale.has_value());
  EXPECT_EQ(s.shape, Shape::kLinear);
  EXPECT_EQ(s.inner.width, 8);
  ASSERT_TRUE(s.extra.has_value());
  EXPECT_EQ(s.extra->width, 2);
  ASSERT_EQ(s.list.size(), 2U);
  EXPECT_EQ(s.list[1].name, "z");
  EXPECT_FALSE(Read(std::string(kInner) + "extra: null\nlimit: ~\n").value().extra.has_value());
}

TEST(Config, UnknownKeysNameTheNearestOne) {
  EXPECT_EQ(ErrorOf("warmup_step: 3\n"),
            "CFG-KEY: c.yaml:2:1: unknown key `warmup_step`; did you mean `warmup_steps`?");
  EXPECT_THAT(ErrorOf("list: [{width: 1, nmae: x}]\n"),
              HasSubstr("c.yaml:2:19: unknown key `list.0.nmae`; did you mean `name`?"));
  EXPECT_THAT(ErrorOf("extra: {width: 1, qqqqqq: x}\n"), HasSubstr("valid are: width, name"));
  EXPECT_THAT(ErrorOf("nothing: {a: 1}\n"), HasSubstr("no key is valid here"));
}

TEST(Config, DuplicateKeysNameBothPlaces) {
  EXPECT_EQ(
      ErrorOf("flag: true\nsizes: [1]\nflag: false\n"),
      "CFG-DUP: c.yaml:4:1: key `flag` is written twice, first at c.yaml:2:1; remove one of them");
  EXPECT_THAT(ErrorOf("extra: {width: 1, width: 1}\n"), HasSubstr("CFG-DUP: c.yaml:2:19"));
}

TEST(Config, WrongTypes) {
  EXPECT_EQ(ErrorOf("warmup_steps: fast\n"),
            "CFG-TYPE: c.yaml:2:15: `warmup_steps`: found `fast`, expected an integer such as "
            "4096, 7_800_000 or 4K");
  EXPECT_THAT(ErrorOf("warmup_steps: \"3\"\n"), HasSubstr("found quoted text `3`"));
  EXPECT_THAT(ErrorOf("flag: yes\n"), HasSubstr("found `yes`, expected true or false"));
  EXPECT_THAT(ErrorOf("text:\n"), HasSubstr("found nothing, expected text"));
  EXPECT_THAT(ErrorOf("text: [a]\n"), HasSubstr("found a list, expected text"));
  EXPECT_THAT(ErrorOf("sizes: 3\n"), HasSubstr("found `3`, expected a list"));
  EXPECT_THAT(ErrorOf("sizes: [1, x]\n"), HasSubstr("`sizes.1`: found `x`"));
  EXPECT_THAT(ErrorOf("list: {a: 1}\n"), HasSubstr("found a mapping, expected a list"));
  EXPECT_THAT(ErrorOf("list: [3]\n"), HasSubstr("`list.0`: found `3`, expected a mapping"));
  EXPECT_THAT(ErrorOf("extra: 3\n"), HasSubstr("`extra`: found `3`, expected a mapping"));
  for (const char* bad :
       {"0x10", "1e3", "1.5", "1__0", "_1", "9223372036854775808", "9000000000G", "1 K", "--1"}) {
    EXPECT_THAT(ErrorOf(std::string("warmup_steps: ") + bad + "\n"), HasSubstr("CFG-TYPE")) << bad;
  }
  for (const char* bad : {".nan", "nan", "inf", ".inf", "1e999", "0x1p3", "1e", "1_.5"}) {
    EXPECT_THAT(ErrorOf(std::string("peak_lr: ") + bad + "\n"), HasSubstr("CFG-TYPE")) << bad;
  }
}

TEST(Config, RangesEnumsMissingAndConflicts) {
  EXPECT_EQ(ErrorOf("warmup_steps: -1\n"),
            "CFG-RANGE: c.yaml:2:15: `warmup_steps`: found -1, expected at least 0");
  EXPECT_THAT(ErrorOf("peak_lr: 11\n"), HasSubstr("found 11, expected at most 10"));
  EXPECT_THAT(ErrorOf("extra: {width: 0}\n"), HasSubstr("found 0, expected between 1 and 8192"));
  EXPECT_THAT(ErrorOf("shape: cosin\n"),
              HasSubstr("found `cosin`, expected one of cosine, linear; did you mean `cosine`?"));
  EXPECT_EQ(MessageOf(Read("flag: false\n").status()),
            "CFG-MISSING: c.yaml:1:1: `inner.width` is required and not written");
  EXPECT_THAT(MessageOf(Read("flag: false\ninner:\n").status()),
              HasSubstr("`inner.width` is required"));
  EXPECT_EQ(ErrorOf("flag: true\n"), "CFG-CONFLICT: c.yaml:2:7: `flag`: needs warmup_steps");
}

TEST(Config, AllErrorsInTheOrderOfTheFile) {
  EXPECT_EQ(
      ErrorOf("zzzzz: 1\npeak_lr: x\nwarmup_steps: -1\n", {"shape=x"}),
      "CFG-KEY: c.yaml:2:1: unknown key `zzzzz`; valid are: flag, warmup_steps, peak_lr, text, "
      "sizes, weights, "
      "words, limit, scale, note, shape, inner, extra, nothing, list, empties\n"
      "CFG-TYPE: c.yaml:3:10: `peak_lr`: found `x`, expected a finite number such as 0.5 or 3e-4\n"
      "CFG-RANGE: c.yaml:4:15: `warmup_steps`: found -1, expected at least 0\n"
      "CFG-RANGE: `--set shape=x`: `shape`: found `x`, expected one of cosine, linear");
}

TEST(Config, YamlFeaturesThatAreRefused) {
  EXPECT_THAT(ErrorOf("sizes: &a [1]\n"), HasSubstr("CFG-SYNTAX: c.yaml:2:8: anchors"));
  EXPECT_THAT(ErrorOf("text: *inner\n"), HasSubstr("CFG-SYNTAX"));
  EXPECT_THAT(ErrorOf("text: !!str x\n"), HasSubstr("tags are not supported"));
  EXPECT_THAT(ErrorOf("---\na: 1\n"), HasSubstr("second YAML document"));
  // yaml-cpp finds documents in this without end.
  const auto endless = ConfigDocument::Parse(",%ama\n", "c.yaml");
  EXPECT_THAT(MessageOf(endless.status()), HasSubstr("second YAML document"));
  EXPECT_THAT(ErrorOf("[1]: x\n"), HasSubstr("a key must be plain text"));
  EXPECT_THAT(ErrorOf("text: [a\n"), HasSubstr("CFG-SYNTAX: c.yaml:"));
  EXPECT_THAT(ErrorOf("\ttext: a\n"), HasSubstr("CFG-SYNTAX"));
  EXPECT_EQ(ErrorCodeOf(Read("- a\n").status()), "CFG-TYPE");
  EXPECT_EQ(ErrorCodeOf(Read("just text\n").status()), "CFG-TYPE");
  EXPECT_EQ(ErrorCodeOf(Read("").status()), "CFG-MISSING") << "an empty file is an empty mapping";
}

TEST(Config, Sets) {
  const Sample s = Read(std::string(kInner) + "list: [{width: 1}]\n",
                        {"inner.width=16", "extra.width=3", "list.0.name=x", "sizes=[7, 8]",
                         "text=a=b", "inner.width=32"})
                       .value();
  EXPECT_EQ(s.inner.width, 32) << "the last one counts";
  EXPECT_EQ(s.extra->width, 3) << "keys may be added";
  EXPECT_EQ(s.list[0].name, "x");
  EXPECT_THAT(s.sizes, ElementsAre(7, 8));
  EXPECT_EQ(s.text, "a=b");
  EXPECT_EQ(
      ErrorOf("", {"inner.width=0"}),
      "CFG-RANGE: `--set inner.width=0`: `inner.width`: found 0, expected between 1 and 8192");
  EXPECT_THAT(ErrorOf("", {"inner.widht=1"}),
              HasSubstr("`--set inner.widht=1`: unknown key `inner.widht`; did you mean `width`?"));
  for (const char* bad : {"flag", "=1", "a..b=1", "inner.width.x=1", "text=[a"}) {
    EXPECT_THAT(ErrorOf("", {bad}), HasSubstr("CFG-SET: `--set ")) << bad;
  }
  EXPECT_THAT(ErrorOf("list: [{width: 1}]\n", {"list.1.width=1"}),
              HasSubstr("`1` is no element of a list of 1"));
  EXPECT_THAT(ErrorOf("", {"text="}), HasSubstr("`--set text=`: `text`: found nothing"));
}

TEST(Config, EmittedTextReadsBackTheSame) {
  Sample s;
  s.flag = true;
  s.warmup_steps = -9223372036854775807 - 1;
  s.peak_lr = 0.1 + 0.2;
  s.text = "quotes \" and \\ and: # \n\ttab \xc3\xa9";
  s.weights = {1e-300, 5e300, 3, -0.0, 1.0 / 3};
  s.words = {"",    "null", "true", "12", "~",   "a b", "-x", "plain.word/1",
             "yes", "&a",   "*b",   "[",  "x: y"};
  s.scale = 2.5;
  s.note = "";
  s.shape = Shape::kLinear;
  s.extra = Inner{7, "seven"};
  s.list = {Inner{1, "a"}, Inner{2, "b c"}};
  s.empties.resize(2);
  const std::string text = EmitConfig(s);
  s.warmup_steps = 1;
  const std::string valid = EmitConfig(s);
  const auto read = Read(valid);
  ASSERT_TRUE(read.ok()) << read.status() << "\n" << valid;
  EXPECT_EQ(EmitConfig(*read), valid);
  EXPECT_EQ(read->text, s.text);
  EXPECT_EQ(read->peak_lr, s.peak_lr);
  EXPECT_EQ(read->weights, s.weights);
  EXPECT_TRUE(std::signbit(read->weights[3]));
  EXPECT_EQ(read->words, s.words);
  EXPECT_EQ(read->note, "");
  EXPECT_FALSE(read->limit.has_value());
  EXPECT_EQ(read->extra->name, "seven");
  EXPECT_EQ(read->list[1].name, "b c");
  EXPECT_EQ(read->empties.size(), 2U);
  EXPECT_THAT(text, HasSubstr("warmup_steps: -9223372036854775808\n"));
  EXPECT_THAT(text,
              HasSubstr("\nlist:\n  - width: 1\n    name: a\n  - width: 2\n    name: \"b c\"\n"));
  EXPECT_THAT(text, HasSubstr("\nnothing: {}\n"));
}

TEST(Config, LoadReadsAFile) {
  const TempDir dir;
  ASSERT_TRUE(WriteFileAtomically(dir / "c.yaml", std::string(kInner) + "oops: 1\n").ok());
  Sample sample;
  const Status status = BindConfig(ConfigDocument::Load(dir / "c.yaml").value(), &sample);
  EXPECT_THAT(MessageOf(status), HasSubstr(dir / "c.yaml:2:1"));
  EXPECT_EQ(ErrorCodeOf(ConfigDocument::Load(dir / "none").status()), "FILE-MISSING");
}

TEST(Config, ParseInteger) {
  EXPECT_EQ(ParseInteger("0"), 0);
  EXPECT_EQ(ParseInteger("-12"), -12);
  EXPECT_EQ(ParseInteger("+12"), 12);
  EXPECT_EQ(ParseInteger("010"), 10);
  EXPECT_EQ(ParseInteger("4K"), 4096);
  EXPECT_EQ(ParseInteger("-2M"), -2 * 1024 * 1024);
  EXPECT_EQ(ParseInteger("3G"), int64_t{3} << 30);
  EXPECT_EQ(ParseInteger("1T"), int64_t{1} << 40);
  for (const char* bad : {"", "K", "-", "+-1", "0.5M", "4k", "1KK", "1_", "1_K", "0x10", " 1"}) {
    EXPECT_FALSE(ParseInteger(bad).has_value()) << bad;
  }
}

TEST(Config, NearestWord) {
  EXPECT_EQ(NearestWord("warmup", {"peak_lr", "warmup_steps"}), "warmup_steps");
  EXPECT_EQ(NearestWord("sedd", {"seed", "need"}), "seed");
  EXPECT_THAT(NearestWord("xyz", {"alpha", "beta"}), IsEmpty());
}

}  // namespace
}  // namespace sala
