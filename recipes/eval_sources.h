// Where the samples of an evaluation come from (recipes/eval.h): recall tasks, documents whose
// losses are measured, prompts of the user.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "recipes/eval.h"

namespace sala::recipes {

// `haystack` and `tokenizer` must outlive the source.
std::unique_ptr<EvalSource> MakeRecallSource(const data::RecallOptions& options, int64_t samples,
                                             const data::Haystack& haystack,
                                             const data::Tokenizer& tokenizer);

// The first `length` tokens of documents that have as many, `samples` of them at most, in the order
// of the dataset.
//   loss_by_position  ranges [2^i, 2^(i+1)): the loss of the tokens at these places, from 0
//   loss_by_context   the last min(1024, length / 2) tokens, given a part of the text before them:
//                     all, half, a quarter ... down to 64 tokens; a range is [tokens given, tokens
//                     of the whole document then)
// EVAL-HAYSTACK (78) when there is none, EVAL-LENGTH (78) below 128 tokens.
StatusOr<std::unique_ptr<EvalSource>> OpenLossSource(const std::string& task, int64_t length,
                                                     int64_t samples, const std::string& dataset,
                                                     const data::Haystack::Part* part,
                                                     const data::Tokenizer& tokenizer);

// {"prompt": text, "answer": text, "id"?: text, "group"?: name} a line. Tasks are "prompts" and
// "prompts_GROUP"; a task's length is that of its longest sample. EVAL-PROMPTS (65) with the first
// bad lines, FILE-MISSING (66).
StatusOr<std::vector<std::unique_ptr<EvalSource>>> ReadPromptSources(
    const std::string& path, bool chat, const data::Tokenizer& tokenizer);

}  // namespace sala::recipes
