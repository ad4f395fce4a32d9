// Whether a stage of kind sft has anything to learn, and how its first document looks.
#pragma once

#include "core/status.h"
#include "data/stream.h"
#include "data/tokenizer.h"

namespace sala::recipes {

// CHAT-NOMASK (65) when the first samples of a view have no token to learn. Every rank finds the
// same; the one that `warns` says which view has less than one in a hundred.
Status CheckLearned(const data::SampleStream& stream, const std::string& stage, bool warns);

// Logs the first document of the stage with the learned text marked: in brackets, on a terminal in
// colour.
Status LogFirstChat(data::SampleStream& stream, const std::string& stage,
                    const data::Tokenizer& tokenizer);

}  // namespace sala::recipes
