#include "data/jinja.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "core/file.h"
#include "core/json.h"
#include "data/jinja_script.h"

namespace sala::data {
namespace {

// Keys stay in the order of the record: templates print whole objects with tojson.
using json = nlohmann::ordered_json;
using std::chrono::steady_clock;

Status HelperError(const std::string& name, const std::string& text) {
  return MakeError(ExitCode::kIo, "CHAT-HELPER", "template " + name + ": " + text);
}

std::string Framed(const json& request) {
  const std::string body = DumpJson(request);
  std::string framed(8, '\0');
  for (size_t i = 0; i < 8; ++i) framed[i] = static_cast<char>(body.size() >> (8 * i));
  return framed + body;
}

// What the helper answered in place of a result, as an error; OK when it is a result.
Status AnswerError(const std::string& name, const json& answer) {
  if (answer.contains("missing")) {
    return HelperError(name, "Jinja2 cannot be loaded (" +
                                 Printable(answer["missing"].get<std::string>()) +
                                 "); install the package python3-jinja2");
  }
  if (answer.contains("error")) {
    const int64_t line = answer.value("line", int64_t{0});
    return MakeError(ExitCode::kData, "CHAT-TEMPLATE",
                     "template " + name + (line > 0 ? ", line " + std::to_string(line) : "") +
                         ": " + Printable(answer["error"].get<std::string>()));
  }
  return OkStatus();
}

}  // namespace

// One process, with a socket as its standard input and output.
class JinjaTemplate::Helper {
 public:
  static StatusOr<std::unique_ptr<Helper>> Start(const std::string& name, const Options& options) {
    std::array<int, 2> ends{};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0)
      return HelperError(name, "no socket: " + std::generic_category().message(errno));
    std::unique_ptr<Helper> helper(new Helper(name, options.timeout_seconds, ends[0]));
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    std::string program = options.python;
    std::string option = "-c";
    std::string script = kJinjaHelperScript;
    const std::array<char*, 4> argv = {program.data(), option.data(), script.data(), nullptr};
    const int error =
        posix_spawnp(&helper->pid_, program.c_str(), &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    if (error != 0) {
      helper->pid_ = -1;
      return HelperError(name, options.python + " cannot be started (" +
                                   std::generic_category().message(error) +
                                   "); templates are rendered by Python: install the packages "
                                   "python3 and python3-jinja2");
    }
    return helper;
  }

  Helper(const Helper&) = delete;
  Helper& operator=(const Helper&) = delete;
  // A helper is idle then or of no more use.
  ~Helper() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      Wait();
    }
    close(socket_);
  }

  StatusOr<json> Ask(const std::string& framed) {
    const auto limit = std::chrono::duration_cast<steady_clock::duration>(
        std::chrono::duration<double>(timeout_seconds_));
    deadline_ = steady_clock::now() + limit;
    SALA_RETURN_IF_ERROR(Move(POLLOUT, framed.size(), [&](size_t at) {
      return send(socket_, framed.data() + at, framed.size() - at, MSG_NOSIGNAL | MSG_DONTWAIT);
    }));
    std::string head(8, '\0');
    SALA_RETURN_IF_ERROR(Receive(&head));
    uint64_t size = 0;
    for (size_t i = 0; i < 8; ++i)
      size |= static_cast<uint64_t>(static_cast<unsigned char>(head[i])) << (8 * i);
    constexpr uint64_t kMost = uint64_t{1} << 32;
    if (size > kMost)
      return HelperError(name_, "the helper sent something that is no answer; is " +
                                    std::string("python3 in PATH the interpreter itself?"));
    std::string body(size, '\0');
    SALA_RETURN_IF_ERROR(Receive(&body));
    json answer = json::parse(body, nullptr, /*allow_exceptions=*/false);
    if (!answer.is_object()) return HelperError(name_, "the helper's answer is not JSON");
    started_ = true;
    return answer;
  }

 private:
  Helper(std::string name, double timeout_seconds, int socket)
      : name_(std::move(name)), timeout_seconds_(timeout_seconds), socket_(socket) {}

  Status Receive(std::string* into) {
    return Move(POLLIN, into->size(), [&](size_t at) {
      return recv(socket_, into->data() + at, into->size() - at, MSG_DONTWAIT);
    });
  }

  // Calls move(bytes done) until `size` bytes are, or the time is over.
  template <typename MoveSome>
  Status Move(int16_t event, size_t size, const MoveSome& move) {
    for (size_t at = 0; at < size;) {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ - steady_clock::now());
      pollfd waited{socket_, event, 0};
      if (left.count() <= 0 || poll(&waited, 1, static_cast<int>(left.count())) == 0)
        return TookTooLong();
      const ssize_t moved = move(at);
      if (moved > 0) {
        at += static_cast<size_t>(moved);
      } else if (moved == 0 || (errno != EAGAIN && errno != EINTR)) {
        return Died();
      }
    }
    return OkStatus();
  }

  // Of the helper itself before its first answer, later of the record.
  Status TookTooLong() const {
    const std::string limit = std::to_string(static_cast<int64_t>(timeout_seconds_)) + " s";
    if (!started_)
      return HelperError(name_, "the Python process that renders it did not start within " + limit);
    return MakeError(ExitCode::kData, "CHAT-TEMPLATE",
                     "template " + name_ + ": did not end within " + limit +
                         " for the record; look for a loop without end in it");
  }

  Status Died() {
    kill(pid_, SIGKILL);  // it may have closed its end only
    const int status = Wait();
    const bool by_us = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    std::string how = "ended";
    if (WIFEXITED(status)) how = "ended with exit code " + std::to_string(WEXITSTATUS(status));
    if (WIFSIGNALED(status) && !by_us)
      how = "was ended by signal " + std::to_string(WTERMSIG(status));
    return HelperError(
        name_, "the Python process that renders it " + how + "; try: python3 -c \"import jinja2\"");
  }

  int Wait() {
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return status;
  }

  std::string name_;
  double timeout_seconds_;
  int socket_;
  pid_t pid_ = -1;
  bool started_ = false;  // its first answer came
  steady_clock::time_point deadline_;
};

JinjaTemplate::~JinjaTemplate() = default;

StatusOr<std::unique_ptr<JinjaTemplate>> JinjaTemplate::Open(
    const std::string& name, const std::string& text,
    const std::map<std::string, std::string>& variables, const Options& options) {
  std::unique_ptr<JinjaTemplate> opened(new JinjaTemplate());
  opened->name_ = name;
  opened->options_ = options;
  opened->first_request_ = Framed({{"template", text}, {"variables", variables}});
  SALA_ASSIGN_OR_RETURN(auto helper, opened->Start(&opened->has_generation_blocks_));
  opened->idle_.push_back(std::move(helper));
  return opened;
}

StatusOr<std::unique_ptr<JinjaTemplate::Helper>> JinjaTemplate::Start(bool* generation) {
  SALA_ASSIGN_OR_RETURN(auto helper, Helper::Start(name_, options_));
  SALA_ASSIGN_OR_RETURN(const json answer, helper->Ask(first_request_));
  SALA_RETURN_IF_ERROR(AnswerError(name_, answer));
  *generation = answer.value("generation", false);
  return helper;
}

StatusOr<JinjaAnswer> JinjaTemplate::Render(const JinjaRequest& request) {
  std::unique_ptr<Helper> helper;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      helper = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (helper == nullptr) {
    bool generation = false;  // known since the first helper
    SALA_ASSIGN_OR_RETURN(helper, Start(&generation));
  }
  json renders = json::array();
  for (const JinjaRender& r : request.renders)
    renders.push_back(json::array({r.messages, r.generation_prompt}));
  SALA_ASSIGN_OR_RETURN(
      const json answer,
      helper->Ask(Framed({{"messages", json::parse(request.messages)},
                          {"tools", request.tools.empty() ? json() : json::parse(request.tools)},
                          {"spans", request.spans},
                          {"renders", renders}})));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(helper));
  }
  SALA_RETURN_IF_ERROR(AnswerError(name_, answer));
  JinjaAnswer out;
  for (const json& text : answer.at("texts")) out.texts.push_back(text.get<std::string>());
  for (const json& span : answer.at("spans"))
    out.spans.push_back({span.at(0).get<int64_t>(), span.at(1).get<int64_t>()});
  return out;
}

}  // namespace sala::data
