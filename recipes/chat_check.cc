#include "recipes/chat_check.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "core/log.h"
#include "data/chat_sample.h"
#include "data/plan.h"

namespace sala::recipes {
namespace {

// Enough to tell a mask that is wrong from a document that happens to be all prompt.
constexpr int64_t kSamplesOfView = 32;
// Below this share training mostly reads: a mask on one token of a long answer, or tool output
// without end.
constexpr double kLeastShare = 0.01;

std::string Percent(double share) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f %%", 100 * share);
  return text;
}

}  // namespace

Status CheckLearned(const data::SampleStream& stream, const std::string& stage, bool warns) {
  for (const auto& view : stream.views()) {
    const int64_t count = std::min(kSamplesOfView, view->samples_per_epoch());
    int64_t tokens = 0;
    int64_t learned = 0;
    for (int64_t k = 0; k < count; ++k) {
      const data::ViewSample sample = view->Sample(k);
      for (const data::DocumentRun& run : sample.runs) tokens += run.length;
      SALA_ASSIGN_OR_RETURN(const int64_t targets,
                            data::CountTargets(*view, sample, stream.config().document_mask));
      learned += targets;
    }
    const std::string what = "view " + view->name() + " of stage " + stage + ": of the " +
                             std::to_string(tokens) + " tokens of its first " +
                             std::to_string(count) + " samples ";
    if (learned == 0) {
      return MakeError(ExitCode::kData, "CHAT-NOMASK",
                       what +
                           "none is learned; look at `sala data show DATASET --doc 0 --tokenizer "
                           "T`, and whether long_documents: truncate cuts the answers off");
    }
    const double share = static_cast<double>(learned) / static_cast<double>(tokens);
    if (warns && share < kLeastShare) {
      SALA_LOG(Warn) << what << "only " << learned << " (" << Percent(share)
                     << ") are learned; is the mask what it should be?";
    }
  }
  return OkStatus();
}

Status LogFirstChat(data::SampleStream& stream, const std::string& stage,
                    const data::Tokenizer& tokenizer) {
  constexpr int64_t kRunBytes = 600;
  constexpr int64_t kMostBytes = 4000;
  SALA_ASSIGN_OR_RETURN(const data::PackedSample sample, stream.Get(0));
  const data::SegmentMeta& first = sample.segments.front();
  const auto length = static_cast<size_t>(first.length);
  const std::vector<int32_t> tokens(sample.tokens.begin(), sample.tokens.begin() + first.length);
  std::vector<uint8_t> learned(length, 0);
  for (size_t t = 1; t < length; ++t) learned[t] = sample.labels[t - 1] >= 0 ? 1 : 0;
  const auto count = std::count(learned.begin(), learned.end(), uint8_t{1});
  const std::string head = "stage " + stage + ": its first document, " + std::to_string(length) +
                           " tokens, " + std::to_string(count) + " learned (" +
                           Percent(static_cast<double>(count) / static_cast<double>(length)) +
                           ", marked): ";
  const auto text = [&](const data::LearnedMarks& marks) {
    return head + data::MarkedText(tokenizer, tokens, learned, marks, kRunBytes, kMostBytes);
  };
  if (isatty(STDERR_FILENO) == 1) {
    PrintPlainLine(text(data::ColouredMarks()));
    SALA_LOG(Debug) << text({});  // the file of the run has it without colours
  } else {
    SALA_LOG(Info) << text({});
  }
  return OkStatus();
}

}  // namespace sala::recipes
