// Needles between the lines of a context (data/puzzle.h).
#include <algorithm>
#include <cstdio>
#include <functional>
#include <set>
#include <utility>

#include "data/puzzle.h"

namespace sala::data {
namespace {

const char* const kFirstWords[] = {"amber",  "brisk",  "calm", "distant", "early", "faded",
                                   "gentle", "hollow", "idle", "keen",    "loud",  "mellow",
                                   "narrow", "odd",    "pale", "quiet"};
const char* const kSecondWords[] = {"anchor", "barrel", "candle",  "door",   "engine", "falcon",
                                    "garden", "harbor", "island",  "jacket", "kettle", "lantern",
                                    "meadow", "needle", "orchard", "pillar"};
constexpr size_t kWords = std::size(kFirstWords);
constexpr int64_t kPairs = kWords * kWords;
constexpr uint64_t kDepthSteps = 40;  // needles lie at multiples of 1/40 of the context

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

// 128 random bits in the usual form: no two are ever the same.
std::string Uuid(PhiloxStream& rng) {
  char digits[33];
  const auto high = static_cast<unsigned long long>(rng.NextU64());
  const auto low = static_cast<unsigned long long>(rng.NextU64());
  std::snprintf(digits, sizeof(digits), "%016llx%016llx", high, low);
  const std::string text = digits;
  return text.substr(0, 8) + "-" + text.substr(8, 4) + "-" + text.substr(12, 4) + "-" +
         text.substr(16, 4) + "-" + text.substr(20);
}

std::string PairOfWords(int64_t pair) {
  return std::string(kFirstWords[static_cast<size_t>(pair) / kWords]) + " " +
         kSecondWords[static_cast<size_t>(pair) % kWords];
}

// What a task hides and asks, before any context.
struct Riddle {
  std::string opening;               // before the context
  std::vector<std::string> needles;  // in the order of their depths
  std::vector<int64_t> steps;        // of kDepthSteps, rising
  size_t asked = 0;                  // the needle whose depth is reported
  std::string question;              // after the context
  std::string lead;                  // the first words of the answer
  std::string answer;                // with a space in front
  std::string join = "\n";           // between the lines of the context
};

// One line of the context behind the other.
struct Lines {
  std::function<std::string(int64_t unit)> at;
  int64_t available = 0;  // 0: without end
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
  std::vector<int64_t> pairs = rng.Permutation(kPairs);
  Riddle riddle;
  riddle.opening = "Some things in this text have a number. Remember the numbers.";
  std::string asked_key;
  const size_t count = static_cast<size_t>(keys);
  riddle.asked = static_cast<size_t>(rng.Bounded(count));
  std::set<std::string> values;
  for (size_t i = 0; i < count; ++i) {
    const std::string key = PairOfWords(pairs[i]);
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

std::string CodeLine(const std::string& key, const std::string& value) {
  return "The code of " + key + " is " + value + ".";
}

Riddle SingleUuid(PhiloxStream& rng) {
  const std::string key = PairOfWords(static_cast<int64_t>(rng.Bounded(kPairs)));
  const std::string value = Uuid(rng);
  return {.opening = "Something in this text has a code. Remember the code.",
          .needles = {CodeLine("the " + key, value)},
          .steps = Depths(rng, 1),
          .asked = 0,
          .question = "What is the code of the " + key + "?",
          .lead = "The code of the " + key + " is",
          .answer = " " + value};
}

Riddle MultiValue(PhiloxStream& rng, int64_t count) {
  const std::string key = PairOfWords(static_cast<int64_t>(rng.Bounded(kPairs)));
  Riddle riddle;
  riddle.opening = "Something in this text has several numbers. Remember all of them.";
  std::set<std::string> values;
  for (int64_t i = 0; i < count; ++i) {
    std::string value = Number(rng, 7);
    while (!values.insert(value).second) value = Number(rng, 7);
    riddle.needles.push_back("One of the numbers of the " + key + " is " + value + ".");
    riddle.answer += (i == 0 ? " " : ", ") + value;
  }
  riddle.steps = Depths(rng, static_cast<size_t>(count));
  riddle.question =
      "What are all the numbers of the " + key + ", in the order in which they appear?";
  riddle.lead = "The numbers of the " + key + " are";
  return riddle;
}

Riddle MultiQuery(PhiloxStream& rng, int64_t keys) {
  Riddle riddle;
  const std::vector<int64_t> pairs = rng.Permutation(kPairs);
  std::vector<std::string> values;
  std::set<std::string> used;
  for (int64_t i = 0; i < keys; ++i) {
    std::string value = Number(rng, 7);
    while (!used.insert(value).second) value = Number(rng, 7);
    riddle.needles.push_back("The number of the " + PairOfWords(pairs[static_cast<size_t>(i)]) +
                             " is " + value + ".");
    values.push_back(value);
  }
  riddle.opening = "Some things in this text have a number. Remember the numbers.";
  riddle.steps = Depths(rng, static_cast<size_t>(keys));
  const std::vector<int64_t> order = rng.Permutation(keys);  // of the question
  riddle.asked = static_cast<size_t>(order[0]);
  std::string things;
  for (size_t i = 0; i < order.size(); ++i) {
    const auto needle = static_cast<size_t>(order[i]);
    things += (i == 0                  ? "the "
               : i + 1 == order.size() ? " and the "
                                       : ", the ") +
              PairOfWords(pairs[needle]);
    riddle.answer += (i == 0 ? " " : ", ") + values[needle];
  }
  riddle.question = "What are the numbers of " + things + ", in this order?";
  riddle.lead = "The numbers of " + things + " are";
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

// niah_multikey_2: words and numbers among nothing but others of the kind. All keys differ: one
// round of the pairs is kept for the key asked for and 255 others, further rounds are numbered.
Riddle AmongWords(const std::string& name, PhiloxStream& rng, Lines* lines) {
  const std::vector<int64_t> pairs = rng.Permutation(kPairs);
  const std::string key = PairOfWords(pairs[0]);
  const std::string value = Number(rng, 7);
  lines->at = [name, pairs, value](int64_t unit) {
    constexpr int64_t kOthers = kPairs - 1;
    std::string other = PairOfWords(pairs[static_cast<size_t>(1 + unit % kOthers)]);
    if (unit >= kOthers) other += " number " + std::to_string(unit / kOthers + 1);
    PhiloxStream own(name + "|line|" + std::to_string(unit));
    std::string number = Number(own, 7);
    while (number == value) number = Number(own, 7);
    return CodeLine("the " + other, number);
  };
  return {.opening = "Many things in this text have a code. Remember the codes.",
          .needles = {CodeLine("the " + key, value)},
          .steps = Depths(rng, 1),
          .asked = 0,
          .question = "What is the code of the " + key + "?",
          .lead = "The code of the " + key + " is",
          .answer = " " + value};
}

std::pair<std::string, std::string> UuidPair(const std::string& name, int64_t unit) {
  PhiloxStream own(name + "|line|" + std::to_string(unit));
  std::string key = Uuid(own);
  return {std::move(key), Uuid(own)};
}

std::string JsonLine(const std::string& key, const std::string& value) {
  return "\"" + key + "\": \"" + value + "\"";
}

// A pair of UUIDs among lines of other such pairs; the words around it are the caller's.
std::pair<Riddle, std::string> UuidRiddle(const std::string& name, PhiloxStream& rng, Lines* lines,
                                          std::string (*line)(const std::string&,
                                                              const std::string&)) {
  const std::string key = Uuid(rng);
  const std::string value = Uuid(rng);
  lines->at = [name, line](int64_t unit) {
    const auto [other, code] = UuidPair(name, unit);
    return line(other, code);
  };
  Riddle riddle;
  riddle.needles = {line(key, value)};
  riddle.steps = Depths(rng, 1);
  riddle.answer = " " + value;
  return {std::move(riddle), key};
}

Riddle AmongUuids(const std::string& name, PhiloxStream& rng, Lines* lines) {
  auto [riddle, key] = UuidRiddle(name, rng, lines, &CodeLine);
  riddle.opening = "This text is a list of codes. Remember them.";
  riddle.question = "What is the code of " + key + "?";
  riddle.lead = "The code of " + key + " is";
  return std::move(riddle);
}

Riddle KeyValue(const std::string& name, PhiloxStream& rng, Lines* lines) {
  auto [riddle, key] = UuidRiddle(name, rng, lines, &JsonLine);
  riddle.opening = "This is a JSON object with keys and values.\n{";
  riddle.question = "}\nWhich value has the key " + key + "?";
  riddle.lead = "The value of the key " + key + " is";
  riddle.join = ",\n";
  return std::move(riddle);
}

class NeedlePuzzle : public Puzzle {
 public:
  NeedlePuzzle(Riddle riddle, Lines lines) : riddle_(std::move(riddle)), lines_(std::move(lines)) {}

  int64_t available() const override { return lines_.available; }

  PuzzleText Compose(int64_t units) const override {
    std::string text = riddle_.opening + "\n";
    const char* join = "";
    const auto add = [&](const std::string& line) {
      text += join + line;
      join = riddle_.join.c_str();
    };
    size_t needle = 0;
    for (int64_t unit = 0; unit <= units; ++unit) {
      for (; needle < riddle_.needles.size() && LineOf(needle, units) == unit; ++needle)
        add(riddle_.needles[needle]);
      if (unit < units) add(lines_.at(unit));
    }
    return {
        .context = text + "\n" + riddle_.question,
        .lead = riddle_.lead,
        .answer = riddle_.answer,
        .depth = static_cast<double>(LineOf(riddle_.asked, units)) / static_cast<double>(units)};
  }

 private:
  // In front of which unit a needle stands.
  int64_t LineOf(size_t needle, int64_t units) const {
    return riddle_.steps[needle] * units / static_cast<int64_t>(kDepthSteps);
  }

  Riddle riddle_;
  Lines lines_;
};

Riddle MakeRiddle(const RecallOptions& options, const std::string& name, PhiloxStream& rng,
                  Lines* lines) {
  switch (options.task) {
    case RecallTask::kMultiKey:
    case RecallTask::kMultiKey1:
      return MultiKey(rng, options.keys);
    case RecallTask::kSingle1:
    case RecallTask::kSingle2:
      return MultiKey(rng, 1);
    case RecallTask::kSingle3:
      return SingleUuid(rng);
    case RecallTask::kMultiKey2:
      return AmongWords(name, rng, lines);
    case RecallTask::kMultiKey3:
      return AmongUuids(name, rng, lines);
    case RecallTask::kMultiValue:
      return MultiValue(rng, options.keys);
    case RecallTask::kMultiQuery:
      return MultiQuery(rng, options.keys);
    case RecallTask::kTracking:
      return Tracking(rng, options.keys);
    case RecallTask::kKeyValue:
      return KeyValue(name, rng, lines);
    case RecallTask::kPasskey:
    case RecallTask::kCommonWords:
    case RecallTask::kFrequentWords:
      break;
  }
  return Passkey(rng);
}

}  // namespace

std::unique_ptr<Puzzle> MakeNeedlePuzzle(const RecallOptions& options, const Haystack& haystack,
                                         const std::string& name, PhiloxStream& rng) {
  const uint64_t start = rng.Bounded(haystack.units().size());
  Lines lines = {
      .at =
          [&haystack, start](int64_t unit) {
            return haystack
                .units()[(start + static_cast<uint64_t>(unit)) % haystack.units().size()];
          },
      .available = haystack.endless() ? 0 : static_cast<int64_t>(haystack.units().size())};
  Lines own;
  Riddle riddle = MakeRiddle(options, name, rng, &own);
  return std::make_unique<NeedlePuzzle>(std::move(riddle), std::move(own.at ? own : lines));
}

}  // namespace sala::data
