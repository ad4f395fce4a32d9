// sala tokenizer: train one, look at it, use it on standard input.
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "data/ingest.h"
#include "data/tokenizer.h"
#include "launch/command.h"

namespace sala::launch {
namespace {

std::string ReadStandardInput() {
  return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

Status Train(data::TrainTokenizerOptions options) {
  SALA_ASSIGN_OR_RETURN(options.inputs, data::FindInputFiles(options.inputs, {".txt"}));
  SALA_RETURN_IF_ERROR(data::TrainSentencePiece(options));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(options.output));
  std::printf("%s: %s tokens, fingerprint %s\n", options.output.c_str(),
              WithCommas(tokenizer->vocab_size()).c_str(), tokenizer->fingerprint().c_str());
  return OkStatus();
}

Status Info(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(path));
  std::printf("name         %s\n", tokenizer->name().c_str());
  std::printf("vocabulary   %s\n", WithCommas(tokenizer->vocab_size()).c_str());
  std::printf("fingerprint  %s\n", tokenizer->fingerprint().c_str());
  std::printf("bos, eos, pad, unk  %d, %d, %d, %d  (-1: none)\n", tokenizer->bos_id(),
              tokenizer->eos_id(), tokenizer->pad_id(), tokenizer->unk_id());
  for (const auto& [text, id] : tokenizer->added_tokens())
    std::printf("added        %d %s\n", id, text.c_str());
  return OkStatus();
}

Status Encode(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(path));
  const std::vector<int32_t> ids = tokenizer->Encode(ReadStandardInput());
  for (size_t i = 0; i < ids.size(); ++i) std::printf("%s%d", i == 0 ? "" : " ", ids[i]);
  std::printf("\n");
  return OkStatus();
}

Status Decode(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(path));
  std::istringstream words(ReadStandardInput());
  std::vector<int32_t> ids;
  for (std::string word; words >> word;) {
    char* end = nullptr;
    const long long id = std::strtoll(word.c_str(), &end, 10);
    if (*end != '\0' || id < 0 || id >= tokenizer->vocab_size()) {
      return MakeError(ExitCode::kData, "TOK-RANGE",
                       "standard input: '" + Printable(word) +
                           "' is not a token id; expected 0 to " +
                           std::to_string(tokenizer->vocab_size() - 1));
    }
    ids.push_back(static_cast<int32_t>(id));
  }
  const std::string text = tokenizer->Decode(ids);
  std::fwrite(text.data(), 1, text.size(), stdout);
  return OkStatus();
}

}  // namespace

void AddTokenizerCommands(CommandLine& line) {
  CLI::App* group = AddCommand(line.app, "tokenizer", "tokenizers: train, info, encode, decode",
                               "sala tokenizer info bytes");
  group->require_subcommand(1);

  auto options = std::make_shared<data::TrainTokenizerOptions>();
  CLI::App* train =
      AddCommand(*group, "train", "SentencePiece BPE with byte fallback from text files",
                 "sala tokenizer train --input texts/ --vocab-size 4096 --to tokenizer");
  train->add_option("--input", options->inputs, "UTF-8 text files, or directories of .txt files")
      ->required();
  train->add_option("--vocab-size", options->vocab_size, "added tokens included")
      ->required()
      ->check(CLI::Range(int64_t{262}, int64_t{1} << 24));
  train->add_option("--to", options->output, "directory to make")->required();
  train
      ->add_option("--added-token", options->added_tokens, "tokens after the pieces, in this order")
      ->capture_default_str();
  train->add_option("--max-bytes", options->max_bytes, "of text to train on")
      ->capture_default_str();
  train->add_option("--seed", options->seed, "chooses the lines when there is more text")
      ->capture_default_str();
  line.OnUse(train, [options] { return Train(*options); });

  const auto add = [&](const char* name, const char* description, const char* example,
                       Status (*run)(const std::string&)) {
    auto path = std::make_shared<std::string>();
    CLI::App* command = AddCommand(*group, name, description, example);
    command->add_option("tokenizer", *path, "directory, tokenizer.model or the word bytes")
        ->required();
    line.OnUse(command, [path, run] { return run(*path); });
  };
  add("info", "what a tokenizer is", "sala tokenizer info tokenizer", &Info);
  add("encode", "text on standard input to ids", "printf 'two words' | sala tokenizer encode bytes",
      &Encode);
  add("decode", "ids on standard input to text", "echo 104 105 | sala tokenizer decode bytes",
      &Decode);
}

}  // namespace sala::launch
