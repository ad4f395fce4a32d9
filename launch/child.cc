#include "launch/child.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <system_error>
#include <thread>

#include "core/file.h"

namespace sala::launch {
namespace {

using std::chrono::steady_clock;

// `defaults` as "NAME=value", then the environment of this process.
std::vector<std::string> Environment(
    const std::vector<std::pair<std::string, std::string>>& defaults) {
  std::vector<std::string> all;
  for (const auto& [name, value] : defaults) {
    if (std::getenv(name.c_str()) == nullptr) all.push_back(name + "=" + value);
  }
  for (char** entry = environ; *entry != nullptr; ++entry) all.emplace_back(*entry);
  return all;
}

std::vector<char*> Pointers(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  pointers.reserve(texts.size() + 1);
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

int ExitCodeFrom(int status) {
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Everything in the child's process group.
void EndGroup(pid_t child) {
  kill(-child, SIGTERM);
  constexpr std::chrono::seconds kPatience{3};
  const auto deadline = steady_clock::now() + kPatience;
  while (waitpid(child, nullptr, WNOHANG) == 0) {
    if (steady_clock::now() > deadline) {
      kill(-child, SIGKILL);
      waitpid(child, nullptr, 0);
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  kill(-child, SIGKILL);  // what outlived it
}

Status StartError(const std::string& file, const char* action, int error) {
  return MakeError(ExitCode::kIo, "CHILD-START",
                   file + ": cannot be " + action + ": " + std::strerror(error) +
                       "; look at its permissions, and at the space and limits of this host");
}

}  // namespace

StatusOr<int> RunChild(const ChildProgram& program, const std::function<bool()>& interrupted) {
  std::vector<std::string> words = program.words;
  std::vector<std::string> environment = Environment(program.defaults);
  const std::vector<char*> argv = Pointers(words);
  const std::vector<char*> envp = Pointers(environment);
  const int output = open(program.output.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (output < 0) return StartError(program.output, "written", errno);
  const int input = open("/dev/null", O_RDONLY | O_CLOEXEC);
  const pid_t child = fork();
  if (child == 0) {
    // A group of its own: Ctrl-C at the terminal reaches this process alone, which ends the group.
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    dup2(input, STDIN_FILENO);
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    execve(argv[0], argv.data(), envp.data());
    _exit(127);
  }
  const int error = errno;
  close(output);
  close(input);
  if (child < 0) return StartError(program.words[0], "started", error);
  setpgid(child, child);  // here too: whoever is first
  bool stopped = program.stop_when.empty();
  int status = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (interrupted()) {
      EndGroup(child);
      return MakeError(ExitCode::kRequeue, "STOPPED", "interrupted");
    }
    if (!stopped && PathExists(program.stop_when)) {
      kill(child, SIGUSR2);
      stopped = true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return ExitCodeFrom(status);
}

std::string FindInPath(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    std::string file = (folder.empty() ? "." : folder) + "/" + name;
    if (!IsDirectory(file) && access(file.c_str(), X_OK) == 0) return file;
  }
  return "";
}

StatusOr<std::string> OwnProgram() {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return StartError("/proc/self/exe", "read", error.value());
  return path.string();
}

}  // namespace sala::launch
