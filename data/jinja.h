// Chat templates rendered by Jinja2, in helper processes of Python that requests go to and answers
// come from. Used when data is made and to talk to a model; training never runs Python.
//
//   SALA_ASSIGN_OR_RETURN(auto jinja, JinjaTemplate::Open("qwen.jinja", text, variables));
//   SALA_ASSIGN_OR_RETURN(JinjaAnswer answer, jinja->Render({.messages = "[...]", .renders = {{3,
//   false}}}));
//
// Render may be called from several threads: each call has a helper of its own, which is kept for
// the next call.
//
// Errors: CHAT-TEMPLATE (65): the template is wrong or refuses the conversation, or rendering
// one takes too much time or memory; CHAT-HELPER (74): python3 or Jinja2 is missing, or a helper
// died.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/chat.h"

namespace sala::data {

struct JinjaRender {
  int64_t messages;        // the first so many of the conversation
  bool generation_prompt;  // with the start of an assistant turn behind them
};

struct JinjaRequest {
  std::string messages;    // JSON array
  std::string tools = {};  // JSON array; "": none
  bool spans = false;      // find the generation blocks of the first render
  std::vector<JinjaRender> renders;
};

struct JinjaAnswer {
  std::vector<std::string> texts;  // one per render
  std::vector<ByteSpan> spans;     // of the first text
};

class JinjaTemplate {
 public:
  struct Options {
    std::string python = "python3";  // found in PATH
    double timeout_seconds = 20;     // of one request
  };

  // Starts a helper and compiles the template. `name` is for messages; `variables` what the
  // template sees besides the conversation, as bos_token.
  static StatusOr<std::unique_ptr<JinjaTemplate>> Open(
      const std::string& name, const std::string& text,
      const std::map<std::string, std::string>& variables, const Options& options);
  static StatusOr<std::unique_ptr<JinjaTemplate>> Open(
      const std::string& name, const std::string& text,
      const std::map<std::string, std::string>& variables) {
    return Open(name, text, variables, Options());
  }

  StatusOr<JinjaAnswer> Render(const JinjaRequest& request);

  const std::string& name() const { return name_; }
  bool has_generation_blocks() const { return has_generation_blocks_; }

  JinjaTemplate(const JinjaTemplate&) = delete;
  JinjaTemplate& operator=(const JinjaTemplate&) = delete;
  ~JinjaTemplate();

 private:
  class Helper;
  JinjaTemplate() = default;
  StatusOr<std::unique_ptr<Helper>> Start(bool* generation);

  std::string name_;
  std::string first_request_;
  Options options_;
  bool has_generation_blocks_ = false;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Helper>> idle_;
};

}  // namespace sala::data
