#include "data/data_config.h"

#include <algorithm>
#include <string>

#include "core/file.h"

namespace sala::data {

void ViewConfig::Bind(ConfigBinder& b) {
  b.Field("dataset", &dataset, {.required = true});
  b.Field("name", &name);
  b.Field("weight", &weight);
  b.Field("min_tokens", &min_tokens, {.min = 0});
  b.Field("max_tokens", &max_tokens, {.min = 1});
  b.Field("max_epochs", &max_epochs, {.min = 1});
  if (max_tokens.has_value() && *max_tokens <= min_tokens) {
    b.Error("max_tokens", "CFG-CONFLICT",
            "found " + std::to_string(*max_tokens) + ", expected more than min_tokens " +
                std::to_string(min_tokens));
  }
}

void ValidationConfig::Bind(ConfigBinder& b) {
  b.Field("fraction", &fraction, {.min = 0, .max = 0.5});
  b.Field("max_tokens", &max_tokens, {.min = 1});
  b.Field("datasets", &datasets);
}

void DataConfig::Bind(ConfigBinder& b) {
  b.Field("seed", &seed, {.min = 0});
  b.Section("validation", &validation);
  b.Enum("packing", &packing,
         {{"concat", Packing::kConcat},
          {"best_fit", Packing::kBestFit},
          {"one_per_sample", Packing::kOnePerSample}});
  b.Enum("long_documents", &long_documents,
         {{"auto", LongDocuments::kAuto},
          {"split", LongDocuments::kSplit},
          {"truncate", LongDocuments::kTruncate},
          {"drop", LongDocuments::kDrop}});
  b.Field("max_segments", &max_segments, {.min = 1});
  b.Field("document_mask", &document_mask);
  b.Enum("verify", &verify,
         {{"first_touch", Verify::kFirstTouch},
          {"always", Verify::kAlways},
          {"never", Verify::kNever}});
  b.List("mixture", &mixture, {.required = true});
  if (!b.reading()) return;
  for (const std::string& dataset : validation.datasets) {
    const auto named = [&dataset](const ViewConfig& view) { return view.dataset == dataset; };
    if (std::none_of(mixture.begin(), mixture.end(), named)) {
      b.Error("validation", "CFG-CONFLICT",
              "validation.datasets names '" + Printable(dataset) +
                  "', which no entry of mixture has; name one of those");
    }
  }
}

}  // namespace sala::data
