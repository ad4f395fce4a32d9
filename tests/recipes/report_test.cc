// What sala report reads and draws: lines of metrics, scales, escaping, the page.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "core/file.h"
#include "recipes/dashboards.h"
#include "recipes/report_page.h"
#include "recipes/report_svg.h"
#include "tests/core/temp_dir.h"

namespace sala::recipes {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Report, LeavesOutHalfLinesAndSaysWhatIsBroken) {
  std::vector<std::string> notes;
  const auto lines =
      ParseJsonLines("{\"step\":1}\n\n{\"st\n[1]\n{\"step\":2}\n{\"step\":3", "x.jsonl", &notes);
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines[1]["step"], 2);
  EXPECT_THAT(notes, ElementsAre("x.jsonl: 2 lines are no JSON objects; left out"));
}

TEST(Report, TakesTheLastLineOfAStepBehindTheLastStart) {
  const auto line = [](int step, double loss) {
    return json{{"step", step}, {"stage", "a"}, {"loss", loss}};
  };
  std::vector<int64_t> resumes;
  const auto counting = LinesThatCount({{{"event", "start"}, {"step", 0}},
                                        line(1, 1),
                                        line(2, 2),
                                        line(3, 3),
                                        {{"event", "resume"}, {"step", 1}},
                                        line(2, 4),
                                        {{"step", -1}, {"stage", "a"}}},
                                       &resumes);
  ASSERT_EQ(counting.size(), 2U);  // step 3 was taken back and has not come again
  EXPECT_EQ(counting[0]["loss"], 1);
  EXPECT_EQ(counting[1]["loss"], 4);
  EXPECT_THAT(resumes, ElementsAre(1));
}

TEST(ReportScale, TicksAreRoundAndCoverTheValues) {
  EXPECT_THAT(NiceTicks(0, 10, 5), ElementsAre(0, 2, 4, 6, 8, 10));
  EXPECT_THAT(NiceTicks(3, 3, 4), Not(ElementsAre()));
  for (const double low : {-7.3, 0.0, 0.00012, 41.0, 1.2e9}) {
    for (const double width : {1e-6, 0.3, 1.0, 77.0, 5e8}) {
      const auto ticks = NiceTicks(low, low + width, 5);
      EXPECT_LE(ticks.front(), low + 1e-9 * width);
      EXPECT_GE(ticks.back(), (low + width) - 1e-6 * width);
      EXPECT_GE(ticks.size(), 3U);
      EXPECT_LE(ticks.size(), 11U);
    }
  }
  // Neighbours among the numbers of float64: adding one spacing must still move.
  EXPECT_LE(NiceTicks(1e17, 1e17 + 16, 5).size(), 11U);
  EXPECT_THAT(LogTicks(0.03, 40), ElementsAre(0.01, 0.1, 1, 10, 100));
  EXPECT_LE(LogTicks(0.3, 0.4).front(), 0.3);
  EXPECT_GE(LogTicks(0.3, 0.4).back(), 0.4);
}

TEST(ReportScale, NumbersAreAsShortAsTheirSpacingAllows) {
  EXPECT_EQ(TickText(0.25, 0.05), "0.25");
  EXPECT_EQ(TickText(0.5, 0.1), "0.5");
  EXPECT_EQ(TickText(1500, 500), "1,500");
  EXPECT_EQ(TickText(-123456, 1), "-123,456");
  EXPECT_EQ(TickText(2e-5, 1e-5), "2e-05");
  EXPECT_EQ(TickText(1.2e6, 2e5), "1.2M");
  EXPECT_EQ(TickText(0, 0.1), "0");
  EXPECT_EQ(TickText(std::nan(""), 1), "-");
}

TEST(ReportScale, FewerPointsKeepTheSpikes) {
  std::vector<PlotPoint> points;
  points.reserve(10000);
  for (int i = 0; i < 10000; ++i)
    points.push_back({static_cast<double>(i), i == 4711 ? 99.0 : i == 8000 ? -5.0 : 1.0});
  points[17].y = std::nan("");
  const auto fewer = Downsample(points, 100);
  EXPECT_LE(fewer.size(), 400U);
  double most = 0;
  double least = 0;
  for (size_t i = 0; i < fewer.size(); ++i) {
    most = std::max(most, fewer[i].y);
    least = std::min(least, fewer[i].y);
    EXPECT_TRUE(i == 0 || fewer[i - 1].x < fewer[i].x) << i;
  }
  EXPECT_EQ(most, 99);
  EXPECT_EQ(least, -5);
  EXPECT_EQ(fewer.front().x, 0);
  EXPECT_EQ(fewer.back().x, 9999);
}

constexpr char kHostile[] = "</script><script>alert('x')</script>\"&\x01\xff";

TEST(ReportPage, EscapesWhatFilesSay) {
  EXPECT_EQ(EscapeHtml(kHostile),
            "&lt;/script&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&quot;&amp;"
            "\xEF\xBF\xBD\xEF\xBF\xBD");
  ReportData data;
  data.directory = data.name = kHostile;
  data.status = {{"state", kHostile}, {"stage", kHostile}, {"step", 2}};
  data.environment = {{kHostile, kHostile}};
  data.stages = {{.name = kHostile, .kind = kHostile, .steps = 2, .first = 1, .last = 2}};
  for (const int step : {1, 2})
    data.train.push_back({{"step", step},
                          {"stage", kHostile},
                          {"phase", kHostile},
                          {"loss", 1},
                          {"lr", 0.1},
                          {"grad_norm", 2},
                          {"step_ms", 3},
                          {"data_ms", 0},
                          {"forward_ms", 1},
                          {"loss_ms", 0},
                          {"backward_ms", 1},
                          {"optim_ms", 0}});
  data.validation = {{{"step", 1}, {"stage", kHostile}, {"phase", "train"}, {"loss", 1}}};
  data.gates = {{{"stage", kHostile}, {"mixers", {kHostile}}, {"means", {0.5}}}};
  data.selection = {{"selector", kHostile},
                    {"softmax_layers", {0, kHostile}},
                    {"scores", {{"layers", {{{"keep_score", 1}}}}}}};
  data.evaluations = {{{"task", kHostile},
                       {"stage", kHostile},
                       {"when", kHostile},
                       {"length", 8},
                       {"step", 1},
                       {"depths", {{{"from", 0}, {"to", 1}, {"right", 1}, {"count", 2}}}}},
                      {{"task", "loss_by_position"},
                       {"stage", kHostile},
                       {"when", kHostile},
                       {"length", 8},
                       {"buckets", {{{"from", 0}, {"to", 1}, {"loss", 1}}}}}};
  data.checkpoints = {{.name = kHostile, .stage = kHostile}};
  data.warnings = data.notes = {kHostile};
  data.configuration = {{kHostile, kHostile}};
  const std::string page = ReportPage(data);
  EXPECT_THAT(page, Not(HasSubstr("alert('x')")));
  EXPECT_THAT(page, Not(HasSubstr("<script>alert")));
  EXPECT_THAT(page, HasSubstr("Recall"));
  EXPECT_THAT(page, HasSubstr("Loss by position"));
  EXPECT_THAT(page, HasSubstr("Output gates"));
  EXPECT_THAT(page, Not(HasSubstr("http-equiv")));
  EXPECT_THAT(ReportPage(data, 5), HasSubstr("content=\"5\""));  // its state is not an end
  data.status["state"] = "done";
  EXPECT_THAT(ReportPage(data, 5), Not(HasSubstr("http-equiv")));
}

TEST(Report, SaysWhichLayersWereForced) {
  ReportData data;
  data.selection = {{"selector", "halo"}, {"softmax_layers", {0, 3, 7}}, {"forced", {0, 7}}};
  EXPECT_THAT(ReportPage(data),
              HasSubstr("keeps softmax in layers 0, 3, 7, layers 0, 7 by decision (halo.keep)."));
  data.selection = {{"selector", "kl"}, {"softmax_layers", {2}}, {"forced", {kHostile}}};
  EXPECT_THAT(ReportPage(data), HasSubstr("keeps softmax in layer 2."));
}

TEST(Report, RefusesWhatIsNoRunAndNotesWhatIsBroken) {
  const TempDir dir;
  EXPECT_EQ(ErrorCodeOf(ReadReportData(dir.path() + "/none").status()), "FILE-MISSING");
  const auto no_run = ReadReportData(dir.path());
  EXPECT_EQ(ErrorCodeOf(no_run.status()), "RUN-NONE");
  EXPECT_EQ(ExitCodeOf(no_run.status()), ExitCode::kNoInput);
  ASSERT_TRUE(WriteFileAtomically(dir.path() + "/status.json", "{\"state\":").ok());
  ASSERT_TRUE(WriteFileAtomically(dir.path() + "/config.yaml", "kind: nonsense\n").ok());
  const auto broken = ReadReportData(dir.path());
  ASSERT_TRUE(broken.ok()) << broken.status();
  EXPECT_EQ(broken->notes.size(), 2U);
  EXPECT_THAT(ReportPage(*broken), HasSubstr("status.json: is no JSON"));
}

TEST(Dashboards, TagsAreGroupedByStage) {
  const nlohmann::ordered_json line = {{"step", 3},    {"stage", "halo"}, {"phase", "align"},
                                       {"time", 9},    {"loss", 2.5},     {"skipped", false},
                                       {"kl", nullptr}};
  EXPECT_THAT(ScalarsOf(line), ElementsAre(std::pair("halo/align/loss", 2.5)));
  EXPECT_THAT(ScalarsOf({{"stage", "base"}, {"phase", "train"}, {"loss", 1}}, "validation"),
              ElementsAre(std::pair("base/validation/loss", 1.0)));
  EXPECT_THAT(ScalarsOf({{"event", "resume"}, {"step", 3}}), ElementsAre());
  EXPECT_THAT(EvaluationScalars({{"task", "passkey"},
                                 {"length", 1024},
                                 {"when", "after"},
                                 {"stage", "s"},
                                 {"share", 0.5}}),
              ElementsAre(std::pair("s/eval/passkey 1024 after/share", 0.5)));
}

// A file that appears after the start of the run is shown once.
TEST(Dashboards, WritesEvaluationsOnce) {
  const TempDir dir;
  RunConfig run;
  run.dir = dir.path();
  const auto add = [&](const std::string& name) {
    ASSERT_TRUE(MakeDirectories(dir.path() + "/eval/" + name).ok());
    ASSERT_TRUE(WriteFileAtomically(dir.path() + "/eval/" + name + "/summary.jsonl",
                                    "{\"task\":\"" + name +
                                        "\",\"stage\":\"s\",\"when\":\"after\","
                                        "\"length\":8,\"step\":4,\"share\":1}\nnonsense\n")
                    .ok());
  };
  add("old");
  Dashboards dashboards(run, "r", "host");
  ASSERT_TRUE(dashboards.Start(1).ok());
  add("new");
  ASSERT_TRUE(dashboards.Evaluations().ok());
  ASSERT_TRUE(dashboards.Evaluations().ok());
  const auto files = ListDirectory(dir.path() + "/tb").value();
  ASSERT_EQ(files.size(), 1U);
  const std::string bytes = ReadFile(dir.path() + "/tb/" + files[0]).value();
  EXPECT_EQ(bytes.find("eval/old"), std::string::npos);
  EXPECT_NE(bytes.find("eval/new"), std::string::npos);
  EXPECT_EQ(bytes.find("eval/new"), bytes.rfind("eval/new"));
}

}  // namespace
}  // namespace sala::recipes
