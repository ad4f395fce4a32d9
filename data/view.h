// One entry of a mixture: the documents of a dataset that pass the filters, their order in every
// epoch, and sample k of it.
//
// Within an epoch: files in seeded order, so reading goes file by file; within a file documents in
// seeded order, then packed; the samples of a file in seeded order. The number of samples of a file
// is the same in every epoch, so sample k is found without walking: epoch k / N, rank k mod N,
// prefix sums over the epoch's file order.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/data_config.h"
#include "data/packing.h"
#include "data/token_store.h"

namespace sala::data {

// True iff the top 32 bits of XXH3-64 of (doc_hash, seed), 16 little-endian bytes, are below
// floor(fraction * 2^32).
bool IsHeldOut(uint64_t doc_hash, int64_t seed, double fraction);

enum class Split { kTraining, kHeldOut };

// A run of tokens of one document of a dataset.
struct DocumentRun {
  int64_t file, document, start, length;
};

struct ViewSample {
  std::vector<DocumentRun> runs;
};

// Documents of a dataset that are not in a view, by the first filter that removed them.
struct RemovedDocuments {
  int64_t other_split = 0, too_short = 0, too_long = 0, over_seq_len = 0;
};

class View {
 public:
  struct Key {  // names the random streams: v1|SEED|STAGE|VIEW|EPOCH|PURPOSE|EXTRA
    int64_t seed;
    std::string stage;
    std::string view;
  };

  // DS-EMPTY (65) when no sample is left, with what each filter removed.
  static StatusOr<std::unique_ptr<View>> Open(const ViewConfig& config, const DataConfig& data,
                                              Key key, PackRule rule, Split split,
                                              std::shared_ptr<TokenStore> store);

  const std::string& name() const { return key_.view; }
  TokenStore& store() const { return *store_; }
  int64_t samples_per_epoch() const { return samples_; }
  int64_t max_epochs() const { return max_epochs_; }
  int64_t documents() const { return documents_; }
  int64_t tokens() const { return tokens_; }
  const RemovedDocuments& removed() const { return removed_; }
  const PackRule& rule() const { return rule_; }

  ViewSample Sample(int64_t k);
  // The documents of the view, by file.
  const std::vector<int64_t>& documents_of_file(int64_t file) const {
    return kept_[static_cast<size_t>(file)];
  }

 private:
  struct FilePlan {  // one file in one epoch
    int64_t epoch = -1, file = -1;
    std::vector<int64_t> documents;  // in the order of the epoch
    PackedFile packed;
    std::vector<int64_t> order;  // of samples
  };
  struct EpochPlan {
    int64_t epoch = -1;
    std::vector<int64_t> files;  // in the order of the epoch
    std::vector<int64_t> first;  // samples before each of them
  };
  View() = default;
  std::string StreamName(int64_t epoch, const char* purpose, const std::string& extra) const;
  void PlanEpoch(int64_t epoch);
  void PlanFile(int64_t epoch, int64_t file);

  Key key_;
  PackRule rule_;
  std::shared_ptr<TokenStore> store_;
  int64_t max_epochs_ = 1;
  int64_t samples_ = 0, documents_ = 0, tokens_ = 0;
  RemovedDocuments removed_;
  std::vector<std::vector<int64_t>> kept_;     // documents of the view, by file
  std::vector<std::vector<int64_t>> lengths_;  // their lengths
  std::vector<int64_t> shard_index_, file_samples_;
  EpochPlan epoch_plan_;
  FilePlan file_plan_;
};

}  // namespace sala::data
