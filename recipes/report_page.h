// The page of `sala report`: one HTML file without anything to load, light and dark by the reader's
// setting.
#pragma once

#include <string>

#include "recipes/report_data.h"

namespace sala::recipes {

// `refresh_seconds` above 0: the page loads itself again while the run is live.
std::string ReportPage(const ReportData& data, int64_t refresh_seconds = 0);

// Parts of it (recipes/report_sections.cc, report_style.cc). "" where there is nothing to show.
std::string TrainingSection(const ReportData& data);
std::string HaloSection(const ReportData& data);
std::string EvaluationSection(const ReportData& data);
std::string GateSection(const ReportData& data);
extern const char kReportStyle[];
extern const char kReportScript[];

// <section> with a heading and a sentence below it; "" when `body` is.
std::string ReportSection(const std::string& title, const std::string& lead,
                          const std::string& body);

}  // namespace sala::recipes
