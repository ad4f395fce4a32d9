// Counting words (data/puzzle.h).
#include <algorithm>
#include <set>
#include <vector>

#include "data/puzzle.h"

namespace sala::data {
namespace {

constexpr char kConsonants[] = "bdfghklmnprstv";
constexpr char kVowels[] = "aeiou";

// Made-up words of three syllables, all different: the word number k is the same whatever was asked
// before.
class Words {
 public:
  explicit Words(const std::string& name) : rng_(name + "|words") {}

  const std::string& At(size_t k) {
    while (words_.size() <= k) {
      std::string word;
      for (int syllable = 0; syllable < 3; ++syllable) {
        word += kConsonants[rng_.Bounded(sizeof(kConsonants) - 1)];
        word += kVowels[rng_.Bounded(sizeof(kVowels) - 1)];
      }
      // 343,000 words exist; past half of them drawing new ones would take long, so longer ones.
      if (used_.size() > 150000) word += std::to_string(used_.size());
      if (used_.insert(word).second) words_.push_back(word);
    }
    return words_[k];
  }

 private:
  PhiloxStream rng_;
  std::set<std::string> used_;
  std::vector<std::string> words_;
};

// Indices, each as often as its count says, in drawn order.
std::vector<size_t> Shuffled(const std::vector<int64_t>& counts, const std::string& stream) {
  std::vector<size_t> all;
  for (size_t k = 0; k < counts.size(); ++k)
    all.insert(all.end(), static_cast<size_t>(counts[k]), k);
  PhiloxStream rng(stream);
  std::vector<size_t> order;
  order.reserve(all.size());
  for (const int64_t i : rng.Permutation(static_cast<int64_t>(all.size())))
    order.push_back(all[static_cast<size_t>(i)]);
  return order;
}

class CommonWords : public Puzzle {
 public:
  CommonWords(std::string name, bool is_short)
      : name_(std::move(name)), words_(name_), often_(is_short ? 6 : 30), rare_(is_short ? 1 : 3) {}

  PuzzleText Compose(int64_t units) const override {
    std::vector<int64_t> counts(kCommon, often_);
    counts.resize(kCommon + static_cast<size_t>(units), rare_);
    PuzzleText text;
    text.context = "Some words stand in this list more often than others. Remember them.\n";
    std::set<size_t> seen;
    int64_t number = 0;
    for (const size_t word : Shuffled(counts, name_ + "|order|" + std::to_string(units))) {
      text.context += std::to_string(++number) + ". " + words_.At(word) + "\n";
      if (word < kCommon && seen.insert(word).second) text.answer += " " + words_.At(word);
    }
    text.context +=
        "Which ten words stand in the list most often, in the order in which they first appear?";
    text.lead = "The ten words are";
    return text;
  }

 private:
  static constexpr size_t kCommon = 10;
  std::string name_;
  mutable Words words_;
  int64_t often_, rare_;
};

class FrequentWords : public Puzzle {
 public:
  explicit FrequentWords(std::string name) : name_(std::move(name)), words_(name_) {}

  PuzzleText Compose(int64_t units) const override {
    constexpr double kZeta2 = 1.6449340668482264;  // sum of 1 / k^2
    const int64_t total = kFewest + units;
    std::vector<int64_t> counts;
    int64_t left = total;
    for (int64_t rank = 1;; ++rank) {
      const auto count = static_cast<int64_t>(static_cast<double>(total) /
                                              (kZeta2 * static_cast<double>(rank * rank)));
      if (count < 1) break;
      counts.push_back(count);
      left -= count;
    }
    counts.resize(counts.size() + static_cast<size_t>(left), 1);  // the tail: words that come once
    PuzzleText text;
    text.context = "Count how often each word stands in this text. Leave out the dots.\n";
    const char* space = "";
    for (const size_t word : Shuffled(counts, name_ + "|order|" + std::to_string(units))) {
      text.context += space + (word == 0 ? std::string("...") : words_.At(word));
      space = " ";
    }
    text.context += "\nWhich three words stand in the text most often, the most frequent first?";
    text.lead = "The three words are";
    text.answer = " " + words_.At(1) + " " + words_.At(2) + " " + words_.At(3);
    return text;
  }

 private:
  // From here on ranks 2, 3, 4 and 5 have different counts: 9, 4, 2 and 1 of 60.
  static constexpr int64_t kFewest = 59;
  std::string name_;
  mutable Words words_;
};

}  // namespace

std::unique_ptr<Puzzle> MakeWordPuzzle(const RecallOptions& options, const std::string& name) {
  constexpr int64_t kShort = 4096;
  if (options.task == RecallTask::kCommonWords)
    return std::make_unique<CommonWords>(name, options.length_tokens < kShort);
  return std::make_unique<FrequentWords>(name);
}

}  // namespace sala::data
