#include "data/synthetic.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "core/rng.h"
#include "data/chat.h"

namespace sala::data {
namespace {

const char* const kFirstWords[] = {"amber",  "brisk",  "calm", "distant", "early", "faded",
                                   "gentle", "hollow", "idle", "keen",    "loud",  "mellow",
                                   "narrow", "odd",    "pale", "quiet"};
const char* const kSecondWords[] = {"anchor", "barrel", "candle",  "door",   "engine", "falcon",
                                    "garden", "harbor", "island",  "jacket", "kettle", "lantern",
                                    "meadow", "needle", "orchard", "pillar"};
constexpr uint64_t kDepthSteps = 40;  // needles lie at multiples of 1/40 of the context

Status ConfigError(const char* code, const std::string& text) {
  return MakeError(ExitCode::kConfig, code, text);
}

std::string Number(PhiloxStream& rng, uint64_t digits) {
  std::string text(1, static_cast<char>('1' + rng.Bounded(9)));
  for (uint64_t i = 1; i < digits; ++i) text += static_cast<char>('0' + rng.Bounded(10));
  return text;
}

std::string Letters(PhiloxStream& rng) {
  std::string text;
  for (int i = 0; i < 5; ++i) text += static_cast<char>('A' + rng.Bounded(26));
  return text;
}

// What a task hides and asks, before any haystack.
struct Riddle {
  std::string opening;               // before the context
  std::vector<std::string> needles;  // in the order of their depths
  std::vector<int64_t> steps;        // of kDepthSteps, rising
  size_t asked = 0;                  // the needle whose depth is reported
  std::string question;              // after the context
  std::string lead;                  // the first words of the answer
  std::string answer;                // with a space in front
};

std::vector<int64_t> Depths(PhiloxStream& rng, size_t count) {
  std::vector<int64_t> steps = rng.Permutation(kDepthSteps + 1);
  steps.resize(count);
  std::sort(steps.begin(), steps.end());
  return steps;
}

Riddle Passkey(PhiloxStream& rng) {
  const std::string key = Number(rng, 5);
  return {.opening = "There is a pass key in this text. Remember it.",
          .needles = {"The pass key is " + key + ". Remember it: " + key + " is the pass key."},
          .steps = Depths(rng, 1),
          .asked = 0,
          .question = "What is the pass key?",
          .lead = "The pass key is",
          .answer = " " + key};
}

Riddle MultiKey(PhiloxStream& rng, int64_t keys) {
  constexpr size_t kWords = std::size(kFirstWords);
  std::vector<int64_t> pairs = rng.Permutation(static_cast<int64_t>(kWords * kWords));
  Riddle riddle;
  riddle.opening = "Some things in this text have a number. Remember the numbers.";
  std::string asked_key;
  const size_t count = static_cast<size_t>(keys);
  riddle.asked = static_cast<size_t>(rng.Bounded(count));
  std::set<std::string> values;
  for (size_t i = 0; i < count; ++i) {
    const size_t pair = static_cast<size_t>(pairs[i]);
    const std::string key =
        std::string(kFirstWords[pair / kWords]) + " " + kSecondWords[pair % kWords];
    std::string value = Number(rng, 7);
    while (!values.insert(value).second) value = Number(rng, 7);
    riddle.needles.push_back("The number of the " + key + " is " + value + ".");
    if (i == riddle.asked) {
      asked_key = key;
      riddle.answer = " " + value;
    }
  }
  riddle.steps = Depths(rng, count);
  riddle.question = "What is the number of the " + asked_key + "?";
  riddle.lead = "The number of the " + asked_key + " is";
  return riddle;
}

Riddle Tracking(PhiloxStream& rng, int64_t chain) {
  Riddle riddle;
  std::set<std::string> used;
  const auto fresh = [&] {
    std::string name = Letters(rng);
    while (!used.insert(name).second) name = Letters(rng);
    return name;
  };
  const std::string example_first = fresh();
  const std::string example_second = fresh();
  const std::string example_value = Number(rng, 5);
  riddle.opening = "Variables are set in this text. For example: VAR " + example_first + " = " +
                   example_value + ". VAR " + example_second + " = VAR " + example_first +
                   ". The variables with the value " + example_value + " are " + example_first +
                   " " + example_second + ".";
  std::string value = Number(rng, 5);
  while (value == example_value) value = Number(rng, 5);
  std::string before;
  for (int64_t i = 0; i < chain; ++i) {
    const std::string name = fresh();
    riddle.needles.push_back("VAR " + name + " = " + (i == 0 ? value : "VAR " + before) + ".");
    riddle.answer += " " + name;
    before = name;
  }
  riddle.steps = Depths(rng, riddle.needles.size());
  riddle.question = "Which variables have the value " + value + ", directly or through others?";
  riddle.lead = "The variables with the value " + value + " are";
  return riddle;
}

// A riddle in `units` units of the haystack, as text for one tokenizer.
class Composer {
 public:
  Composer(const RecallOptions& options, const Riddle& riddle, const Haystack& haystack,
           const Tokenizer& tokenizer, uint64_t start)
      : options_(options),
        riddle_(riddle),
        haystack_(haystack),
        tokenizer_(tokenizer),
        start_(start) {}

  std::string Context(int64_t units) const {
    std::string text = riddle_.opening + "\n";
    size_t needle = 0;
    for (int64_t unit = 0; unit <= units; ++unit) {
      for (; needle < riddle_.needles.size() && LineOf(needle, units) == unit; ++needle)
        text += riddle_.needles[needle] + "\n";
      if (unit < units)
        text +=
            haystack_.units()[(start_ + static_cast<uint64_t>(unit)) % haystack_.units().size()] +
            "\n";
    }
    return text + riddle_.question;
  }

  // In front of which unit a needle stands.
  int64_t LineOf(size_t needle, int64_t units) const {
    return riddle_.steps[needle] * units / static_cast<int64_t>(kDepthSteps);
  }

  StatusOr<std::string> Prompt(int64_t units) const {
    if (!options_.chat) return Context(units) + "\n" + riddle_.lead;
    SALA_ASSIGN_OR_RETURN(std::string prompt, RenderPrompt(ChatMl(), {{"user", Context(units)}}));
    return prompt + riddle_.lead;
  }

  StatusOr<int64_t> Tokens(int64_t units) const {
    SALA_ASSIGN_OR_RETURN(const std::string prompt, Prompt(units));
    // The answer alone in evaluation; a training document also has the end of its turn, or eos.
    const int64_t around =
        (tokenizer_.bos_id() >= 0 ? 1 : 0) + (options_.purpose == "eval" ? 0 : 3);
    return static_cast<int64_t>(tokenizer_.Encode(prompt + riddle_.answer).size()) + around;
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
    const int64_t limit = haystack_.endless() ? options_.length_tokens
                                              : static_cast<int64_t>(haystack_.units().size());
    while (high <= limit) {
      SALA_ASSIGN_OR_RETURN(const int64_t tokens, Tokens(high));
      if (tokens > options_.length_tokens) break;
      low = high;
      high *= 2;
    }
    if (high > limit) {
      SALA_ASSIGN_OR_RETURN(const int64_t tokens, Tokens(limit));
      if (tokens <= options_.length_tokens && !haystack_.endless()) return TooSmall(tokens);
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
    return ConfigError("EVAL-HAYSTACK",
                       "the haystack of " + std::to_string(haystack_.units().size()) +
                           " sentences gives " + std::to_string(tokens) + " tokens, length " +
                           std::to_string(options_.length_tokens) +
                           " needs more; name a larger dataset");
  }

  const RecallOptions& options_;
  const Riddle& riddle_;
  const Haystack& haystack_;
  const Tokenizer& tokenizer_;
  uint64_t start_;
};

Status CheckOptions(const RecallOptions& options) {
  constexpr int64_t kMostKeys = kDepthSteps + 1;
  if (options.keys < 1 || options.keys > kMostKeys) {
    return ConfigError("EVAL-TASK", "keys: found " + std::to_string(options.keys) +
                                        ", expected 1 to " + std::to_string(kMostKeys));
  }
  return OkStatus();
}

}  // namespace

const char* NameOf(RecallTask task) {
  switch (task) {
    case RecallTask::kPasskey:
      return "passkey";
    case RecallTask::kMultiKey:
      return "niah_multikey";
    case RecallTask::kTracking:
      return "tracking";
  }
  return "";
}

StatusOr<RecallTask> RecallTaskNamed(const std::string& name) {
  for (const RecallTask task :
       {RecallTask::kPasskey, RecallTask::kMultiKey, RecallTask::kTracking}) {
    if (name == NameOf(task)) return task;
  }
  return ConfigError("EVAL-TASK",
                     "found task \"" + name + "\", expected passkey, niah_multikey or tracking");
}

StatusOr<RecallItem> MakeRecallItem(const RecallOptions& options, const Haystack& haystack,
                                    const Tokenizer& tokenizer, int64_t index) {
  SALA_RETURN_IF_ERROR(CheckOptions(options));
  if (options.chat) SALA_RETURN_IF_ERROR(CheckChatTokens(ChatMl(), tokenizer));
  PhiloxStream rng(options.purpose + "|" + std::to_string(options.seed) + "|" +
                   NameOf(options.task) + "|" + std::to_string(options.length_tokens) + "|" +
                   std::to_string(index));
  const uint64_t start = rng.Bounded(haystack.units().size());
  const Riddle riddle = options.task == RecallTask::kPasskey    ? Passkey(rng)
                        : options.task == RecallTask::kMultiKey ? MultiKey(rng, options.keys)
                                                                : Tracking(rng, options.keys);
  const Composer composer(options, riddle, haystack, tokenizer, start);
  RecallItem item;
  SALA_ASSIGN_OR_RETURN(item.units, composer.Fill());
  SALA_ASSIGN_OR_RETURN(item.prompt_text, composer.Prompt(item.units));
  item.answer_text = riddle.answer;
  item.depth = static_cast<double>(composer.LineOf(riddle.asked, item.units)) /
               static_cast<double>(item.units);
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
