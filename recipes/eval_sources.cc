#include "recipes/eval_sources.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <sstream>
#include <utility>

#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"
#include "data/chat.h"
#include "data/token_store.h"
#include "data/view.h"
#include "recipes/halo/items.h"

namespace sala::recipes {
namespace {

std::string Hex64(uint64_t value) {
  return Hex32(static_cast<uint32_t>(value >> 32)) + Hex32(static_cast<uint32_t>(value));
}

EvalSample AnswerSample(const std::vector<int32_t>& prompt, const std::vector<int32_t>& answer,
                        const std::string& prompt_text) {
  EvalSample sample;
  EvalPart part;
  part.batch = RecallBatch(prompt, answer);
  part.labels = {part.batch.labels};
  sample.parts.push_back(std::move(part));
  sample.hash = Hex64(Xxh3(prompt_text));
  return sample;
}

class RecallSource : public EvalSource {
 public:
  RecallSource(const data::RecallOptions& options, int64_t samples, const data::Haystack& haystack,
               const data::Tokenizer& tokenizer)
      : options_(options),
        task_(data::NameOf(options.task)),
        samples_(samples),
        haystack_(haystack),
        tokenizer_(tokenizer) {}

  const std::string& task() const override { return task_; }
  int64_t length() const override { return options_.length_tokens; }
  int64_t size() const override { return samples_; }

  StatusOr<EvalSample> Make(int64_t index) const override {
    SALA_ASSIGN_OR_RETURN(const data::RecallItem item,
                          data::MakeRecallItem(options_, haystack_, tokenizer_, index));
    EvalSample sample = AnswerSample(item.prompt, item.answer, item.prompt_text);
    sample.depth = item.depth;
    return sample;
  }

 private:
  data::RecallOptions options_;
  std::string task_;
  int64_t samples_;
  const data::Haystack& haystack_;
  const data::Tokenizer& tokenizer_;
};

// Documents of a dataset with at least `length` tokens.
class Documents {
 public:
  static StatusOr<Documents> Open(int64_t length, int64_t samples, const std::string& dataset,
                                  const data::Haystack::Part* part,
                                  const data::Tokenizer& tokenizer) {
    Documents documents;
    auto store = data::TokenStore::Open(dataset);
    if (ErrorCodeOf(store.status()) == "DS-MISSING") {
      return MakeError(ExitCode::kConfig, "EVAL-HAYSTACK",
                       dataset + ": no dataset there to measure losses on");
    }
    SALA_RETURN_IF_ERROR(store.status());
    SALA_RETURN_IF_ERROR((*store)->CheckTokenizer(tokenizer));
    documents.store_ = std::move(store).value();
    int64_t longest = 0;
    int64_t seen = 0;
    for (int64_t f = 0; f < documents.store_->files(); ++f) {
      SALA_ASSIGN_OR_RETURN(const data::TokenFile* file, documents.store_->File(f));
      for (int64_t d = 0; d < file->documents(); ++d) {
        if (part != nullptr && data::IsHeldOut(file->hash(d), part->seed, part->fraction) !=
                                   (part->split == data::Split::kHeldOut))
          continue;
        ++seen;
        longest = std::max(longest, file->length(d));
        if (file->length(d) >= length && static_cast<int64_t>(documents.places_.size()) < samples)
          documents.places_.push_back({f, d});
      }
    }
    if (documents.places_.empty()) {
      return MakeError(ExitCode::kConfig, "EVAL-HAYSTACK",
                       dataset + ": of " + std::to_string(seen) +
                           (part == nullptr ? "" : " held-out") + " documents the longest has " +
                           std::to_string(longest) + " tokens, length " + std::to_string(length) +
                           " needs more; ask for a smaller length or name another dataset");
    }
    return documents;
  }

  int64_t size() const { return static_cast<int64_t>(places_.size()); }

  StatusOr<std::vector<int32_t>> Read(int64_t index, int64_t length, std::string* hash) const {
    const auto [f, d] = places_[static_cast<size_t>(index)];
    SALA_ASSIGN_OR_RETURN(data::TokenFile * file, store_->File(f));
    std::vector<int32_t> ids(static_cast<size_t>(length));
    SALA_RETURN_IF_ERROR(file->CopyTokens(file->begin(d), length, ids.data()));
    *hash = Hex64(file->hash(d));
    return ids;
  }

 private:
  std::unique_ptr<data::TokenStore> store_;
  std::vector<std::pair<int64_t, int64_t>> places_;
};

class LossSource : public EvalSource {
 public:
  LossSource(std::string task, int64_t length, Documents documents)
      : task_(std::move(task)), length_(length), documents_(std::move(documents)) {
    if (task_ == kLossByPosition) {
      for (int64_t from = 1; from < length_; from *= 2)
        ranges_.push_back({from, std::min(2 * from, length_)});
    } else {
      constexpr int64_t kLeastGiven = 64;
      for (int64_t given = length_ - Measured(); given >= kLeastGiven; given /= 2)
        ranges_.push_back({given, given + Measured()});
    }
  }

  const std::string& task() const override { return task_; }
  int64_t length() const override { return length_; }
  int64_t size() const override { return documents_.size(); }
  std::vector<Range> ranges() const override { return ranges_; }
  std::vector<size_t> sets() const override {
    if (task_ == kLossByPosition) return {ranges_.size()};
    return std::vector<size_t>(ranges_.size(), 1);
  }

  StatusOr<EvalSample> Make(int64_t index) const override {
    EvalSample sample;
    SALA_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                          documents_.Read(index, length_, &sample.hash));
    if (task_ == kLossByPosition) {
      EvalPart part;
      part.batch = model::SingleDocument(ids);
      for (const Range& range : ranges_) part.labels.push_back(Labels(ids, range.from, range.to));
      sample.parts.push_back(std::move(part));
      return sample;
    }
    for (const Range& range : ranges_) {
      const std::vector<int32_t> end(ids.end() - range.to, ids.end());
      sample.parts.push_back({model::SingleDocument(end), {Labels(end, range.from, range.to)}});
    }
    return sample;
  }

 private:
  int64_t Measured() const { return std::min<int64_t>(1024, length_ / 2); }

  // The tokens at places [from, to) are to be predicted.
  static std::vector<int32_t> Labels(const std::vector<int32_t>& ids, int64_t from, int64_t to) {
    std::vector<int32_t> labels(ids.size(), -1);
    for (int64_t t = from; t < to; ++t)
      labels[static_cast<size_t>(t - 1)] = ids[static_cast<size_t>(t)];
    return labels;
  }

  std::string task_;
  int64_t length_;
  Documents documents_;
  std::vector<Range> ranges_;
};

struct Prompt {
  std::string prompt, answer, id, group;
};

class PromptSource : public EvalSource {
 public:
  explicit PromptSource(std::string task) : task_(std::move(task)) {}

  const std::string& task() const override { return task_; }
  int64_t length() const override { return length_; }
  int64_t size() const override { return static_cast<int64_t>(samples_.size()); }
  StatusOr<EvalSample> Make(int64_t index) const override {
    return samples_[static_cast<size_t>(index)];
  }

  void Add(EvalSample sample) {
    length_ = std::max(length_, sample.parts[0].batch.size());
    samples_.push_back(std::move(sample));
  }

 private:
  std::string task_;
  int64_t length_ = 0;
  std::vector<EvalSample> samples_;
};

// Groups become names of files.
bool IsGroupName(const std::string& group) {
  return !group.empty() && group.size() <= 64 &&
         std::all_of(group.begin(), group.end(), [](char c) {
           return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-';
         });
}

// "" when the line is a record, else what is wrong.
std::string ReadRecord(const std::string& line, Prompt* prompt) {
  const nlohmann::json json = ParseJson(line);
  if (!json.is_object()) return "no JSON object";
  const std::map<std::string, std::pair<std::string*, bool>> keys = {
      {"prompt", {&prompt->prompt, true}},
      {"answer", {&prompt->answer, true}},
      {"id", {&prompt->id, false}},
      {"group", {&prompt->group, false}}};
  for (const auto& [key, value] : json.items()) {
    const auto known = keys.find(key);
    if (known == keys.end())
      return "unknown key \"" + Printable(key) + "\", expected prompt, answer, id, group";
    if (!value.is_string()) return "\"" + key + "\" is no text";
    *known->second.first = value.get<std::string>();
  }
  for (const auto& [key, place] : keys) {
    if (place.second && place.first->empty()) return "\"" + key + "\" is missing or empty";
  }
  if (json.contains("group") && !IsGroupName(prompt->group))
    return "group \"" + Printable(prompt->group) +
           "\": expected letters, digits, '_' and '-', at most 64";
  return "";
}

StatusOr<EvalSample> EncodePrompt(const Prompt& prompt, bool chat,
                                  const data::Tokenizer& tokenizer) {
  std::string text = prompt.prompt;
  if (chat) {
    SALA_ASSIGN_OR_RETURN(text, data::RenderPrompt(data::ChatMl(), {{"user", prompt.prompt}}));
  }
  const std::vector<int32_t> before = tokenizer.Encode(text);
  const std::vector<int32_t> whole = tokenizer.Encode(text + prompt.answer);
  if (before.size() >= whole.size() || !std::equal(before.begin(), before.end(), whole.begin())) {
    return MakeError(ExitCode::kConfig, "EVAL-BOUNDARY",
                     "with this tokenizer the answer does not start on a token; let the prompt "
                     "end in a word and the answer begin with a space");
  }
  std::vector<int32_t> ids;
  if (tokenizer.bos_id() >= 0) ids.push_back(tokenizer.bos_id());
  ids.insert(ids.end(), before.begin(), before.end());
  const std::vector<int32_t> answer(whole.begin() + static_cast<std::ptrdiff_t>(before.size()),
                                    whole.end());
  if (ids.empty()) return MakeError(ExitCode::kData, "EVAL-PROMPTS", "the prompt has no token");
  EvalSample sample = AnswerSample(ids, answer, text);
  sample.id = prompt.id;
  return sample;
}

}  // namespace

std::unique_ptr<EvalSource> MakeRecallSource(const data::RecallOptions& options, int64_t samples,
                                             const data::Haystack& haystack,
                                             const data::Tokenizer& tokenizer) {
  return std::make_unique<RecallSource>(options, samples, haystack, tokenizer);
}

StatusOr<std::unique_ptr<EvalSource>> OpenLossSource(const std::string& task, int64_t length,
                                                     int64_t samples, const std::string& dataset,
                                                     const data::Haystack::Part* part,
                                                     const data::Tokenizer& tokenizer) {
  constexpr int64_t kShortest = 128;
  if (length < kShortest) {
    return MakeError(ExitCode::kConfig, "EVAL-LENGTH",
                     "task " + task + ": found length " + std::to_string(length) +
                         ", expected at least " + std::to_string(kShortest));
  }
  SALA_ASSIGN_OR_RETURN(Documents documents,
                        Documents::Open(length, samples, dataset, part, tokenizer));
  return std::make_unique<LossSource>(task, length, std::move(documents));
}

StatusOr<std::vector<std::unique_ptr<EvalSource>>> ReadPromptSources(
    const std::string& path, bool chat, const data::Tokenizer& tokenizer) {
  if (chat) SALA_RETURN_IF_ERROR(data::CheckChatTokens(data::ChatMl(), tokenizer));
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  constexpr int64_t kShown = 5;
  std::map<std::string, std::unique_ptr<PromptSource>> groups;
  std::string problems;
  int64_t bad = 0;
  int64_t number = 0;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    Prompt prompt;
    std::string problem = ReadRecord(line, &prompt);
    if (problem.empty()) {
      auto sample = EncodePrompt(prompt, chat, tokenizer);
      if (sample.ok()) {
        auto& source = groups[prompt.group];
        if (source == nullptr) {
          source = std::make_unique<PromptSource>(prompt.group.empty() ? "prompts"
                                                                       : "prompts_" + prompt.group);
        }
        source->Add(std::move(sample).value());
        continue;
      }
      problem = MessageOf(sample.status());
    }
    if (++bad <= kShown)
      problems +=
          (problems.empty() ? "" : "; ") + ("line " + std::to_string(number)) + ": " + problem;
  }
  if (bad > 0) {
    return MakeError(ExitCode::kData, "EVAL-PROMPTS",
                     Printable(path) + ": " + std::to_string(bad) + " of " +
                         std::to_string(number) + " lines cannot be used: " + problems +
                         (bad > kShown ? "; and others" : "") + "; correct or remove them");
  }
  if (groups.empty())
    return MakeError(ExitCode::kData, "EVAL-PROMPTS", Printable(path) + ": holds no record");
  std::vector<std::unique_ptr<EvalSource>> sources;
  sources.reserve(groups.size());
  for (auto& [group, source] : groups) sources.push_back(std::move(source));
  return sources;
}

}  // namespace sala::recipes
