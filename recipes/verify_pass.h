// One forward and backward pass of each kind that a scaled pipeline has, with weights and data, for
// the checks of `sala verify` that compute in this process.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/context.h"
#include "model/model.h"
#include "recipes/plan.h"
#include "recipes/verify_scale.h"

namespace sala::recipes {

struct VerifyPass {
  std::string where;  // "stage stable", "stage halo, distil"
  PlanInput plan;     // phase, models, sparse_attention, recompute
  HaloConfig halo;    // of the HALO phases
  // kTrain, kFinetune and kDistil: of plan.model; kAlign: the linear mixers of all layers.
  model::ParameterStore params;
  model::ParameterStore teacher;  // of the HALO phases
  model::Batch batch;  // of the stage's own stream, packed as it says; three documents or more
  bool chat = false;   // a stage of kind sft: datasets have a loss mask
  bool document_mask = true;

  model::RunOptions options() const {
    return {.sparse_attention = plan.sparse_attention, .recompute = plan.recompute};
  }
};

// The phases of all stages, those that compute the same once, with weights of seed 0. Datasets
// exist. Passes with sparse attention have a document whose tokens cannot see all blocks.
StatusOr<std::vector<VerifyPass>> MakeVerifyPasses(const ScaledPipeline& scaled);

// Weights away from the start of a training, where gates and scores are nearly linear.
void DrawWeights(int64_t seed, VerifyPass* pass);

// Numbers as they stand in the table: "1.2e-06".
std::string ShortText(double value);
// The same with nine digits, which tell float32 numbers apart.
std::string ExactText(double value);

// "layer 3" of "model.layers.3.mlp.up_proj.weight"; "" for a tensor of no layer.
std::string LayerOfTensor(const std::string& name);

}  // namespace sala::recipes
