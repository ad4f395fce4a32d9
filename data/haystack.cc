// What recall needles are hidden in (data/synthetic.h).
#include "data/synthetic.h"

namespace sala::data {
namespace {

const char* const kFillerSentences[] = {
    "The road follows the river for a while.",
    "A cart stands by the wall and nobody asks whose it is.",
    "Clouds come over the hill and go again.",
    "Someone has left the gate open.",
    "The afternoon is long and nothing happens in it.",
};

// Sentences: cut behind . ! ? followed by white space, and at line ends. White space inside becomes
// single spaces.
void AddSentences(const std::string& text, std::vector<std::string>* units, int64_t* bytes) {
  constexpr size_t kShortest = 20;
  constexpr size_t kLongest = 400;  // a run without an end is no sentence
  std::string sentence;
  const auto end = [&] {
    while (!sentence.empty() && sentence.back() == ' ') sentence.pop_back();
    if (sentence.size() >= kShortest && sentence.size() <= kLongest) {
      *bytes += static_cast<int64_t>(sentence.size());
      units->push_back(sentence);
    }
    sentence.clear();
  };
  char before = ' ';
  for (const char c : text) {
    const bool space = c == ' ' || c == '\n' || c == '\t' || c == '\r';
    if (space && (before == '.' || before == '!' || before == '?')) {
      end();
    } else if (!space) {
      sentence += c;
    } else if (!sentence.empty() && sentence.back() != ' ') {
      sentence += ' ';
    }
    before = c;
  }
  end();
}

}  // namespace

Haystack Haystack::Filler() {
  Haystack haystack;
  haystack.units_.assign(std::begin(kFillerSentences), std::end(kFillerSentences));
  haystack.endless_ = true;
  return haystack;
}

StatusOr<Haystack> Haystack::FromDataset(const std::string& directory, const Tokenizer& tokenizer,
                                         int64_t max_bytes, const Part* part) {
  auto store = TokenStore::Open(directory);
  if (ErrorCodeOf(store.status()) == "DS-MISSING") {
    return MakeError(ExitCode::kConfig, "EVAL-HAYSTACK",
                     directory + ": no dataset there to take running text from");
  }
  SALA_RETURN_IF_ERROR(store.status());
  SALA_RETURN_IF_ERROR((*store)->CheckTokenizer(tokenizer));
  if ((*store)->info().sft())
    return MakeError(ExitCode::kConfig, "EVAL-HAYSTACK",
                     directory + ": found a chat dataset, expected running text");
  Haystack haystack;
  int64_t bytes = 0;
  std::vector<int32_t> ids;
  for (int64_t f = 0; f < (*store)->files(); ++f) {
    SALA_ASSIGN_OR_RETURN(TokenFile * file, (*store)->File(f));
    for (int64_t d = 0; d < file->documents() && bytes < max_bytes; ++d) {
      if (part != nullptr &&
          IsHeldOut(file->hash(d), part->seed, part->fraction) != (part->split == Split::kHeldOut))
        continue;
      ids.resize(static_cast<size_t>(file->length(d)));
      SALA_RETURN_IF_ERROR(file->CopyTokens(file->begin(d), file->length(d), ids.data()));
      AddSentences(tokenizer.Decode(ids), &haystack.units_, &bytes);
    }
  }
  if (haystack.units_.empty()) {
    return MakeError(ExitCode::kConfig, "EVAL-HAYSTACK",
                     directory + ": none of its documents" +
                         (part == nullptr                  ? ""
                          : part->split == Split::kHeldOut ? " held out for validation"
                                                           : " not held out for validation") +
                         " has a sentence of 20 to 400 bytes");
  }
  return haystack;
}

}  // namespace sala::data
