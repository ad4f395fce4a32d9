// The model configuration as a Hugging Face config.json, in both directions.
//
// Written: "minicpm_sala" with every field spelled out (engines have other defaults than the
// model), or "minicpm" for a plain full-attention model (rotary embedding, no gate, no linear
// layer). Field by field: docs/formats.md. Read: minicpm_sala, minicpm, llama, qwen3. What a
// configuration asks for and the model cannot compute is refused, never dropped.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"
#include "model/config.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

struct HfConfigOptions {
  DType dtype = DType::kBF16;  // of the weights beside it: bf16 or f32
  std::vector<int64_t>
      eos_token_ids;  // all ids that end a generation; empty: config.eos_token_id alone
};

// `config` is resolved. EXP-QKNORM (65): softmax layers with query/key norm, which the exported
// format has no place for.
StatusOr<nlohmann::json> HfConfig(const model::ModelConfig& config,
                                  const HfConfigOptions& options = {});

// generation_config.json of the same model.
nlohmann::json HfGenerationConfig(const model::ModelConfig& config,
                                  const HfConfigOptions& options = {});

// `path` is for messages. The result is resolved. Errors (65): IMP-ARCH (another architecture, or a
// feature the model does not have), IMP-FIELD (a field is missing or of the wrong type), IMP-BIAS,
// IMP-QUANT.
StatusOr<model::ModelConfig> ModelConfigFromHf(const nlohmann::json& json, const std::string& path);

}  // namespace sala::recipes
