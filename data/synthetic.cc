#include "data/synthetic.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "core/file.h"
#include "core/rng.h"
#include "data/chat.h"
#include "data/puzzle.h"

namespace sala::data {
namespace {

Status ConfigError(const char* code, const std::string& text) {
  return MakeError(ExitCode::kConfig, code, text);
}

constexpr std::pair<RecallTask, const char*> kTasks[] = {
    {RecallTask::kPasskey, "passkey"},
    {RecallTask::kMultiKey, "niah_multikey"},
    {RecallTask::kTracking, "tracking"},
    {RecallTask::kSingle1, "niah_single_1"},
    {RecallTask::kSingle2, "niah_single_2"},
    {RecallTask::kSingle3, "niah_single_3"},
    {RecallTask::kMultiKey1, "niah_multikey_1"},
    {RecallTask::kMultiKey2, "niah_multikey_2"},
    {RecallTask::kMultiKey3, "niah_multikey_3"},
    {RecallTask::kMultiValue, "niah_multivalue"},
    {RecallTask::kMultiQuery, "niah_multiquery"},
    {RecallTask::kCommonWords, "common_words"},
    {RecallTask::kFrequentWords, "frequent_words"},
    {RecallTask::kKeyValue, "kv"}};

// A puzzle as text for one tokenizer.
class Composer {
 public:
  Composer(const RecallOptions& options, const Puzzle& puzzle, const Tokenizer& tokenizer)
      : options_(options), puzzle_(puzzle), tokenizer_(tokenizer) {}

  StatusOr<std::string> Prompt(const PuzzleText& text) const {
    if (!options_.chat) return text.context + "\n" + text.lead;
    SALA_ASSIGN_OR_RETURN(std::string prompt, RenderPrompt(ChatMl(), {{"user", text.context}}));
    return prompt + text.lead;
  }

  StatusOr<int64_t> Tokens(int64_t units) const {
    const PuzzleText text = puzzle_.Compose(units);
    SALA_ASSIGN_OR_RETURN(const std::string prompt, Prompt(text));
    // The answer alone in evaluation; a training document also has the end of its turn, or eos.
    const int64_t around =
        (tokenizer_.bos_id() >= 0 ? 1 : 0) + (options_.purpose == "eval" ? 0 : 3);
    return static_cast<int64_t>(tokenizer_.Encode(prompt + text.answer).size()) + around;
  }

  // The most units that fit, EVAL-LENGTH when one does not.
  StatusOr<int64_t> Fill() const {
    SALA_ASSIGN_OR_RETURN(const int64_t smallest, Tokens(1));
    if (smallest > options_.length_tokens) {
      return ConfigError("EVAL-LENGTH", std::string("task ") + NameOf(options_.task) +
                                            " of length " + std::to_string(options_.length_tokens) +
                                            ": prompt and answer with one unit of context need " +
                                            std::to_string(smallest) +
                                            " tokens; ask for a greater length");
    }
    int64_t low = 1;
    int64_t high = 2;
    const bool endless = puzzle_.available() == 0;
    const int64_t limit = endless ? options_.length_tokens : puzzle_.available();
    while (high <= limit) {
      SALA_ASSIGN_OR_RETURN(const int64_t tokens, Tokens(high));
      if (tokens > options_.length_tokens) break;
      low = high;
      high *= 2;
    }
    if (high > limit) {
      SALA_ASSIGN_OR_RETURN(const int64_t tokens, Tokens(limit));
      if (tokens <= options_.length_tokens && !endless) return TooSmall(tokens);
      high = std::max(limit, low + 1);
    }
    while (high - low > 1) {  // low fits, high does not
      const int64_t middle = low + (high - low) / 2;
      SALA_ASSIGN_OR_RETURN(const int64_t tokens, Tokens(middle));
      (tokens <= options_.length_tokens ? low : high) = middle;
    }
    return low;
  }

 private:
  StatusOr<int64_t> TooSmall(int64_t tokens) const {
    return ConfigError("EVAL-HAYSTACK", "the haystack of " + std::to_string(puzzle_.available()) +
                                            " sentences gives " + std::to_string(tokens) +
                                            " tokens, length " +
                                            std::to_string(options_.length_tokens) +
                                            " needs more; name a larger dataset");
  }

  const RecallOptions& options_;
  const Puzzle& puzzle_;
  const Tokenizer& tokenizer_;
};

Status CheckOptions(const RecallOptions& options) {
  constexpr int64_t kMostKeys = 41;  // places a needle can have
  if (options.keys < 1 || options.keys > kMostKeys) {
    return ConfigError("EVAL-TASK", "keys: found " + std::to_string(options.keys) +
                                        ", expected 1 to " + std::to_string(kMostKeys));
  }
  return OkStatus();
}

}  // namespace

const char* NameOf(RecallTask task) {
  for (const auto& [other, name] : kTasks) {
    if (other == task) return name;
  }
  return "";
}

std::vector<std::string> RecallTaskNames() {
  std::vector<std::string> names;
  for (const auto& [task, name] : kTasks) names.emplace_back(name);
  return names;
}

StatusOr<RecallTask> RecallTaskNamed(const std::string& name) {
  std::string all;
  for (const auto& [task, known] : kTasks) {
    if (name == known) return task;
    all += (all.empty() ? "" : ", ") + std::string(known);
  }
  return ConfigError("EVAL-TASK", "found task \"" + Printable(name) + "\", expected one of " + all);
}

bool WantsRunningText(RecallTask task) {
  return task == RecallTask::kSingle2 || task == RecallTask::kSingle3 ||
         task == RecallTask::kMultiKey1 || task == RecallTask::kMultiValue ||
         task == RecallTask::kMultiQuery;
}

StatusOr<RecallItem> MakeRecallItem(const RecallOptions& options, const Haystack& haystack,
                                    const Tokenizer& tokenizer, int64_t index) {
  SALA_RETURN_IF_ERROR(CheckOptions(options));
  if (options.chat) SALA_RETURN_IF_ERROR(CheckChatTokens(ChatMl(), tokenizer));
  const std::string name = options.purpose + "|" + std::to_string(options.seed) + "|" +
                           NameOf(options.task) + "|" + std::to_string(options.length_tokens) +
                           "|" + std::to_string(index);
  PhiloxStream rng(name);
  const bool words =
      options.task == RecallTask::kCommonWords || options.task == RecallTask::kFrequentWords;
  const std::unique_ptr<Puzzle> puzzle =
      words ? MakeWordPuzzle(options, name) : MakeNeedlePuzzle(options, haystack, name, rng);
  const Composer composer(options, *puzzle, tokenizer);
  RecallItem item;
  SALA_ASSIGN_OR_RETURN(item.units, composer.Fill());
  const PuzzleText text = puzzle->Compose(item.units);
  SALA_ASSIGN_OR_RETURN(item.prompt_text, composer.Prompt(text));
  item.answer_text = text.answer;
  item.depth = text.depth;
  const std::vector<int32_t> whole = tokenizer.Encode(item.prompt_text + item.answer_text);
  const std::vector<int32_t> prompt = tokenizer.Encode(item.prompt_text);
  if (prompt.size() >= whole.size() || !std::equal(prompt.begin(), prompt.end(), whole.begin())) {
    return ConfigError(
        "EVAL-BOUNDARY",
        std::string("task ") + NameOf(options.task) + ", item " + std::to_string(index) +
            ": with this tokenizer the answer does not start on a token, so it cannot be scored");
  }
  if (tokenizer.bos_id() >= 0) item.prompt.push_back(tokenizer.bos_id());
  item.prompt.insert(item.prompt.end(), prompt.begin(), prompt.end());
  item.answer.assign(whole.begin() + static_cast<std::ptrdiff_t>(prompt.size()), whole.end());
  return item;
}

}  // namespace sala::data
