#include "core/check.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <string>

namespace sala {
namespace {

std::atomic<int> process_rank{0};
std::string& ProcessHost() {
  static std::string host = "localhost";
  return host;
}

constexpr int kExitInternal =
    70;  // ExitCode::kInternal; status.h is not included here to keep this header small

}  // namespace

void SetProcessIdentity(int rank, const char* host) {
  process_rank = rank;
  ProcessHost() = host;
}

CheckFailure::CheckFailure(const char* file, int line, const char* condition) {
  text_ << "sala: error: INTERNAL: " << file << ":" << line << ": check failed on rank "
        << process_rank << "@" << ProcessHost() << ": " << condition << " ";
}

CheckFailure::~CheckFailure() {
  text_ << "\n";
  const std::string text = text_.str();
  std::fputs(text.c_str(), stderr);
  std::fflush(stderr);
  // _exit: other ranks are ended by the launcher; destructors of a broken state must not run.
  _exit(kExitInternal);
}

}  // namespace sala
