#include "data/stream.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"

namespace sala::data {
namespace {

using nlohmann::json;

// Datasets named by several views are opened once.
class Stores {
 public:
  Stores(Verify verify, const Tokenizer& tokenizer) : verify_(verify), tokenizer_(tokenizer) {}
  StatusOr<std::shared_ptr<TokenStore>> Open(const std::string& directory) {
    auto& slot = open_[directory];
    if (slot == nullptr) {
      SALA_ASSIGN_OR_RETURN(slot, TokenStore::Open(directory, verify_));
      SALA_RETURN_IF_ERROR(slot->CheckTokenizer(tokenizer_));
    }
    return slot;
  }

 private:
  Verify verify_;
  const Tokenizer& tokenizer_;
  std::map<std::string, std::shared_ptr<TokenStore>> open_;
};

const char* NameOf(Packing packing) {
  switch (packing) {
    case Packing::kConcat:
      return "concat";
    case Packing::kBestFit:
      return "best_fit";
    case Packing::kOnePerSample:
      return "one_per_sample";
  }
  return "";
}

const char* NameOf(LongDocuments rule) {
  switch (rule) {
    case LongDocuments::kAuto:
      return "auto";
    case LongDocuments::kSplit:
      return "split";
    case LongDocuments::kTruncate:
      return "truncate";
    case LongDocuments::kDrop:
      return "drop";
  }
  return "";
}

json Fingerprint(const DataConfig& config, const std::string& stage, int64_t seq_len,
                 const Mixture& mixture, const std::vector<std::unique_ptr<View>>& views) {
  json list = json::array();
  for (size_t i = 0; i < views.size(); ++i) {
    const ViewConfig& view = config.mixture[i];
    list.push_back({{"name", views[i]->name()},
                    {"dataset", views[i]->store().info().fingerprint},
                    {"weight", mixture.integer_weights()[i]},
                    {"min_tokens", view.min_tokens},
                    {"max_tokens", view.max_tokens ? json(*view.max_tokens) : json()}});
  }
  return {{"version", 1},
          {"seed", config.seed},
          {"stage", stage},
          {"seq_len", seq_len},
          {"packing", NameOf(config.packing)},
          {"long_documents", NameOf(config.long_documents)},
          {"max_segments", config.max_segments},
          {"document_mask", config.document_mask},
          {"held_out_of_2_32",
           static_cast<int64_t>(std::floor(config.validation.fraction * 4294967296.0))},
          {"views", list}};
}

// Fills one document's part of a sample, labels within the document.
Status FillRun(TokenFile& file, bool sft, const DocumentRun& run, int64_t at,
               PackedSample* sample) {
  const int64_t begin = file.begin(run.document) + run.start;
  const bool more = run.start + run.length <
                    file.length(run.document);  // the label of the last token lies behind the run
  std::vector<int32_t> next(static_cast<size_t>(run.length) + 1, -1);
  SALA_RETURN_IF_ERROR(file.CopyTokens(begin, run.length + (more ? 1 : 0), next.data()));
  std::copy_n(next.begin(), run.length, sample->tokens.begin() + at);
  if (sft) {
    std::vector<uint8_t> mask(next.size(), 0);
    SALA_RETURN_IF_ERROR(file.CopyMask(begin, run.length + (more ? 1 : 0), mask.data()));
    for (size_t i = 0; i < next.size(); ++i) {
      if (mask[i] == 0) next[i] = -1;
    }
  }
  std::copy(next.begin() + 1, next.end(), sample->labels.begin() + at);
  std::iota(sample->positions.begin() + at, sample->positions.begin() + at + run.length, 0);
  return OkStatus();
}

// document_mask: false. The document before slot `at` ended there: its last label becomes the first
// token of `run`.
Status JoinDocuments(TokenFile& file, bool sft, const DocumentRun& run, int64_t at,
                     PackedSample* sample) {
  uint8_t learned = 1;
  if (sft) SALA_RETURN_IF_ERROR(file.CopyMask(file.begin(run.document) + run.start, 1, &learned));
  if (learned != 0)
    sample->labels[static_cast<size_t>(at) - 1] = sample->tokens[static_cast<size_t>(at)];
  return OkStatus();
}

StatusOr<PackedSample> Deliver(TokenStore& store, int64_t view, const ViewSample& plan,
                               int64_t seq_len, bool document_mask) {
  PackedSample sample;
  const size_t slots = static_cast<size_t>(seq_len);
  sample.tokens.assign(slots, std::max(store.info().pad_id, 0));
  sample.labels.assign(slots, -1);
  sample.positions.assign(slots, 0);
  sample.cu_seqlens = {0};
  int64_t at = 0;
  bool document_ended = false;  // before slot `at`
  for (const DocumentRun& run : plan.runs) {
    SALA_ASSIGN_OR_RETURN(TokenFile * file, store.File(run.file));
    SALA_RETURN_IF_ERROR(FillRun(*file, store.info().sft(), run, at, &sample));
    if (!document_mask && document_ended && run.start == 0)
      SALA_RETURN_IF_ERROR(JoinDocuments(*file, store.info().sft(), run, at, &sample));
    document_ended = run.start + run.length == file->length(run.document);
    if (!document_mask) {
      std::iota(sample.positions.begin() + at, sample.positions.begin() + at + run.length,
                static_cast<int32_t>(at));
    }
    at += run.length;
    sample.segments.push_back({view, run.file, run.document, run.start, run.length});
    if (document_mask) sample.cu_seqlens.push_back(static_cast<int32_t>(at));
  }
  if (!document_mask) sample.cu_seqlens.push_back(static_cast<int32_t>(at));
  sample.padding = seq_len - at;
  if (sample.padding > 0) {
    std::iota(sample.positions.begin() + at, sample.positions.end(), 0);
    sample.cu_seqlens.push_back(static_cast<int32_t>(seq_len));
  }
  return sample;
}

std::string ViewName(const ViewConfig& config, const DatasetInfo& info) {
  return config.name.value_or(info.name);
}

// One line for each leaf in which two JSON values differ.
void Differences(const json& saved, const json& now, const std::string& path,
                 std::vector<std::string>* out) {
  if (saved == now) return;
  if (saved.is_object() && now.is_object()) {
    std::set<std::string> keys;
    for (const auto& [key, value] : saved.items()) keys.insert(key);
    for (const auto& [key, value] : now.items()) keys.insert(key);
    const std::string prefix = path.empty() ? "" : path + ".";
    for (const std::string& key : keys)
      Differences(saved.value(key, json()), now.value(key, json()), std::string(prefix).append(key),
                  out);
    return;
  }
  if (saved.is_array() && now.is_array()) {
    for (size_t i = 0; i < std::max(saved.size(), now.size()); ++i) {
      Differences(i < saved.size() ? saved[i] : json(), i < now.size() ? now[i] : json(),
                  path + "." + std::to_string(i), out);
    }
    return;
  }
  out->push_back(path + " was " + saved.dump() + ", is " + now.dump());
}

}  // namespace

int64_t PackedSample::targets() const {
  return std::count_if(labels.begin(), labels.end(), [](int32_t label) { return label >= 0; });
}

uint32_t DataCrc(const PackedSample& sample) {
  uint32_t crc = 0;
  for (const auto* array : {&sample.tokens, &sample.labels, &sample.cu_seqlens})
    crc = Crc32c(array->data(), array->size() * sizeof(int32_t), crc);
  return crc;
}

StatusOr<std::unique_ptr<SampleStream>> SampleStream::Open(const DataConfig& config,
                                                           const std::string& stage_name,
                                                           int64_t seq_len,
                                                           const Tokenizer& tokenizer) {
  SALA_CHECK(seq_len > 0 && seq_len <= (int64_t{1} << 30)) << "seq_len " << seq_len;
  std::vector<double> weights;
  for (const ViewConfig& view : config.mixture) weights.push_back(view.weight);
  SALA_ASSIGN_OR_RETURN(Mixture mixture, Mixture::Make(weights));
  std::unique_ptr<SampleStream> stream(new SampleStream(std::move(mixture)));
  stream->config_ = config;
  stream->stage_ = stage_name;
  stream->seq_len_ = seq_len;
  Stores stores(config.verify, tokenizer);
  std::set<std::string> names;
  for (const ViewConfig& view : config.mixture) {
    SALA_ASSIGN_OR_RETURN(auto store, stores.Open(view.dataset));
    const std::string name = ViewName(view, store->info());
    if (!names.insert(name).second) {
      return MakeError(
          ExitCode::kConfig, "CFG-CONFLICT",
          "data.mixture: two views are named " + Printable(name) + "; give each its own `name`");
    }
    const PackRule rule{config.packing, config.long_documents, seq_len, config.max_segments};
    SALA_ASSIGN_OR_RETURN(auto opened, View::Open(view, config, {config.seed, stage_name, name},
                                                  rule, Split::kTraining, std::move(store)));
    stream->views_.push_back(std::move(opened));
  }
  stream->fingerprint_json_ =
      Fingerprint(config, stage_name, seq_len, stream->mixture_, stream->views_);
  stream->fingerprint_ = Sha256Hex(stream->fingerprint_json_.dump());
  return stream;
}

Status SampleStream::EpochError(const View& view, int64_t samples) const {
  const double epochs =
      static_cast<double>(samples) / static_cast<double>(view.samples_per_epoch());
  return MakeError(ExitCode::kConfig, "MIX-EPOCHS",
                   "view " + view.name() + " of stage " + stage_ + ": the stage needs " +
                       std::to_string(samples) + " samples of it, " + std::to_string(epochs) +
                       " epochs of " + std::to_string(view.samples_per_epoch()) +
                       " samples; max_epochs is " + std::to_string(view.max_epochs()) +
                       "; lower its weight, add data or raise max_epochs");
}

Status SampleStream::CheckEpochs(int64_t total_samples) {
  const std::vector<int64_t>& counts = mixture_.CountsBefore(total_samples);
  for (size_t i = 0; i < views_.size(); ++i) {
    if (counts[i] > views_[i]->samples_per_epoch() * views_[i]->max_epochs())
      return EpochError(*views_[i], counts[i]);
  }
  return OkStatus();
}

StatusOr<PackedSample> SampleStream::Get(int64_t g) {
  const Mixture::Choice choice = mixture_.At(g);
  View& view = *views_[static_cast<size_t>(choice.view)];
  if (choice.index >= view.samples_per_epoch() * view.max_epochs())
    return EpochError(view, choice.index + 1);
  return Deliver(view.store(), choice.view, view.Sample(choice.index), seq_len_,
                 config_.document_mask);
}

json SampleStream::Cursor(int64_t g) {
  json counts = json::object();
  const std::vector<int64_t>& before = mixture_.CountsBefore(g);
  for (size_t i = 0; i < views_.size(); ++i) counts[views_[i]->name()] = before[i];
  return {{"stage", stage_},
          {"g", g},
          {"counts", counts},
          {"fingerprint", fingerprint_},
          {"data", fingerprint_json_}};
}

Status SampleStream::CheckCursor(const json& saved) {
  std::vector<std::string> differences;
  if (!saved.is_object() || !saved.contains("g") || !saved["g"].is_number_integer() ||
      saved["g"] < 0) {
    differences.emplace_back("the saved cursor has no sample index g");
  } else {
    const json now = Cursor(saved["g"].get<int64_t>());
    Differences(saved.value("data", json::object()), fingerprint_json_, "", &differences);
    if (differences.empty()) Differences(saved, now, "cursor", &differences);
  }
  if (differences.empty()) return OkStatus();
  std::string text = "the data of stage " + stage_ + " is not that of the checkpoint: ";
  for (size_t i = 0; i < differences.size(); ++i) text += (i > 0 ? "; " : "") + differences[i];
  return MakeError(ExitCode::kConfig, "DATA-CHANGED",
                   text + "; restore the data and its configuration");
}

StatusOr<std::unique_ptr<ValidationSet>> ValidationSet::Open(const DataConfig& config,
                                                             int64_t seq_len,
                                                             const Tokenizer& tokenizer) {
  std::unique_ptr<ValidationSet> set(new ValidationSet());
  set->seq_len_ = seq_len;
  set->document_mask_ = config.document_mask;
  if (config.validation.fraction <= 0) return set;
  Stores stores(config.verify, tokenizer);
  std::set<std::string> seen;
  const std::vector<std::string>& measured = config.validation.datasets;
  const int64_t most = std::max<int64_t>(1, config.validation.max_tokens / seq_len);
  for (size_t i = 0; i < config.mixture.size(); ++i) {
    // A dataset that several views share counts once, whatever their length ranges.
    const std::string& dataset = config.mixture[i].dataset;
    if (!seen.insert(dataset).second) continue;
    if (!measured.empty() && std::find(measured.begin(), measured.end(), dataset) == measured.end())
      continue;
    SALA_ASSIGN_OR_RETURN(auto store, stores.Open(dataset));
    ViewConfig whole;
    whole.dataset = dataset;
    const PackRule rule{Packing::kBestFit, config.long_documents, seq_len, config.max_segments};
    auto view = View::Open(whole, config, {config.seed, "validation", store->info().name}, rule,
                           Split::kHeldOut, store);
    if (ErrorCodeOf(view.status()) == "DS-EMPTY") continue;  // nothing of this dataset is held out
    SALA_RETURN_IF_ERROR(view.status());
    set->stores_.resize(config.mixture.size());
    set->stores_[i] = store;
    for (int64_t k = 0; k < (*view)->samples_per_epoch(); ++k)
      set->samples_.push_back({static_cast<int64_t>(i), (*view)->Sample(k)});
  }
  // One of each dataset in turn, so that a small limit still sees every dataset.
  std::map<int64_t, int64_t> rank;
  std::vector<std::pair<int64_t, size_t>> order;
  for (size_t s = 0; s < set->samples_.size(); ++s)
    order.emplace_back(rank[set->samples_[s].view]++, s);
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Entry> chosen;
  std::set<std::array<int64_t, 3>> documents;
  for (const auto& [r, s] : order) {
    if (static_cast<int64_t>(chosen.size()) == most) break;
    for (const DocumentRun& run : set->samples_[s].sample.runs)
      documents.insert({set->samples_[s].view, run.file, run.document});
    chosen.push_back(std::move(set->samples_[s]));
  }
  set->samples_ = std::move(chosen);
  set->documents_ = static_cast<int64_t>(documents.size());
  return set;
}

StatusOr<PackedSample> ValidationSet::Get(int64_t index) const {
  SALA_CHECK(index >= 0 && index < size()) << "validation sample " << index;
  const Entry& entry = samples_[static_cast<size_t>(index)];
  return Deliver(*stores_[static_cast<size_t>(entry.view)], entry.view, entry.sample, seq_len_,
                 document_mask_);
}

}  // namespace sala::data
