// sala completion: the command line's words for a shell, written from the command line itself.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "launch/command.h"

namespace sala::launch {
namespace {

// The words that may follow a command: its subcommands and its options.
std::string WordsOf(const CLI::App& app) {
  std::string words;
  const auto add = [&words](const std::string& word) {
    words += (words.empty() ? "" : " ") + word;
  };
  for (const CLI::App* command : app.get_subcommands({})) add(command->get_name());
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) add("--" + name);
  }
  return words;
}

// One case for each command: its name is the path of words that leads to it. An option of the
// program itself may stand behind any command.
void AddCases(const CLI::App& app, const std::string& path, const std::string& common,
              std::string* cases) {
  std::string words = WordsOf(app);
  if (!common.empty()) words += " " + common;
  *cases += "    '" + path + "') words='" + words + "' ;;\n";
  for (const CLI::App* command : app.get_subcommands({}))
    AddCases(*command, (path.empty() ? "" : path + " ") + command->get_name(), common, cases);
}

// Words of the path are found from the left, as far as they are commands; where a command has
// arguments of its own, files are offered beside its options.
std::string BashCompletion(const CLI::App& app) {
  std::string cases;
  std::string common;
  for (const CLI::Option* option : app.get_options()) {
    const std::string name = option->get_lnames().empty() ? "" : option->get_lnames()[0];
    if (name != "help" && name != "version") common += (common.empty() ? "--" : " --") + name;
  }
  AddCases(app, "", common, &cases);
  return R"(# Completion of sala for bash:  source <(sala completion bash)
# zsh: autoload -U bashcompinit && bashcompinit && source <(sala completion bash)
_sala_words() {
  case "$1" in
)" + cases +
         R"(    *) return 1 ;;
  esac
}
_sala() {
  local words='' path='' next i
  local current=${COMP_WORDS[COMP_CWORD]}
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; ++i)); do
    case ${COMP_WORDS[i]} in -*) continue ;; esac
    next=${path:+$path }${COMP_WORDS[i]}
    _sala_words "$next" || break
    path=$next
  done
  _sala_words "$path"
  local candidates=()
  for next in $words; do
    case $next in
      --*) if [ "${current#-}" != "$current" ]; then candidates+=("$next"); fi ;;
      *) candidates+=("$next") ;;
    esac
  done
  local found
  while IFS= read -r found; do COMPREPLY+=("$found"); done < <(compgen -W "${candidates[*]}" -- "$current")
  return 0
}
complete -o default -o bashdefault -F _sala sala
)";
}

}  // namespace

void AddCompletionCommand(CommandLine& line) {
  CLI::App* group = AddCommand(line.app, "completion", "completion of commands for a shell",
                               "source <(sala completion bash)");
  group->require_subcommand(1);
  CLI::App* bash = AddCommand(*group, "bash", "for bash, and for zsh with bashcompinit",
                              "source <(sala completion bash)");
  line.OnUse(bash, [&line] {
    std::printf("%s", BashCompletion(line.app).c_str());
    return OkStatus();
  });
}

}  // namespace sala::launch
