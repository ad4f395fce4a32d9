// What a checkpoint keeps of the model folder its weights came from (source.json): the texts of its
// small files and the headers of its weights. With them a model that still computes what they say
// is exported as the folder was, byte for byte but for the values.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"
#include "model/config.h"
#include "recipes/hf_config.h"

namespace sala::recipes {

struct SourceRecord {
  std::string config;                            // config.json
  std::optional<std::string> generation_config;  // generation_config.json, where there is one
  std::string index;                             // model.safetensors.index.json; "": one file
  std::vector<std::pair<std::string, std::string>> headers;  // {file name, header of the weights}
  std::vector<std::string> tokenizer_files;                  // names

  static constexpr char kFileName[] = "source.json";
  std::string ToText() const;
  // CKPT-VERSION (65).
  static StatusOr<SourceRecord> Parse(const std::string& text, const std::string& path);

  struct Tensor {
    std::string name;
    WeightType type = WeightType::kBF16;
    std::vector<int64_t> shape;
  };
  // What the headers name; nullopt: something in them is no weight.
  std::optional<std::vector<Tensor>> Tensors() const;
  // The type of the embedding, which stands for the model's.
  std::optional<WeightType> type() const;
};

// Of a checkpoint or a model folder; nullopt: its weights came from no folder.
StatusOr<std::optional<SourceRecord>> SourceRecordAt(const std::string& path);

}  // namespace sala::recipes
