// sala tokenizer: train one, look at it, use it on standard input.
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/log.h"
#include "data/tokenizer.h"
#include "data/train_tokenizer.h"
#include "launch/command.h"
#include "launch/record_rules.h"
#include "launch/tokenizer_check.h"

namespace sala::launch {
namespace {

std::string ReadStandardInput() {
  return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

struct TrainCommand {
  data::TrainTokenizerOptions options;
  std::vector<std::string> rules;
};

Status Train(TrainCommand command) {
  SALA_ASSIGN_OR_RETURN(command.options.reading.rules, ParseRules(command.rules));
  SALA_ASSIGN_OR_RETURN(const data::TrainTokenizerReport report,
                        data::TrainSentencePiece(command.options));
  if (!report.passed_over.empty()) SALA_LOG(Warn) << data::NamePassedOver(report.passed_over);
  const std::string& output = command.options.output;
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(output));
  std::printf("%s: %s tokens, fingerprint %s\n", output.c_str(),
              WithCommas(tokenizer->vocab_size()).c_str(), tokenizer->fingerprint().c_str());
  std::printf(
      "  made of %s bytes of text in %s files%s\n", WithCommas(report.text_bytes).c_str(),
      WithCommas(report.files).c_str(),
      report.text_bytes > command.options.max_bytes
          ? (", of which about " + WithCommas(command.options.max_bytes) + " were taken").c_str()
          : "");
  PrintCases(report.cases);
  return OkStatus();
}

struct UseOptions {
  std::string tokenizer;
  std::string text;
  bool has_text = false;  // --text was given: standard input is left alone
  bool special = false;
  bool json = false;
};

Status Info(const UseOptions& options) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(options.tokenizer));
  if (options.json) {
    const nlohmann::json info = {{"name", tokenizer->name()},
                                 {"vocab_size", tokenizer->vocab_size()},
                                 {"fingerprint", tokenizer->fingerprint()},
                                 {"bos_id", tokenizer->bos_id()},
                                 {"eos_id", tokenizer->eos_id()},
                                 {"pad_id", tokenizer->pad_id()},
                                 {"unk_id", tokenizer->unk_id()},
                                 {"added_tokens", tokenizer->added_tokens()}};
    std::printf("%s\n", info.dump(2).c_str());
    return OkStatus();
  }
  std::printf("name         %s\n", tokenizer->name().c_str());
  std::printf("vocabulary   %s\n", WithCommas(tokenizer->vocab_size()).c_str());
  std::printf("fingerprint  %s\n", tokenizer->fingerprint().c_str());
  std::printf("bos, eos, pad, unk  %d, %d, %d, %d  (-1: none)\n", tokenizer->bos_id(),
              tokenizer->eos_id(), tokenizer->pad_id(), tokenizer->unk_id());
  for (const auto& [text, id] : tokenizer->added_tokens())
    std::printf("added        %d %s\n", id, text.c_str());
  return OkStatus();
}

Status Encode(const UseOptions& options) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(options.tokenizer));
  std::vector<int32_t> ids =
      tokenizer->Encode(options.has_text ? options.text : ReadStandardInput());
  if (options.special) tokenizer->AddSpecial(&ids);
  if (options.json) {
    std::printf("%s\n", nlohmann::json(ids).dump().c_str());
    return OkStatus();
  }
  for (size_t i = 0; i < ids.size(); ++i) std::printf("%s%d", i == 0 ? "" : " ", ids[i]);
  std::printf("\n");
  return OkStatus();
}

Status Decode(const UseOptions& options) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(options.tokenizer));
  const std::string place = options.has_text ? "--text" : "standard input";
  std::string given = options.has_text ? options.text : ReadStandardInput();
  // A JSON list, as encode --json writes it, is read as well.
  for (char& c : given) {
    if (c == '[' || c == ']' || c == ',') c = ' ';
  }
  std::istringstream words(given);
  std::vector<int32_t> ids;
  for (std::string word; words >> word;) {
    char* end = nullptr;
    const long long id = std::strtoll(word.c_str(), &end, 10);
    if (*end != '\0' || id < 0 || id >= tokenizer->vocab_size()) {
      return MakeError(ExitCode::kData, "TOK-RANGE",
                       place + ": '" + Printable(word) + "' is not a token id; expected 0 to " +
                           std::to_string(tokenizer->vocab_size() - 1));
    }
    ids.push_back(static_cast<int32_t>(id));
  }
  const std::string text = tokenizer->Decode(ids);
  std::fwrite(text.data(), 1, text.size(), stdout);
  return OkStatus();
}

void AddTrain(CLI::App& group, CommandLine& line) {
  auto command = std::make_shared<TrainCommand>();
  data::TrainTokenizerOptions& options = command->options;
  CLI::App* train =
      AddCommand(group, "train", "SentencePiece BPE with byte fallback from text and chat files",
                 "sala tokenizer train --input texts/ --vocab-size 4096 --to tokenizer");
  train
      ->add_option("--input", options.inputs,
                   ".txt, .jsonl, .ndjson and .json files, also with .gz or .zst, or directories "
                   "of them (.json only by name)")
      ->required();
  train->add_option("--vocab-size", options.vocab_size, "added tokens included")
      ->required()
      ->check(CLI::Range(int64_t{262}, int64_t{1} << 24));
  train->add_option("--to", options.output, "directory to make")->required();
  train->add_option("--text-field", options.reading.text_field, "of .jsonl records, dotted")
      ->capture_default_str();
  train->add_option("--messages-field", options.reading.messages_field, "of chat records")
      ->capture_default_str();
  train->add_option("--rule", command->rules, kRuleHelp);
  train
      ->add_option("--zstd-long", options.reading.zstd_window_log,
                   "largest window of .zst files, as a power of two")
      ->check(CLI::Range(10, 31))
      ->capture_default_str();
  train->add_option("--added-token", options.added_tokens, "tokens after the pieces, in this order")
      ->capture_default_str();
  train
      ->add_option("--max-bytes", options.max_bytes,
                   "of text to train on; of more text lines are drawn")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  train->add_option("--seed", options.seed, "of that draw")->capture_default_str();
  line.OnUse(train, [command] { return Train(*command); });
}

}  // namespace

void AddTokenizerCommands(CommandLine& line) {
  CLI::App* group =
      AddCommand(line.app, "tokenizer", "tokenizers: train, info, encode, decode, verify, stats",
                 "sala tokenizer info bytes");
  group->require_subcommand(1);

  AddTrain(*group, line);

  const auto add = [&](const char* name, const char* description, const char* example,
                       Status (*run)(const UseOptions&)) {
    auto use = std::make_shared<UseOptions>();
    CLI::App* command = AddCommand(*group, name, description, example);
    command->add_option("tokenizer", use->tokenizer, kTokenizerHelp)->required();
    line.OnUse(command, [use, run] { return run(*use); });
    return std::pair(command, use);
  };
  const auto add_text = [](CLI::App* command, const std::shared_ptr<UseOptions>& use) {
    CLI::Option* text = command->add_option("--text", use->text, "in place of standard input");
    command->parse_complete_callback([use, text] { use->has_text = text->count() > 0; });
  };
  const auto [info, info_use] =
      add("info", "what a tokenizer is", "sala tokenizer info tokenizer", &Info);
  info->add_flag("--json", info_use->json, "for scripts");
  const auto [encode, encode_use] =
      add("encode", "text on standard input to ids",
          "printf 'two words' | sala tokenizer encode bytes", &Encode);
  add_text(encode, encode_use);
  encode->add_flag("--special", encode_use->special,
                   "with what its makers put around a text: bos, or as the post-processor says");
  encode->add_flag("--json", encode_use->json, "a JSON list");
  const auto [decode, decode_use] = add("decode", "ids on standard input to text",
                                        "echo 104 105 | sala tokenizer decode bytes", &Decode);
  add_text(decode, decode_use);
  AddTokenizerChecks(*group, line);
}

}  // namespace sala::launch
