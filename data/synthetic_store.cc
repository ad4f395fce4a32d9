// Token stores of made documents (data/synthetic.h).
#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/hash.h"
#include "core/rng.h"
#include "data/chat.h"
#include "data/synthetic.h"

namespace sala::data {
namespace {

using nlohmann::json;

void Surround(const Tokenizer& tokenizer, std::vector<int32_t>* tokens,
              std::vector<uint8_t>* mask) {
  if (tokenizer.bos_id() >= 0) {
    tokens->insert(tokens->begin(), tokenizer.bos_id());
    if (mask != nullptr) mask->insert(mask->begin(), 0);
  }
  if (tokenizer.eos_id() >= 0) {
    tokens->push_back(tokenizer.eos_id());
    if (mask != nullptr) mask->push_back(0);
  }
}

// The learned span of a chat item is from the lead of the answer to the end of the turn: a model
// that is to answer has to start the answer itself.
Status AddItem(const RecallItem& item, bool chat, const Tokenizer& tokenizer,
               TokenStoreWriter* writer) {
  const std::string text = item.prompt_text + item.answer_text;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  if (chat) {
    const std::string turn = std::string(kImStart) + "assistant\n";
    const int64_t begin = static_cast<int64_t>(text.rfind(turn) + turn.size());
    const int64_t end =
        static_cast<int64_t>(text.size()) + static_cast<int64_t>(std::string(kImEnd).size());
    EncodedChat encoded = EncodeChat({text + kImEnd + "\n", {{begin, end}}}, tokenizer);
    tokens = std::move(encoded.tokens);
    mask = std::move(encoded.mask);
  } else {
    tokens = tokenizer.Encode(text);
  }
  Surround(tokenizer, &tokens, chat ? &mask : nullptr);
  return writer->Add({.tokens = tokens, .loss_mask = mask, .hash = Xxh3(text)});
}

}  // namespace

StatusOr<DatasetInfo> MaterialiseSynthetic(const SyntheticOptions& options,
                                           const Tokenizer& tokenizer) {
  RecallOptions recall = options.recall;
  recall.purpose = "train";
  const int64_t longest = options.recall.length_tokens;
  const int64_t shortest = options.min_length_tokens > 0 ? options.min_length_tokens : longest;
  if (options.documents < 1 || shortest > longest) {
    return MakeError(ExitCode::kUsage, "EVAL-TASK",
                     "synthetic dataset " + options.name + ": found " +
                         std::to_string(options.documents) + " documents of " +
                         std::to_string(shortest) + " to " + std::to_string(longest) +
                         " tokens, expected at least one document and a rising range");
  }
  Haystack haystack = Haystack::Filler();
  if (!options.haystack_dataset.empty()) {
    const Haystack::Part part = {Split::kTraining, options.held_out_seed,
                                 options.held_out_fraction};
    SALA_ASSIGN_OR_RETURN(haystack, Haystack::FromDataset(options.haystack_dataset, tokenizer,
                                                          Haystack::kMaxBytes, &part));
  }
  SALA_ASSIGN_OR_RETURN(
      auto writer,
      TokenStoreWriter::Create(
          {.directory = options.output, .name = options.name, .sft = recall.chat}, tokenizer));
  writer->AddSource(NameOf(recall.task), "CC0-1.0", "made by the program");
  PhiloxStream lengths("synth_length|" + std::to_string(recall.seed) + "|" + NameOf(recall.task));
  for (int64_t i = 0; i < options.documents; ++i) {
    recall.length_tokens =
        shortest +
        static_cast<int64_t>(lengths.Bounded(static_cast<uint64_t>(longest - shortest + 1)));
    SALA_ASSIGN_OR_RETURN(const RecallItem item, MakeRecallItem(recall, haystack, tokenizer, i));
    SALA_RETURN_IF_ERROR(AddItem(item, recall.chat, tokenizer, writer.get()));
  }
  json ingest = {{"command", "synth"},
                 {"task", NameOf(recall.task)},
                 {"seed", recall.seed},
                 {"keys", recall.keys},
                 {"min_length_tokens", shortest},
                 {"length_tokens", longest},
                 {"haystack", nullptr},
                 {"shuffled", true}};
  if (!options.haystack_dataset.empty()) {
    ingest["haystack"] = options.haystack_dataset;
    ingest["haystack_without_held_out"] = {{"seed", options.held_out_seed},
                                           {"fraction", options.held_out_fraction}};
  }
  return writer->Finish(ingest);
}

namespace {

// The bytes of a token range as text that is cut at whole characters and, where there is one,
// behind the last line end or space, so that neither part begins in a word.
std::string CutAtSpace(const std::string& text) {
  const size_t space = text.find_last_of(" \n");
  return space == std::string::npos || space < text.size() / 2 ? std::string()
                                                               : text.substr(0, space);
}

// One record from text = prompt + answer; false when the text has no good place to cut.
bool MakeContinuation(const std::string& text, int64_t prompt_bytes,
                      std::vector<ChatMessage>* messages) {
  const std::string prompt = CutAtSpace(text.substr(0, static_cast<size_t>(prompt_bytes)));
  if (prompt.empty()) return false;
  const std::string answer = CutAtSpace(text.substr(prompt.size()));
  if (answer.empty()) return false;
  *messages = {{"user", "Continue this text:\n" + prompt}, {"assistant", answer}};
  return true;
}

class Continuation {
 public:
  Continuation(const ContinuationOptions& options, const Tokenizer& tokenizer,
               TokenStoreWriter* writer)
      : options_(options), tokenizer_(tokenizer), writer_(writer) {}

  // Every record keeps the hash of the document it was cut from: a document held out for validation
  // is held out in all its forms.
  Status AddDocument(const std::vector<int32_t>& ids, uint64_t document_hash) {
    const int64_t step = options_.prompt_tokens + options_.answer_tokens;
    for (int64_t begin = 0; begin + step <= static_cast<int64_t>(ids.size()) && !Full();
         begin += step) {
      const auto first = ids.begin() + begin;
      const std::vector<int32_t> prompt(first, first + options_.prompt_tokens);
      const std::vector<int32_t> both(first, first + step);
      std::vector<ChatMessage> messages;
      const int64_t prompt_bytes = static_cast<int64_t>(tokenizer_.Decode(prompt).size());
      if (!MakeContinuation(tokenizer_.Decode(both), prompt_bytes, &messages)) continue;
      // A text that holds a chat marker cannot be rendered; there is enough other text.
      const auto chat = RenderChat(ChatMl(), messages, ChatMask::kAllAssistant);
      if (!chat.ok()) continue;
      EncodedChat encoded = EncodeChat(*chat, tokenizer_);
      Surround(tokenizer_, &encoded.tokens, &encoded.mask);
      SALA_RETURN_IF_ERROR(writer_->Add(
          {.tokens = encoded.tokens, .loss_mask = encoded.mask, .hash = document_hash}));
    }
    return OkStatus();
  }
  bool Full() const { return options_.documents > 0 && writer_->documents() >= options_.documents; }

 private:
  const ContinuationOptions& options_;
  const Tokenizer& tokenizer_;
  TokenStoreWriter* writer_;
};

}  // namespace

StatusOr<DatasetInfo> MaterialiseContinuation(const ContinuationOptions& options,
                                              const Tokenizer& tokenizer) {
  if (options.prompt_tokens < 1 || options.answer_tokens < 1) {
    return MakeError(
        ExitCode::kUsage, "EVAL-TASK",
        "continuation " + options.name + ": prompt and answer need at least one token");
  }
  SALA_RETURN_IF_ERROR(CheckChatTokens(ChatMl(), tokenizer));
  SALA_ASSIGN_OR_RETURN(auto store, TokenStore::Open(options.dataset));
  SALA_RETURN_IF_ERROR(store->CheckTokenizer(tokenizer));
  SALA_ASSIGN_OR_RETURN(
      auto writer,
      TokenStoreWriter::Create({.directory = options.output, .name = options.name, .sft = true},
                               tokenizer));
  writer->AddSource("continuation", "as " + store->info().name, "made from " + store->info().name);
  Continuation continuation(options, tokenizer, writer.get());
  std::vector<int32_t> ids;
  for (int64_t f = 0; f < store->files(); ++f) {
    SALA_ASSIGN_OR_RETURN(TokenFile * file, store->File(f));
    for (int64_t d = 0; d < file->documents() && !continuation.Full(); ++d) {
      ids.resize(static_cast<size_t>(file->length(d)));
      SALA_RETURN_IF_ERROR(file->CopyTokens(file->begin(d), file->length(d), ids.data()));
      SALA_RETURN_IF_ERROR(continuation.AddDocument(ids, file->hash(d)));
    }
  }
  if (writer->documents() == 0) {
    return MakeError(ExitCode::kData, "DS-EMPTY",
                     options.dataset + ": no document has " +
                         std::to_string(options.prompt_tokens + options.answer_tokens) +
                         " tokens with a space to cut at; ask for shorter parts");
  }
  return writer->Finish({{"command", "continuation"},
                         {"dataset", store->info().fingerprint},
                         {"prompt_tokens", options.prompt_tokens},
                         {"answer_tokens", options.answer_tokens},
                         {"shuffled", false}});
}

}  // namespace sala::data
