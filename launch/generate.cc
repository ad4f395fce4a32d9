// sala generate: continues a prompt, text shown as it comes; talks over many turns; answers the
// conversations of a file.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
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
#include "recipes/export_stops.h"
#include "recipes/model_tokenizer.h"

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

// A text that comes in pieces and ends in front of a line that starts a turn.
class Answer {
 public:
  explicit Answer(std::vector<std::string> turn_starts) : starts_(std::move(turn_starts)) {
    for (std::string& start : starts_) start.insert(0, "\n");
  }

  // What more of it is sure.
  std::string Push(const std::string& piece) {
    text_ += piece;
    size_t sure = text_.size();
    for (const std::string& start : starts_) {
      if (const size_t at = text_.find(start); at != std::string::npos) {
        over_ = true;
        text_.resize(at);
        sure = std::min(sure, at);
      }
      for (size_t length = std::min(start.size() - 1, text_.size()); length > 0; --length) {
        if (text_.ends_with(std::string_view(start).substr(0, length)))
          sure = std::min(sure, text_.size() - length);
      }
    }
    return Until(over_ ? text_.size() : sure);
  }
  std::string Finish() { return Until(text_.size()); }
  bool over() const { return over_; }
  const std::string& text() const { return text_; }

 private:
  std::string Until(size_t end) {
    std::string more = end > told_ ? text_.substr(told_, end - told_) : "";
    told_ = std::max(told_, end);
    return more;
  }

  std::vector<std::string> starts_;
  std::string text_;
  size_t told_ = 0;
  bool over_ = false;
};

// A model that answers, one prompt after the other.
class Speaker {
 public:
  // What prompts are made with. The weights come with Load: what is wrong with a prompt shows
  // before they are read.
  static StatusOr<std::unique_ptr<Speaker>> Open(const GenerateOptions& options) {
    std::unique_ptr<Speaker> speaker(new Speaker(options));
    SALA_ASSIGN_OR_RETURN(speaker->tokenizer_path_,
                          recipes::TokenizerPathFor(options.checkpoint, options.tokenizer));
    SALA_ASSIGN_OR_RETURN(speaker->tokenizer_, data::LoadTokenizer(speaker->tokenizer_path_));
    if (options.chat) {
      SALA_ASSIGN_OR_RETURN(
          speaker->renderer_,
          data::ChatRenderer::Open(options.chat_template, speaker->tokenizer_path_,
                                   *speaker->tokenizer_, data::ChatMask::kAllAssistant));
    }
    return speaker;
  }

  Status Load() {
    SALA_ASSIGN_OR_RETURN(recipes::LoadedModel loaded, recipes::LoadModel(options_.checkpoint));
    SALA_RETURN_IF_ERROR(
        recipes::CheckTokenizer(options_.checkpoint, loaded.tokenizer_fingerprint, *tokenizer_));
    if (tokenizer_->vocab_size() > loaded.config.vocab_size) {
      return MakeError(ExitCode::kData, "TOK-VOCAB",
                       Printable(tokenizer_path_) + ": has " +
                           std::to_string(tokenizer_->vocab_size()) + " tokens, the model " +
                           std::to_string(loaded.config.vocab_size) +
                           "; name the tokenizer the model was trained with");
    }
    SALA_ASSIGN_OR_RETURN(sparse_,
                          UseSparseAttention(options_.sparse, options_.checkpoint, loaded));
    for (const int64_t id : recipes::StopIds(loaded, options_.checkpoint, *tokenizer_))
      sampling_.stop_tokens.push_back(static_cast<int32_t>(id));
    loaded_ = std::make_unique<recipes::LoadedModel>(std::move(loaded));
    model_ = std::make_unique<model::Model>(loaded_->config, loaded_->params);
    return OkStatus();
  }

  // What follows the prompt; shown as it comes where `show`.
  std::string Continue(const std::vector<int32_t>& prompt, bool show) {
    Answer answer(renderer_ == nullptr ? std::vector<std::string>() : renderer_->TurnStarts());
    const auto add = [&](const std::string& piece) {
      const std::string more = answer.Push(piece);
      if (show) Show(more);
      return !answer.over();
    };
    data::StreamDecoder decoder(tokenizer_.get());
    model::Generate(ctx_, arena_, *model_, prompt, {.sparse_attention = sparse_}, sampling_,
                    [&](int32_t id) { return add(decoder.Push(id)); });
    if (!answer.over()) add(decoder.Finish());
    const std::string rest = answer.Finish();
    if (show) Show(rest);
    ++sampling_.seed;  // the next answer is drawn anew
    return answer.text();
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

  GenerateOptions options_;
  model::SamplingOptions sampling_;
  ThreadPool pool_;
  Arena arena_, scratch_;
  Context ctx_;
  bool sparse_ = false;
  std::string tokenizer_path_;
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
    const auto prompt = speaker.renderer().EncodePrompt(talk);
    if (!prompt.ok()) {
      // Who types can say it in other words; a program that writes the turns cannot.
      if (!terminal || !data::IsRecordError(prompt.status())) return prompt.status();
      PrintError(prompt.status());
      talk.messages.pop_back();
      continue;
    }
    talk.messages.push_back({.role = "assistant", .content = speaker.Continue(*prompt, true)});
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

// The conversations of the file, a line each.
StatusOr<std::vector<Conversation>> ReadConversations(const data::ChatRenderer& renderer,
                                                      const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<Conversation> talks;
  std::istringstream lines(text);
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    auto talk = ParseConversation(renderer, line);
    if (!talk.ok())
      return Annotate(talk.status(), Printable(path) + ": line " + std::to_string(number));
    talks.push_back(std::move(talk).value());
  }
  if (talks.empty())
    return MakeError(ExitCode::kData, "ING-FIELD", Printable(path) + ": holds no conversation");
  return talks;
}

// Prints each with the model's answer as its last message.
void AnswerAll(Speaker& speaker, std::vector<Conversation> talks) {
  for (Conversation& talk : talks) {
    talk.json["messages"].push_back(
        {{"role", "assistant"}, {"content", speaker.Continue(talk.prompt, false)}});
    Show(DumpJson(talk.json) + "\n");
  }
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
  if (from_file) {
    SALA_ASSIGN_OR_RETURN(std::vector<Conversation> talks,
                          ReadConversations(speaker->renderer(), options.messages));
    SALA_RETURN_IF_ERROR(speaker->Load());
    AnswerAll(*speaker, std::move(talks));
    return OkStatus();
  }
  if (!has_prompt) {
    SALA_RETURN_IF_ERROR(speaker->Load());
    return Talk(*speaker, std::cin);
  }
  std::vector<int32_t> prompt;
  if (options.chat) {
    const data::ChatRecord record{.messages = {{.role = "user", .content = options.prompt}},
                                  .tools = ""};
    SALA_ASSIGN_OR_RETURN(prompt, speaker->renderer().EncodePrompt(record));
  } else {
    SALA_ASSIGN_OR_RETURN(prompt, speaker->EncodeText(options.prompt));
  }
  SALA_RETURN_IF_ERROR(speaker->Load());
  if (!options.chat) Show(options.prompt);
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
