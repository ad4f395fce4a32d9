// How far the output gates of a model stand open: the mean of sigmoid(z) of each layer over a few
// held-out tokens, where z are the gate logits (kernels/output_gate/output_gate.h).
#pragma once

#include <vector>

#include "data/stream.h"
#include "model/model.h"
#include "recipes/session.h"

namespace sala::recipes {

// By layer; NaN where a layer has no gate, and everywhere where nothing is held out. The first
// held-out sample of each data-parallel rank, at most 256 tokens of it. Collective.
StatusOr<std::vector<double>> GateMeans(Session& session, const model::Model& model,
                                        const data::ValidationSet& set,
                                        const model::RunOptions& options);

// The same as a line of metrics/gates.jsonl: {"step", "stage", "mixers": [by layer], "means": [by
// layer, null without a gate]}. Nothing where no layer has one. Collective.
Status WriteGates(Session& session, const std::string& stage, const model::Model& model,
                  const data::ValidationSet& set, const model::RunOptions& options);

}  // namespace sala::recipes
