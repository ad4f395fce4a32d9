// The samples of a stage: a pure function of the global sample index g, the same on every rank and
// whatever was asked before.
//
//   SALA_ASSIGN_OR_RETURN(auto stream, SampleStream::Open(config, "stable", seq_len, *tokenizer));
//   SALA_ASSIGN_OR_RETURN(PackedSample sample, stream->Get(g));
//
// A sample has L = seq_len slots:
//   tokens    [L]    padding holds pad_id, or 0 when there is none
//   labels    [L]    the next token of the same document, even when that token lies in another
//   sample; -1 where there is
//                    none (document end, padding) or where the loss mask of that next token is 0
//   positions [L]    restart at 0 in every segment
//   cu_seqlens [S+1] starts of the segments, then L; padding is one last segment
// With document_mask off the sample is one segment (padding still its own) and the label at the end
// of a document is the first token of the next one in the sample.
//
// Errors: MIX-WEIGHT, MIX-EPOCHS, DATA-CHANGED (78), DS-* and TOK-MISMATCH (65).
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/data_config.h"
#include "data/mixture.h"
#include "data/tokenizer.h"
#include "data/view.h"

namespace sala::data {

struct SegmentMeta {
  int64_t view;  // index in the mixture
  int64_t file, document;
  int64_t start;  // token of the document at the start of the segment
  int64_t length;
};

struct PackedSample {
  std::vector<int32_t> tokens, labels, positions, cu_seqlens;
  int64_t padding = 0;  // slots at the end
  std::vector<SegmentMeta>
      segments;  // documents only, in order; with document_mask off still one per document
  int64_t targets() const;  // labels that are not -1
};

// CRC32C of tokens, labels and cu_seqlens, to compare what two runs saw.
uint32_t DataCrc(const PackedSample& sample);

// Not thread-safe; one per reader thread.
class SampleStream {
 public:
  static StatusOr<std::unique_ptr<SampleStream>> Open(const DataConfig& config,
                                                      const std::string& stage_name,
                                                      int64_t seq_len, const Tokenizer& tokenizer);

  // Efficient when g rises; a smaller g than before makes the mixture count again from 0.
  // MIX-EPOCHS when a view is used up.
  StatusOr<PackedSample> Get(int64_t g);
  // The view sample g comes from, without reading it.
  int64_t ViewOf(int64_t g) { return mixture_.At(g).view; }

  // MIX-EPOCHS, before training, when samples [0, total_samples) would use a view more often than
  // it allows.
  Status CheckEpochs(int64_t total_samples);

  // {"stage", "g", "counts": {view: samples taken before g}, "fingerprint", "data":
  // fingerprint_json()}.
  nlohmann::json Cursor(int64_t g);
  // DATA-CHANGED with each field that differs, when the saved cursor belongs to other data or
  // another order.
  Status CheckCursor(const nlohmann::json& saved);

  // Everything that decides the samples, and its SHA-256.
  const nlohmann::json& fingerprint_json() const { return fingerprint_json_; }
  const std::string& fingerprint() const { return fingerprint_; }

  int64_t seq_len() const { return seq_len_; }
  const DataConfig& config() const { return config_; }
  // Samples of each view among [0, total_samples).
  const std::vector<int64_t>& CountsBefore(int64_t total_samples) {
    return mixture_.CountsBefore(total_samples);
  }
  // The share of the samples that each view is to give, in units of 1 / 2^32 or so.
  const std::vector<int64_t>& integer_weights() const { return mixture_.integer_weights(); }
  const std::vector<std::unique_ptr<View>>& views() const { return views_; }

 private:
  explicit SampleStream(Mixture mixture) : mixture_(std::move(mixture)) {}
  Status EpochError(const View& view, int64_t samples) const;

  DataConfig config_;
  std::string stage_;
  int64_t seq_len_ = 0;
  Mixture mixture_;
  std::vector<std::unique_ptr<View>> views_;
  nlohmann::json fingerprint_json_;
  std::string fingerprint_;
};

// The held-out documents of a mixture's datasets, packed (best_fit), in a fixed order, up to
// max_tokens slots. They are in no training view. Empty when the fraction is 0 or no document was
// held out.
class ValidationSet {
 public:
  static StatusOr<std::unique_ptr<ValidationSet>> Open(const DataConfig& config, int64_t seq_len,
                                                       const Tokenizer& tokenizer);
  int64_t size() const { return static_cast<int64_t>(samples_.size()); }
  StatusOr<PackedSample> Get(int64_t index) const;
  // Held-out documents in it.
  int64_t documents() const { return documents_; }

 private:
  struct Entry {
    int64_t view;
    ViewSample sample;
  };
  ValidationSet() = default;
  bool document_mask_ = true;
  int64_t seq_len_ = 0;
  int64_t documents_ = 0;
  std::vector<std::shared_ptr<TokenStore>> stores_;
  std::vector<Entry> samples_;
};

}  // namespace sala::data
