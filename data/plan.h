// What a stage will see of its data, known from document lengths and loss masks before anything is
// trained, and which segments a step consists of.
//
//   SALA_ASSIGN_OR_RETURN(DataPlan plan, PlanData(*stream, steps * sequences));
//   std::puts(ToJson(plan).dump(1).c_str());
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/stream.h"

namespace sala::data {

struct ViewPlan {
  std::string name;
  std::string dataset;  // directory
  bool chat = false;
  double share = 0;  // of the samples, by its weight
  int64_t dataset_documents = 0;
  RemovedDocuments removed;
  int64_t truncated = 0;  // documents longer than seq_len of which the rest is not used
  int64_t documents = 0;  // in the view
  int64_t tokens = 0;
  int64_t samples_per_epoch = 0;
  int64_t max_epochs = 1;
  int64_t samples = 0;  // that the stage takes of it
  // Counted over the first `measured` of these samples, an epoch at most.
  int64_t measured = 0;
  int64_t padding = 0;                                       // slots
  int64_t targets = 0;                                       // tokens that are learned
  int64_t segments = 0, min_segments = 0, max_segments = 0;  // in all samples, in one

  double epochs() const;
  bool used_too_often() const { return samples > samples_per_epoch * max_epochs; }  // MIX-EPOCHS
  double padding_share(int64_t seq_len) const;                                      // of the slots
  double learned_share(int64_t seq_len) const;  // of the tokens that are no padding
};

struct DataPlan {
  int64_t seq_len = 0;
  int64_t samples = 0;
  std::vector<ViewPlan> views;

  double padding_share() const;
  int64_t tokens() const;  // slots that are no padding
};

// Reads all lengths of the stage's datasets and, of chats, the masks of what the stage takes.
StatusOr<DataPlan> PlanData(SampleStream& stream, int64_t samples);

nlohmann::ordered_json ToJson(const DataPlan& plan);

// Labels of a sample that are not -1, without reading its tokens.
StatusOr<int64_t> CountTargets(const View& view, const ViewSample& sample, bool document_mask);

// Lines that say what samples [first, first + count) are made of: view, file, document, tokens,
// CRC32C.
StatusOr<std::string> TraceSamples(SampleStream& stream, int64_t first, int64_t count);

}  // namespace sala::data
