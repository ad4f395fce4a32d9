#include "recipes/verify_data.h"

#include <cstdint>
#include <memory>
#include <string>

#include "core/hash.h"
#include "core/rng.h"
#include "data/token_store.h"
#include "data/tokenizer.h"

namespace sala::recipes {
namespace {

constexpr int64_t kDocuments = 120;

// Small letters; every second one is drawn, the other follows from it, so that there is something
// to learn.
std::string DrawText(PhiloxStream& rng, int64_t bytes) {
  std::string text;
  while (static_cast<int64_t>(text.size()) < bytes) {
    const auto letter = static_cast<int>(rng.Bounded(26));
    text.push_back(static_cast<char>('a' + letter));
    text.push_back(static_cast<char>('a' + (letter * 7 + 3) % 26));
  }
  text.resize(static_cast<size_t>(bytes));
  return text;
}

Status WriteDataset(const VerifyDataset& dataset, int64_t number,
                    const data::Tokenizer& tokenizer) {
  SALA_ASSIGN_OR_RETURN(auto writer,
                        data::TokenStoreWriter::Create({.directory = dataset.directory,
                                                        .name = "made-" + std::to_string(number),
                                                        .sft = dataset.chat},
                                                       tokenizer));
  const int64_t source = writer->AddSource("made", "CC0-1.0", "drawn by sala verify");
  PhiloxStream rng("verify_documents|" + std::to_string(number));
  const auto between = [&rng](int64_t least, int64_t most) {
    return least + static_cast<int64_t>(rng.Bounded(static_cast<uint64_t>(most - least + 1)));
  };
  for (int64_t i = 0; i < kDocuments; ++i) {
    const int64_t length =
        i % 2 == 0 ? between(8, dataset.short_tokens) : between(dataset.long_min, dataset.long_max);
    const std::string text = DrawText(rng, length - 2);  // bos and eos are part of the length
    std::vector<int32_t> tokens = tokenizer.Encode(text);
    tokens.insert(tokens.begin(), tokenizer.bos_id());
    tokens.push_back(tokenizer.eos_id());
    std::vector<uint8_t> mask;
    if (dataset.chat) {
      mask.assign(tokens.size(), 1);
      std::fill_n(mask.begin(), tokens.size() / 3, uint8_t{0});  // what the user says
    }
    SALA_RETURN_IF_ERROR(
        writer->Add({.tokens = tokens, .loss_mask = mask, .hash = Xxh3(text), .source = source}));
  }
  return writer->Finish({{"command", "verify"}}).status();
}

}  // namespace

Status WriteVerifyDatasets(const std::vector<VerifyDataset>& datasets) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer("bytes"));
  int64_t number = 0;
  for (const VerifyDataset& dataset : datasets)
    SALA_RETURN_IF_ERROR(WriteDataset(dataset, ++number, *tokenizer));
  return OkStatus();
}

}  // namespace sala::recipes
