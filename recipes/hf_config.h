// The model configuration as a Hugging Face config.json, in both directions.
//
// Written: "minicpm_sala" with every field spelled out (engines have other defaults than the
// model). A plain full-attention model (rotary embedding, no gate, no linear layer) is written as
// what it is: "minicpm" with muP factors, without them "qwen3" if it has query/key norms and
// "llama" if not. Field by field: docs/formats.md. Read: minicpm_sala, minicpm, llama, qwen3. What
// a configuration asks for and the model cannot compute is refused, never dropped.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "model/config.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

// Number types of weights in model folders.
enum class WeightType : uint8_t { kBF16, kF16, kF32, kF64 };
std::string_view NameOf(WeightType type);  // "bf16", ...
std::optional<WeightType> ParseWeightType(std::string_view name);
std::optional<WeightType> WeightTypeOfFormat(std::string_view name);  // "BF16" of safetensors, ...

struct HfConfigOptions {
  WeightType dtype = WeightType::kBF16;  // of the weights beside it
  std::vector<int64_t>
      eos_token_ids;  // all ids that end a generation; empty: config.eos_token_id alone
};

// `config` is resolved. EXP-QKNORM (65): softmax layers with query/key norm in a model that is no
// qwen3, which no format has a place for.
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
