// A tiny teacher and batches for the tests of the HALO stage.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/rng.h"
#include "model/model.h"
#include "recipes/halo/transfer.h"
#include "recipes/step_loop.h"
#include "tests/core/context_test_base.h"

namespace sala::recipes::testing {

class HaloTest : public sala::testing::ContextTest {
 protected:
  std::unique_ptr<parallel::Communicator> comm_ = parallel::MakeSelfCommunicator();
  std::unique_ptr<parallel::Mesh> mesh_ = std::move(parallel::Mesh::Create(*comm_, {})).value();
};

inline model::ModelConfig TeacherConfig() {
  model::ModelConfig c;
  c.vocab_size = 41;
  c.hidden_size = 24;
  c.intermediate_size = 32;
  c.num_hidden_layers = 4;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 6;
  c.attn_qk_norm = true;
  c.dim_model_base = 12;
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

// Random weights, gains random around 1 so that their copies can be told from ones.
inline model::ParameterStore RandomTeacher(const model::ModelConfig& config) {
  model::ParameterStore store(model::ParameterSpecs(config));
  model::InitialiseParameters(config, 5, store);
  PhiloxStream rng("v1|5|halo_test||0|gains|");
  for (const model::ParameterSpec& spec : store.specs()) {
    float* data = store.data() + spec.offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      if (spec.kind == model::ParameterKind::kVector)
        data[i] += static_cast<float>(0.2 * rng.NextNormal());
      if (spec.kind == model::ParameterKind::kMatrix) data[i] *= 2;  // attention away from uniform
    }
  }
  return store;
}

// Packed random documents; labels are the next tokens inside each.
inline model::Batch RandomBatch(const model::ModelConfig& config,
                                const std::vector<int32_t>& lengths, const std::string& name) {
  PhiloxStream rng("v1|5|halo_test||0|tokens|" + name);
  model::Batch batch;
  batch.cu_seqlens = {0};
  for (int32_t n : lengths) {
    for (int32_t i = 0; i < n; ++i) {
      batch.tokens.push_back(
          static_cast<int32_t>(rng.Bounded(static_cast<uint64_t>(config.vocab_size))));
      batch.positions.push_back(i);
    }
    for (int32_t i = 0; i < n; ++i) {
      const auto next = static_cast<size_t>(batch.cu_seqlens.back() + i + 1);
      batch.labels.push_back(i + 1 < n ? batch.tokens[next] : -1);
    }
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + n);
  }
  return batch;
}

inline std::vector<float> Bits(const model::ParameterStore& store) {
  return {store.data(), store.data() + store.size()};
}

inline std::vector<float> Values(const ConstTensor& x) {
  const auto* data = x.Data<float>();
  return {data, data + x.numel()};
}

// A teacher with transferred mixers, and a batch of documents of the given lengths to run a task
// on.
class TaskTest : public HaloTest {
 protected:
  TaskTest(const std::vector<int32_t>& lengths, const std::string& name)
      : config_(TeacherConfig()),
        teacher_(RandomTeacher(config_)),
        model_(config_, teacher_),
        mixers_(TransferMixers(config_, teacher_, {.seed = 3})),
        batch_(RandomBatch(config_, lengths, name)),
        counts_{.targets = batch_.targets(), .tokens = batch_.size()} {}

  // The task's values (the loss first) and gradients of the batch.
  std::vector<std::pair<std::string, double>> Run(StepTask& task,
                                                  model::ParameterStore* gradients) {
    std::vector<double> sums(task.SumNames().size(), 0.0);
    EXPECT_TRUE(task.MicroBatch(ctx_, arena_, batch_, counts_, *gradients, sums).ok());
    return task.Values(sums, counts_);
  }

  model::ModelConfig config_;
  model::ParameterStore teacher_;
  model::Model model_;
  model::ParameterStore mixers_;
  model::Batch batch_;
  StepCounts counts_;
};

}  // namespace sala::recipes::testing
