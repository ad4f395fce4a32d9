// Words of config.json that its writer and its reader share; not for other files.
#pragma once

namespace sala::recipes {

// model_type of the architectures that are written and read.
constexpr char kSala[] = "minicpm_sala";
constexpr char kMiniCpm[] = "minicpm";
constexpr char kLlama[] = "llama";
constexpr char kQwen3[] = "qwen3";
// lightning_scale, the one that the model computes with.
constexpr char kLightningScale[] = "1/sqrt(d)";

}  // namespace sala::recipes
