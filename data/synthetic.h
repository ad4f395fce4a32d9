// Recall tasks with known answers, made from Philox streams: the same (seed, task, length, index)
// gives the same text everywhere. They serve training (documents of a token store) and evaluation
// (prompt and answer ids). "RULER-like": the wording is our own.
//
//   passkey          one number hidden in the haystack
//   niah_multikey    several keys with numbers, one is asked for
//   tracking         a chain of variables assigned from one another, all names holding one value
//                    are asked for
//   niah_single_1    a key with a number in filler; _2 in running text; _3 with a code (UUID) there
//   niah_multikey_1  several keys in running text; _2, _3: the context is nothing but other needles
//   niah_multivalue  a key with several numbers in running text, all are asked for
//   niah_multiquery  several keys in running text, all are asked for in another order
//   common_words     a list in which ten words come more often than the others
//   frequent_words   words whose counts fall with the square of the rank; the first three are asked
//                    for
//   kv               a JSON object with UUID keys and values
//
// Every prompt ends with the first words of the answer and the answer begins with a space, so that
// encode(prompt + answer) starts with encode(prompt); where a tokenizer breaks this the error is
// EVAL-BOUNDARY (78). Units of the haystack are added by bisection until prompt + answer fill the
// length; EVAL-LENGTH (78) when not even one unit fits, EVAL-HAYSTACK (78) when the haystack is
// missing or too small.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "data/view.h"

namespace sala::data {

enum class RecallTask : uint8_t {
  kPasskey,
  kMultiKey,
  kTracking,
  kSingle1,
  kSingle2,
  kSingle3,
  kMultiKey1,
  kMultiKey2,
  kMultiKey3,
  kMultiValue,
  kMultiQuery,
  kCommonWords,
  kFrequentWords,
  kKeyValue
};

const char* NameOf(RecallTask task);
StatusOr<RecallTask> RecallTaskNamed(const std::string& name);  // EVAL-TASK (78)
std::vector<std::string> RecallTaskNames();
// Whether the task is meant for running text; the others make their own context or use the filler.
bool WantsRunningText(RecallTask task);
constexpr double kNoDepth = -1;

// What the needles are hidden in: units that are taken in order from a drawn start.
class Haystack {
 public:
  static constexpr int64_t kMaxBytes = int64_t{16} << 20;

  // One paragraph of sentences that say nothing, a line each, repeated without end.
  static Haystack Filler();
  // Of the documents of a dataset, those that a run with this data.seed and
  // data.validation.fraction trains on or holds out: text for training must not show what a model
  // is measured on, text for measuring not what it was trained on.
  struct Part {
    Split split;
    int64_t seed;
    double fraction;
  };
  // Sentences of the documents of a text dataset, up to max_bytes of them; of all documents, or of
  // one part.
  static StatusOr<Haystack> FromDataset(const std::string& directory, const Tokenizer& tokenizer,
                                        int64_t max_bytes = kMaxBytes, const Part* part = nullptr);
  const std::vector<std::string>& units() const { return units_; }
  bool endless() const { return endless_; }

 private:
  std::vector<std::string> units_;
  bool endless_ = false;
};

struct RecallOptions {
  RecallTask task = RecallTask::kPasskey;
  int64_t seed = 1234;
  int64_t length_tokens =
      512;  // of the whole sequence: bos, prompt, answer, in chat form also the end of the turn
  // niah_multikey, _multikey_1, _multiquery: how many keys; niah_multivalue: how many values;
  // tracking: the length of the chain.
  int64_t keys = 4;
  bool chat = false;  // the prompt as a user's message, the answer as the assistant's
  std::string purpose =
      "eval";  // names the random stream; training uses another, so the texts differ
};

struct RecallItem {
  std::vector<int32_t> prompt,
      answer;  // prompt with bos where the tokenizer has one; ids to be predicted
  std::string prompt_text, answer_text;
  // Of the needle asked for, 0 = start, 1 = end of the context; kNoDepth where there is none.
  double depth = 0;
  int64_t units = 0;  // of the context
};

StatusOr<RecallItem> MakeRecallItem(const RecallOptions& options, const Haystack& haystack,
                                    const Tokenizer& tokenizer, int64_t index);

// Recall items as a token store that a mixture names like any other dataset. Text: loss on
// everything; chat: on the answer and the end of its turn. Lengths are drawn evenly from
// [min_length_tokens, length_tokens]; all documents differ.
struct SyntheticOptions {
  RecallOptions recall = {};
  int64_t min_length_tokens = 0;  // 0: all have length_tokens
  int64_t documents = 0;
  std::string haystack_dataset = {};  // "": filler
  // No document of the haystack is one that a run with this data.seed and a
  // data.validation.fraction up to this one holds out (a smaller fraction holds out some of the
  // same documents).
  int64_t held_out_seed = 1234;
  double held_out_fraction = 0.1;
  std::string output = {}, name = {};
};
StatusOr<DatasetInfo> MaterialiseSynthetic(const SyntheticOptions& options,
                                           const Tokenizer& tokenizer);

// Chat records from the documents of a text dataset: "Continue this text:" with a first part, the
// following part as the answer. Every document gives as many records as it has room for,
// `documents` at most in all (0: no limit).
struct ContinuationOptions {
  std::string dataset = {}, output = {}, name = {};
  int64_t prompt_tokens = 256, answer_tokens = 256;  // of the text, before the template
  int64_t documents = 0;
};
StatusOr<DatasetInfo> MaterialiseContinuation(const ContinuationOptions& options,
                                              const Tokenizer& tokenizer);

}  // namespace sala::data
