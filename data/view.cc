#include "data/view.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/check.h"
#include "core/hash.h"
#include "core/rng.h"

namespace sala::data {
namespace {

std::string Describe(const RemovedDocuments& removed, const ViewConfig& config,
                     const PackRule& rule, Split split) {
  return std::to_string(removed.other_split) +
         (split == Split::kTraining ? " held out for validation, " : " not held out, ") +
         std::to_string(removed.too_short) + " shorter than min_tokens " +
         std::to_string(config.min_tokens) + ", " + std::to_string(removed.too_long) +
         " not below max_tokens" +
         (config.max_tokens ? " " + std::to_string(*config.max_tokens) : std::string(" (none)")) +
         ", " + std::to_string(removed.over_seq_len) + " longer than seq_len " +
         std::to_string(rule.seq_len) + " (long_documents: drop)";
}

}  // namespace

bool IsHeldOut(uint64_t doc_hash, int64_t seed, double fraction) {
  const uint64_t threshold = static_cast<uint64_t>(std::floor(fraction * 4294967296.0));
  std::string bytes(16, '\0');
  for (size_t i = 0; i < 8; ++i) {
    bytes[i] = static_cast<char>(doc_hash >> (8 * i));
    bytes[8 + i] = static_cast<char>(static_cast<uint64_t>(seed) >> (8 * i));
  }
  return (Xxh3(bytes) >> 32) < threshold;
}

StatusOr<std::unique_ptr<View>> View::Open(const ViewConfig& config, const DataConfig& data,
                                           Key key, PackRule rule, Split split,
                                           std::shared_ptr<TokenStore> store) {
  std::unique_ptr<View> view(new View());
  const DatasetInfo& info = store->info();
  if (rule.long_documents == LongDocuments::kAuto)
    rule.long_documents = info.sft() ? LongDocuments::kDrop : LongDocuments::kSplit;
  view->key_ = std::move(key);
  view->rule_ = rule;
  view->max_epochs_ = config.max_epochs.value_or(info.sft() ? 4 : 1);
  RemovedDocuments& removed = view->removed_;
  for (int64_t f = 0; f < store->files(); ++f) {
    SALA_ASSIGN_OR_RETURN(const TokenFile* file, store->File(f));
    std::vector<int64_t> kept;
    std::vector<int64_t> lengths;
    for (int64_t d = 0; d < file->documents(); ++d) {
      const int64_t length = file->length(d);
      const bool held_out = IsHeldOut(file->hash(d), data.seed, data.validation.fraction);
      if (held_out != (split == Split::kHeldOut)) {
        ++removed.other_split;
      } else if (length < config.min_tokens) {
        ++removed.too_short;
      } else if (config.max_tokens && length >= *config.max_tokens) {
        ++removed.too_long;
      } else if (length > rule.seq_len && rule.packing != Packing::kConcat &&
                 rule.long_documents == LongDocuments::kDrop) {
        ++removed.over_seq_len;
      } else {
        kept.push_back(d);
        lengths.push_back(length);
        view->tokens_ += length;
      }
    }
    view->documents_ += static_cast<int64_t>(kept.size());
    view->file_samples_.push_back(CountSamples(lengths, rule));
    view->samples_ += view->file_samples_.back();
    view->shard_index_.push_back(file->shard_index());
    view->kept_.push_back(std::move(kept));
    view->lengths_.push_back(std::move(lengths));
  }
  if (view->samples_ == 0) {
    return MakeError(ExitCode::kData, "DS-EMPTY",
                     info.directory + ": view " + view->name() + " has no document left of " +
                         std::to_string(info.documents) + ": " +
                         Describe(removed, config, rule, split));
  }
  view->store_ = std::move(store);
  return view;
}

std::string View::StreamName(int64_t epoch, const char* purpose, const std::string& extra) const {
  return "v1|" + std::to_string(key_.seed) + "|" + key_.stage + "|" + key_.view + "|" +
         std::to_string(epoch) + "|" + purpose + "|" + extra;
}

void View::PlanEpoch(int64_t epoch) {
  if (epoch_plan_.epoch == epoch) return;
  epoch_plan_.epoch = epoch;
  epoch_plan_.files = PhiloxStream(StreamName(epoch, "shard_order", ""))
                          .Permutation(static_cast<int64_t>(kept_.size()));
  epoch_plan_.first = {0};
  for (const int64_t file : epoch_plan_.files)
    epoch_plan_.first.push_back(epoch_plan_.first.back() +
                                file_samples_[static_cast<size_t>(file)]);
}

void View::PlanFile(int64_t epoch, int64_t file) {
  FilePlan& plan = file_plan_;
  if (plan.epoch == epoch && plan.file == file) return;
  plan.epoch = epoch;
  plan.file = file;
  char extra[32];
  std::snprintf(extra, sizeof extra, "shard-%05lld",
                static_cast<long long>(shard_index_[static_cast<size_t>(file)]));
  const auto& kept = kept_[static_cast<size_t>(file)];
  const auto& lengths = lengths_[static_cast<size_t>(file)];
  const auto order = PhiloxStream(StreamName(epoch, "doc_order", extra))
                         .Permutation(static_cast<int64_t>(kept.size()));
  plan.documents.clear();
  std::vector<int64_t> ordered;
  for (const int64_t i : order) {
    plan.documents.push_back(kept[static_cast<size_t>(i)]);
    ordered.push_back(lengths[static_cast<size_t>(i)]);
  }
  plan.packed = Pack(ordered, rule_);
  SALA_CHECK(plan.packed.samples() == file_samples_[static_cast<size_t>(file)])
      << name() << " epoch " << epoch << " file " << file;
  const char* purpose = rule_.packing == Packing::kConcat ? "sample_order" : "bin_order";
  plan.order = PhiloxStream(StreamName(epoch, purpose, extra)).Permutation(plan.packed.samples());
}

ViewSample View::Sample(int64_t k) {
  const int64_t epoch = k / samples_;
  const int64_t rank = k % samples_;
  PlanEpoch(epoch);
  const auto& first = epoch_plan_.first;
  const auto place = std::upper_bound(first.begin(), first.end(), rank) - first.begin() - 1;
  const int64_t file = epoch_plan_.files[static_cast<size_t>(place)];
  PlanFile(epoch, file);
  const int64_t sample =
      file_plan_.order[static_cast<size_t>(rank - first[static_cast<size_t>(place)])];
  ViewSample out;
  const auto& packed = file_plan_.packed;
  for (int64_t s = packed.first[static_cast<size_t>(sample)];
       s < packed.first[static_cast<size_t>(sample) + 1]; ++s) {
    const Segment& segment = packed.segments[static_cast<size_t>(s)];
    out.runs.push_back({file, file_plan_.documents[static_cast<size_t>(segment.document)],
                        segment.start, segment.length});
  }
  return out;
}

}  // namespace sala::data
