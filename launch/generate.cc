// sala generate: continues a prompt, text shown as it comes.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "data/chat_renderer.h"
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
  std::string chat_template = "chatml";
  std::string sparse = "auto";
  int threads = 0;
  model::SamplingOptions sampling;
};

struct Prompt {
  std::vector<int32_t> ids;
  std::vector<int32_t> stop;  // ids that end the text
};

StatusOr<Prompt> MakePrompt(const GenerateOptions& options, const std::string& tokenizer_path,
                            const data::Tokenizer& tokenizer, const model::ModelConfig& config) {
  Prompt prompt;
  prompt.stop.push_back(static_cast<int32_t>(config.eos_token_id));
  if (tokenizer.eos_id() >= 0) prompt.stop.push_back(tokenizer.eos_id());
  if (options.chat) {
    SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::ChatRenderer> renderer,
                          data::ChatRenderer::Open(options.chat_template, tokenizer_path, tokenizer,
                                                   data::ChatMask::kAllAssistant));
    const data::ChatRecord record{.messages = {{.role = "user", .content = options.prompt}},
                                  .tools = ""};
    SALA_ASSIGN_OR_RETURN(prompt.ids, renderer->EncodePrompt(record));
    const std::vector<int32_t> ends = renderer->TurnEnds();
    prompt.stop.insert(prompt.stop.end(), ends.begin(), ends.end());
    return prompt;
  }
  if (tokenizer.bos_id() >= 0) prompt.ids.push_back(tokenizer.bos_id());
  const std::vector<int32_t> body = tokenizer.Encode(options.prompt);
  prompt.ids.insert(prompt.ids.end(), body.begin(), body.end());
  const auto im_end = tokenizer.added_tokens().find(data::kImEnd);
  if (im_end != tokenizer.added_tokens().end()) prompt.stop.push_back(im_end->second);
  if (prompt.ids.empty())
    return MakeError(ExitCode::kUsage, "USAGE",
                     "--prompt is empty and the tokenizer has no start token; give some text");
  return prompt;
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
  SALA_ASSIGN_OR_RETURN(Prompt prompt, MakePrompt(options, path, *tokenizer, loaded.config));
  options.sampling.stop_tokens = std::move(prompt.stop);

  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  ThreadPool pool(options.threads > 0 ? options.threads : std::max(1, cores));
  Arena arena;
  Arena scratch;
  const Context ctx{.pool = &pool, .scratch = &scratch};
  const model::Model model(loaded.config, loaded.params);
  data::StreamDecoder decoder(tokenizer.get());
  if (!options.chat) Show(options.prompt);
  model::Generate(ctx, arena, model, prompt.ids, {.sparse_attention = sparse}, options.sampling,
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
  CLI::Option* chat =
      command->add_flag("--chat", options->chat, "the prompt is a user's turn of a chat");
  command
      ->add_option("--chat-template", options->chat_template,
                   "of --chat, as the chats were ingested with: chatml, qwen2, llama3, plain, a "
                   ".jinja file, or tokenizer for the tokenizer's own")
      ->needs(chat)
      ->capture_default_str();
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
