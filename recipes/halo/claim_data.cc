#include "recipes/halo/claim_data.h"

#include <algorithm>
#include <array>

#include "core/check.h"
#include "core/hash.h"
#include "core/rng.h"
#include "data/token_store.h"

namespace sala::recipes {
namespace {

constexpr int64_t kKeys = 32, kValues = 6, kFillers = 24;
// First ids of the kinds of tokens.
constexpr int64_t kKey = 0, kValue = kKey + kKeys, kFact = kValue + kValues,
                  kFiller = kFact + kKeys * kValues;
static_assert(kFiller + kFillers <= 256, "ids of bytes");
constexpr int64_t kLongestRun = 7;  // of filler in a stream

int64_t Draw(PhiloxStream& rng, int64_t n) {
  return static_cast<int64_t>(rng.Bounded(static_cast<uint64_t>(n)));
}

// The source's filler: a chain that is the same for all documents of a seed.
class FillerChain {
 public:
  FillerChain(int64_t seed, PhiloxStream& rng) : rng_(rng) {
    PhiloxStream choice("v1|" + std::to_string(seed) + "|halo_claims||0|filler|");
    for (std::array<int64_t, kSuccessors>& row : successors_)
      std::copy_n(choice.Permutation(kFillers).begin(), kSuccessors, row.begin());
    state_ = Draw(rng_, kFillers);
  }

  int64_t Next() {
    const int64_t token = kFiller + state_;
    // Shares of the four successors, in sixteenths: about 1.4 bits a token.
    constexpr std::array<int64_t, kSuccessors> kBelow = {10, 13, 15, 16};
    const int64_t draw = Draw(rng_, kBelow.back());
    size_t which = 0;
    while (draw >= kBelow[which]) ++which;
    state_ = successors_[static_cast<size_t>(state_)][which];
    return token;
  }

 private:
  static constexpr size_t kSuccessors = 4;
  PhiloxStream& rng_;
  std::array<std::array<int64_t, kSuccessors>, kFillers> successors_ = {};
  int64_t state_ = 0;
};

struct Binding {
  int64_t key, value;
  int64_t fact() const { return kFact + key * kValues + value; }
};

std::vector<Binding> DrawBindings(const ClaimDataOptions& options, PhiloxStream& rng) {
  const int64_t count = options.least_keys + Draw(rng, options.keys - options.least_keys + 1);
  std::vector<int64_t> keys = rng.Permutation(kKeys);
  keys.resize(static_cast<size_t>(count));
  std::vector<Binding> bindings;
  bindings.reserve(keys.size());
  for (int64_t key : keys) bindings.push_back({key, Draw(rng, kValues)});
  return bindings;
}

class Writer {
 public:
  explicit Writer(ClaimDocument* document) : document_(document) {}
  void Add(int64_t token, bool recalled = false) {
    document_->tokens.push_back(static_cast<int32_t>(token));
    document_->recalled.push_back(recalled ? 1 : 0);
  }
  void AddQuestion(const Binding& binding) {
    Add(kKey + binding.key);
    Add(kValue + binding.value, /*recalled=*/true);
  }
  int64_t size() const { return static_cast<int64_t>(document_->tokens.size()); }

 private:
  ClaimDocument* document_;
};

void WriteStream(const ClaimDataOptions& options, PhiloxStream& rng, Writer& out) {
  const std::vector<Binding> bindings = DrawBindings(options, rng);
  FillerChain filler(options.seed, rng);
  std::vector<bool> told(bindings.size(), false);
  while (out.size() < options.length) {
    if (rng.NextDouble() < options.filler_share) {
      const int64_t run = 1 + Draw(rng, kLongestRun);
      for (int64_t i = 0; i < run; ++i) out.Add(filler.Next());
      continue;
    }
    const auto which = static_cast<size_t>(Draw(rng, static_cast<int64_t>(bindings.size())));
    if (!told[which] || Draw(rng, 3) == 0) {
      out.Add(bindings[which].fact());
      told[which] = true;
    } else {
      out.AddQuestion(bindings[which]);
    }
  }
}

void WriteNeedle(const ClaimDataOptions& options, PhiloxStream& rng, Writer& out) {
  const std::vector<Binding> bindings = DrawBindings(options, rng);
  FillerChain filler(options.seed, rng);
  for (const Binding& binding : bindings) out.Add(binding.fact());
  while (out.size() < options.length - 2 * options.questions) out.Add(filler.Next());
  for (int64_t q = 0; q < options.questions; ++q)
    out.AddQuestion(
        bindings[static_cast<size_t>(Draw(rng, static_cast<int64_t>(bindings.size())))]);
}

}  // namespace

ClaimDocument MakeClaimDocument(const ClaimDataOptions& options, int64_t index) {
  SALA_CHECK(options.keys <= kKeys && options.least_keys <= options.keys && options.least_keys > 0);
  SALA_CHECK(options.task != ClaimTask::kNeedle ||
             options.keys + 2 * options.questions <= options.length);
  PhiloxStream rng("v1|" + std::to_string(options.seed) + "|halo_claims|" +
                   std::to_string(static_cast<int>(options.task)) + "|" +
                   std::to_string(options.length) + "|" + options.purpose + "|" +
                   std::to_string(index));
  ClaimDocument document;
  Writer out(&document);
  switch (options.task) {
    case ClaimTask::kStream:
      WriteStream(options, rng, out);
      break;
    case ClaimTask::kNeedle:
      WriteNeedle(options, rng, out);
      break;
  }
  document.tokens.resize(static_cast<size_t>(options.length));
  document.recalled.resize(static_cast<size_t>(options.length));
  return document;
}

Status WriteClaimStore(const ClaimDataOptions& options, int64_t count, bool recalled_only,
                       const std::string& directory, const data::Tokenizer& tokenizer) {
  SALA_ASSIGN_OR_RETURN(auto writer, data::TokenStoreWriter::Create({.directory = directory,
                                                                     .name = options.purpose,
                                                                     .sft = recalled_only,
                                                                     .add_bos = false,
                                                                     .add_eos = false},
                                                                    tokenizer));
  writer->AddSource(options.purpose, "CC0-1.0", "made by the program");
  for (int64_t i = 0; i < count; ++i) {
    const ClaimDocument document = MakeClaimDocument(options, i);
    data::TokenDocument entry;
    entry.tokens = document.tokens;
    if (recalled_only) entry.loss_mask = document.recalled;
    entry.hash = Xxh3({reinterpret_cast<const char*>(document.tokens.data()),
                       document.tokens.size() * sizeof(int32_t)});
    SALA_RETURN_IF_ERROR(writer->Add(entry));
  }
  return writer->Finish({{"command", "sala bench halo"}}).status();
}

std::vector<model::Batch> ClaimBatches(const ClaimDataOptions& options, int64_t count,
                                       bool recalled_only) {
  std::vector<model::Batch> batches;
  for (int64_t i = 0; i < count; ++i) {
    const ClaimDocument document = MakeClaimDocument(options, i);
    model::Batch batch = model::SingleDocument(document.tokens);
    for (size_t t = 1; t < document.tokens.size(); ++t) {
      if (!recalled_only || document.recalled[t] != 0) batch.labels[t - 1] = document.tokens[t];
    }
    batches.push_back(std::move(batch));
  }
  return batches;
}

}  // namespace sala::recipes
