// sala generate: continues a prompt, text shown as it comes; talks over many turns; answers the
// conversations of a file.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "data/chat_record.h"
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
  std::string messages;
  bool chat = false;
  std::string chat_template = "chatml";
  std::string sparse = "auto";
  int threads = 0;
  model::SamplingOptions sampling;
};

void Show(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

// A model that answers, one prompt after the other.
class Speaker {
 public:
  static StatusOr<std::unique_ptr<Speaker>> Open(const GenerateOptions& options) {
    std::unique_ptr<Speaker> speaker(new Speaker(options));
    SALA_RETURN_IF_ERROR(speaker->Load());
    return speaker;
  }

  // What follows the prompt; shown as it comes where `show`.
  std::string Continue(const std::vector<int32_t>& prompt, bool show) {
    std::string text;
    const auto add = [&](const std::string& piece) {
      if (show) Show(piece);
      text += piece;
    };
    data::StreamDecoder decoder(tokenizer_.get());
    model::Generate(ctx_, arena_, *model_, prompt, {.sparse_attention = sparse_}, sampling_,
                    [&](int32_t id) { add(decoder.Push(id)); });
    add(decoder.Finish());
    ++sampling_.seed;  // the next answer is drawn anew
    return text;
  }

  StatusOr<std::vector<int32_t>> EncodeText(const std::string& text) const {
    std::vector<int32_t> ids;
    if (tokenizer_->bos_id() >= 0) ids.push_back(tokenizer_->bos_id());
    const std::vector<int32_t> body = tokenizer_->Encode(text);
    ids.insert(ids.end(), body.begin(), body.end());
    if (!ids.empty()) return ids;
    return MakeError(ExitCode::kUsage, "USAGE",
                     "--prompt is empty and the tokenizer has no start token; give some text");
  }
  const data::ChatRenderer& renderer() const { return *renderer_; }

 private:
  explicit Speaker(const GenerateOptions& options)
      : options_(options),
        sampling_(options.sampling),
        pool_(options.threads > 0
                  ? options.threads
                  : std::max(1, static_cast<int>(std::thread::hardware_concurrency()))),
        ctx_{.pool = &pool_, .scratch = &scratch_} {}

  Status Load() {
    SALA_ASSIGN_OR_RETURN(const std::string path,
                          recipes::TokenizerPathFor(options_.checkpoint, options_.tokenizer));
    SALA_ASSIGN_OR_RETURN(tokenizer_, data::LoadTokenizer(path));
    SALA_ASSIGN_OR_RETURN(recipes::LoadedModel loaded, recipes::LoadModel(options_.checkpoint));
    if (tokenizer_->vocab_size() > loaded.config.vocab_size) {
      return MakeError(ExitCode::kData, "TOK-VOCAB",
                       path + ": has " + std::to_string(tokenizer_->vocab_size()) +
                           " tokens, the model " + std::to_string(loaded.config.vocab_size) +
                           "; name the tokenizer the model was trained with");
    }
    SALA_ASSIGN_OR_RETURN(sparse_,
                          UseSparseAttention(options_.sparse, options_.checkpoint, loaded));
    loaded_ = std::make_unique<recipes::LoadedModel>(std::move(loaded));
    model_ = std::make_unique<model::Model>(loaded_->config, loaded_->params);
    return FindStops(path);
  }

  Status FindStops(const std::string& tokenizer_path) {
    std::vector<int32_t>& stops = sampling_.stop_tokens;
    stops.push_back(static_cast<int32_t>(loaded_->config.eos_token_id));
    if (tokenizer_->eos_id() >= 0) stops.push_back(tokenizer_->eos_id());
    if (options_.chat) {
      SALA_ASSIGN_OR_RETURN(
          renderer_, data::ChatRenderer::Open(options_.chat_template, tokenizer_path, *tokenizer_,
                                              data::ChatMask::kAllAssistant));
      const std::vector<int32_t> ends = renderer_->TurnEnds();
      stops.insert(stops.end(), ends.begin(), ends.end());
      return OkStatus();
    }
    const auto im_end = tokenizer_->added_tokens().find(data::kImEnd);
    if (im_end != tokenizer_->added_tokens().end()) stops.push_back(im_end->second);
    return OkStatus();
  }

  GenerateOptions options_;
  model::SamplingOptions sampling_;
  ThreadPool pool_;
  Arena arena_, scratch_;
  Context ctx_;
  bool sparse_ = false;
  std::unique_ptr<data::Tokenizer> tokenizer_;
  std::unique_ptr<data::ChatRenderer> renderer_;
  std::unique_ptr<recipes::LoadedModel> loaded_;
  std::unique_ptr<model::Model> model_;
};

// Lines of standard input are the user's turns, until it ends.
Status Talk(Speaker& speaker, std::istream& in) {
  const bool terminal = ::isatty(STDIN_FILENO) == 1;
  data::ChatRecord talk;
  while (true) {
    if (terminal) Show("> ");
    std::string line;
    if (!std::getline(in, line)) break;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    talk.messages.push_back({.role = "user", .content = line});
    SALA_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt, speaker.renderer().EncodePrompt(talk));
    talk.messages.push_back({.role = "assistant", .content = speaker.Continue(prompt, true)});
    Show("\n");
  }
  if (terminal) Show("\n");
  return OkStatus();
}

struct Conversation {
  nlohmann::ordered_json json;
  data::ChatRecord record;
  std::vector<int32_t> prompt;
};

StatusOr<Conversation> ParseConversation(const data::ChatRenderer& renderer,
                                         const std::string& line) {
  constexpr char kMessages[] = "messages";
  Conversation talk;
  // The nesting is bounded first: the other parser keeps the order of the keys.
  if (!ParseJson(line).is_object())
    return MakeError(ExitCode::kData, "ING-JSON", "found no JSON object");
  talk.json = nlohmann::ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!talk.json.contains(kMessages) ||
      data::ShapeOf(talk.json, kMessages) != data::ChatShape::kMessages) {
    return MakeError(ExitCode::kData, "ING-FIELD", "found no \"messages\" of role and content");
  }
  SALA_ASSIGN_OR_RETURN(talk.record,
                        data::ParseChat(talk.json, data::ChatShape::kMessages, kMessages));
  if (talk.record.messages.empty() || talk.record.messages.back().role == "assistant") {
    return MakeError(ExitCode::kData, "CHAT-ROLE",
                     "the last turn is not one to be answered; expected the user's or a tool's");
  }
  SALA_ASSIGN_OR_RETURN(talk.prompt, renderer.EncodePrompt(talk.record));
  return talk;
}

// Every conversation of the file, a line each, with the model's answer as its last message. All are
// read before the first is answered.
Status AnswerFile(Speaker& speaker, const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<Conversation> talks;
  std::istringstream lines(text);
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    auto talk = ParseConversation(speaker.renderer(), line);
    if (!talk.ok()) return Annotate(talk.status(), path + ": line " + std::to_string(number));
    talks.push_back(std::move(talk).value());
  }
  if (talks.empty())
    return MakeError(ExitCode::kData, "ING-FIELD", path + ": holds no conversation");
  for (Conversation& talk : talks) {
    talk.json["messages"].push_back(
        {{"role", "assistant"}, {"content", speaker.Continue(talk.prompt, false)}});
    Show(DumpJson(talk.json) + "\n");
  }
  return OkStatus();
}

Status GenerateText(GenerateOptions options, bool has_prompt) {
  const bool from_file = !options.messages.empty();
  if (has_prompt ? from_file : !from_file && !options.chat) {
    return MakeError(ExitCode::kUsage, "USAGE",
                     "give one of --prompt, --messages, or --chat alone, which reads the turns "
                     "from standard input");
  }
  options.chat = options.chat || from_file;
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Speaker> speaker, Speaker::Open(options));
  if (from_file) return AnswerFile(*speaker, options.messages);
  if (!has_prompt) return Talk(*speaker, std::cin);
  std::vector<int32_t> prompt;
  if (options.chat) {
    const data::ChatRecord record{.messages = {{.role = "user", .content = options.prompt}},
                                  .tools = ""};
    SALA_ASSIGN_OR_RETURN(prompt, speaker->renderer().EncodePrompt(record));
  } else {
    SALA_ASSIGN_OR_RETURN(prompt, speaker->EncodeText(options.prompt));
    Show(options.prompt);
  }
  speaker->Continue(prompt, true);
  Show("\n");
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
  CLI::Option* prompt = command->add_option("--prompt", options->prompt,
                                            "text to continue, or the question with --chat");
  command->add_flag("--chat", options->chat,
                    "the prompt is a user's turn of a chat; without --prompt a conversation: each "
                    "line of standard input is a turn");
  command->add_option("--messages", options->messages,
                      "JSON lines with \"messages\": prints them with the answer as the last "
                      "message");
  command
      ->add_option("--chat-template", options->chat_template,
                   "of --chat and --messages, as the chats were ingested with: chatml, qwen2, "
                   "llama3, plain, a .jinja file, or tokenizer for the tokenizer's own")
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
  line.OnUse(command, [options, prompt] { return GenerateText(*options, prompt->count() > 0); });
}

}  // namespace sala::launch
