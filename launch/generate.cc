// sala generate: continues a prompt, text shown as it comes.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "data/chat.h"
#include "data/tokenizer.h"
#include "launch/command.h"
#include "launch/sparse_rule.h"
#include "model/generate.h"
#include "recipes/checkpointing.h"
#include "recipes/export.h"

namespace sala::launch {
namespace {

struct GenerateOptions {
  std::string checkpoint;
  std::string tokenizer;
  std::string prompt;
  bool chat = false;
  std::string sparse = "auto";
  int threads = 0;
  model::SamplingOptions sampling;
};

StatusOr<std::vector<int32_t>> PromptIds(const GenerateOptions& options,
                                         const data::Tokenizer& tokenizer) {
  std::string text = options.prompt;
  if (options.chat) {
    SALA_RETURN_IF_ERROR(data::CheckChatTokens(data::ChatMl(), tokenizer));
    SALA_ASSIGN_OR_RETURN(
        text, data::RenderPrompt(data::ChatMl(), {{.role = "user", .content = options.prompt}}));
  }
  std::vector<int32_t> ids;
  if (tokenizer.bos_id() >= 0) ids.push_back(tokenizer.bos_id());
  const std::vector<int32_t> body = tokenizer.Encode(text);
  ids.insert(ids.end(), body.begin(), body.end());
  if (ids.empty())
    return MakeError(ExitCode::kUsage, "USAGE",
                     "--prompt is empty and the tokenizer has no start token");
  return ids;
}

std::vector<int32_t> StopTokens(const model::ModelConfig& config,
                                const data::Tokenizer& tokenizer) {
  std::vector<int32_t> stop = {static_cast<int32_t>(config.eos_token_id)};
  if (tokenizer.eos_id() >= 0) stop.push_back(tokenizer.eos_id());
  const auto im_end = tokenizer.added_tokens().find(data::kImEnd);
  if (im_end != tokenizer.added_tokens().end()) stop.push_back(im_end->second);
  return stop;
}

void Show(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

Status GenerateText(GenerateOptions options) {
  SALA_ASSIGN_OR_RETURN(const std::string path,
                        recipes::TokenizerPathFor(options.checkpoint, options.tokenizer));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(path));
  SALA_ASSIGN_OR_RETURN(recipes::LoadedModel loaded, recipes::LoadModel(options.checkpoint));
  if (tokenizer->vocab_size() > loaded.config.vocab_size) {
    return MakeError(ExitCode::kData, "TOK-VOCAB",
                     path + ": has " + std::to_string(tokenizer->vocab_size()) +
                         " tokens, the model " + std::to_string(loaded.config.vocab_size) +
                         "; name the tokenizer the model was trained with");
  }
  SALA_ASSIGN_OR_RETURN(const bool sparse,
                        UseSparseAttention(options.sparse, options.checkpoint, loaded));
  SALA_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt, PromptIds(options, *tokenizer));
  options.sampling.stop_tokens = StopTokens(loaded.config, *tokenizer);

  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  ThreadPool pool(options.threads > 0 ? options.threads : std::max(1, cores));
  Arena arena;
  Arena scratch;
  const Context ctx{.pool = &pool, .scratch = &scratch};
  const model::Model model(loaded.config, loaded.params);
  data::StreamDecoder decoder(tokenizer.get());
  if (!options.chat) Show(options.prompt);
  model::Generate(ctx, arena, model, prompt, {.sparse_attention = sparse}, options.sampling,
                  [&](int32_t id) { Show(decoder.Push(id)); });
  Show(decoder.Finish() + "\n");
  return OkStatus();
}

}  // namespace

void AddGenerateCommand(CommandLine& line) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App* command = AddCommand(
      line.app, "generate", "continue a prompt with a trained model",
      "sala generate --ckpt runs/tiny/checkpoints/step-000000380 --prompt 'Once upon a time'");
  command->add_option("--ckpt", options->checkpoint, "checkpoint directory or exported folder")
      ->required();
  command->add_option("--prompt", options->prompt, "text to continue, or the question with --chat")
      ->required();
  command->add_flag("--chat", options->chat, "the prompt is a user's turn of a chat (ChatML)");
  command->add_option("--tokenizer", options->tokenizer,
                      "default: the run's own, or the one in the folder");
  command
      ->add_option("--temperature", options->sampling.temperature,
                   "0: always the most likely token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command
      ->add_option("--top-p", options->sampling.top_p,
                   "sample from the most likely tokens with this probability together")
      ->check(CLI::Range(1e-6, 1.0))
      ->capture_default_str();
  command
      ->add_option("--max-new-tokens", options->sampling.max_new_tokens,
                   "where to stop at the latest")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
      ->capture_default_str();
  command->add_option("--seed", options->sampling.seed, "of the random draws")
      ->capture_default_str();
  command
      ->add_option("--sparse", options->sparse,
                   "block-sparse attention for long prompts: auto (as trained), on, off")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "compute threads; 0: all cores")
      ->check(CLI::Range(0, 1024));
  line.OnUse(command, [options] { return GenerateText(*options); });
}

}  // namespace sala::launch
