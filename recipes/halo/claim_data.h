// Data of the conversion's claims (recipes/halo/claim_trial.h): documents that a model of a few
// hundred thousand parameters learns to recall from in minutes. A pure function of (seed, purpose,
// index).
//
// A document binds some of 32 keys to one of 6 values each. A fact is one token that says both; a
// question is the token of a key, its answer the token of the value. Which value a key has is drawn
// for each document, so an answer can only be found by looking at a fact far back.
//
//   stream   facts and questions in random order, each fact again and again, with runs of filler
//            between them
//   needle   all facts once, a gap of filler, then questions with their answers
//
// Filler is a Markov chain over 24 tokens, each with four successors: what it says depends on the
// order of its tokens, as text does. Ids are below 256: those of the byte tokenizer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/tokenizer.h"
#include "model/model.h"

namespace sala::recipes {

enum class ClaimTask : uint8_t { kStream, kNeedle };

struct ClaimDataOptions {
  ClaimTask task = ClaimTask::kStream;
  int64_t seed = 0;
  std::string purpose = {};  // names the random stream: other purposes give other documents
  int64_t length = 0;        // tokens of a document
  int64_t least_keys = 2;    // that are bound, drawn evenly from [least_keys, keys]
  int64_t keys = 2;          // at most 32
  int64_t questions = 0;     // needle; 1 token a key and 2 a question must fit the length
  double filler_share = 0;   // stream: of the draws, facts and questions or a run of filler
};

struct ClaimDocument {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> recalled;  // 1 for an answer
};

ClaimDocument MakeClaimDocument(const ClaimDataOptions& options, int64_t index);

// Documents [0, count) as a token store. `recalled_only`: with a loss mask that asks for what can
// be recalled and nothing else (a store of kind sft).
Status WriteClaimStore(const ClaimDataOptions& options, int64_t count, bool recalled_only,
                       const std::string& directory, const data::Tokenizer& tokenizer);

// One document a batch. Labels: every next token, or only what can be recalled.
std::vector<model::Batch> ClaimBatches(const ClaimDataOptions& options, int64_t count,
                                       bool recalled_only);

}  // namespace sala::recipes
