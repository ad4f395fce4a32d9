// What a recall task hides and asks (data/synthetic.h), as text that grows with its units of
// context. All draws come from the item's random stream, so a puzzle is a pure function of the
// stream's name and the number of units.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/rng.h"
#include "data/synthetic.h"

namespace sala::data {

struct PuzzleText {
  std::string context;  // everything the model reads but the lead: opening, hidden things, question
  std::string lead;     // the first words of the answer
  std::string answer;   // with a space in front
  double depth = kNoDepth;  // of the needle asked for
};

class Puzzle {
 public:
  Puzzle() = default;
  Puzzle(const Puzzle&) = delete;
  Puzzle& operator=(const Puzzle&) = delete;
  virtual ~Puzzle() = default;

  virtual PuzzleText Compose(int64_t units) const = 0;  // units >= 1
  // How many units there are; 0: as many as one wants.
  virtual int64_t available() const { return 0; }
};

// Of every task but the two of words. `name` is that of the stream behind `rng`; `haystack` must
// outlive the puzzle.
std::unique_ptr<Puzzle> MakeNeedlePuzzle(const RecallOptions& options, const Haystack& haystack,
                                         const std::string& name, PhiloxStream& rng);
// common_words and frequent_words.
std::unique_ptr<Puzzle> MakeWordPuzzle(const RecallOptions& options, const std::string& name);

}  // namespace sala::data
