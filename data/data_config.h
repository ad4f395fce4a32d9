// The `data:` part of a stage's configuration.
//
//   data:
//     seed: 1234
//     validation: {fraction: 0.0005}
//     packing: best_fit
//     mixture:
//       - {dataset: corpora/web,   weight: 0.35, max_tokens: 32768}
//       - {dataset: corpora/web,   weight: 0.10, min_tokens: 32768, name: web_long}
//       - {dataset: corpora/books, weight: 0.55, max_epochs: 4}
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/config.h"
#include "data/packing.h"
#include "data/token_store.h"

namespace sala::data {

// A dataset, or the documents of it whose length is in [min_tokens, max_tokens).
struct ViewConfig {
  std::string dataset = {};              // directory
  std::optional<std::string> name = {};  // default: the dataset's name
  double weight = 1;
  int64_t min_tokens = 0;
  std::optional<int64_t> max_tokens = {};
  std::optional<int64_t> max_epochs = {};  // default: 1 for text, 4 for chat
  void Bind(ConfigBinder& b);
};

// Documents held out by a hash of their text, so the choice survives every change of the mixture.
struct ValidationConfig {
  double fraction = 0;
  int64_t max_tokens = int64_t{1} << 20;   // of the validation set, padding included
  std::vector<std::string> datasets = {};  // measured ones, of those in the mixture; empty: all
  void Bind(ConfigBinder& b);
};

struct DataConfig {
  int64_t seed = 1234;
  ValidationConfig validation;
  Packing packing = Packing::kBestFit;
  LongDocuments long_documents = LongDocuments::kAuto;
  int64_t max_segments = 1024;  // of one sample, best_fit
  bool document_mask = true;    // false: one segment a sample, labels cross documents
  Verify verify = Verify::kFirstTouch;
  std::vector<ViewConfig> mixture;
  void Bind(ConfigBinder& b);
};

}  // namespace sala::data
