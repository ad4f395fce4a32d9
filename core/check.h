// SALA_CHECK(condition) << "detail": aborts with file, line, rank and host when an invariant of
// ours is broken. For mistakes of users, files and clusters return a Status instead
// (core/status.h).
#pragma once

#include <sstream>

namespace sala {

// Shown in every fatal message; set once by the program after MPI is up.
void SetProcessIdentity(int rank, const char* host);

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  CheckFailure(const CheckFailure&) = delete;
  CheckFailure& operator=(const CheckFailure&) = delete;
  [[noreturn]] ~CheckFailure();  // NOLINT(bugprone-exception-escape): prints and ends the process
                                 // with exit code 70
  std::ostream& stream() { return text_; }

 private:
  std::ostringstream text_;
};

// Lets the macro below have type void on both branches.
struct CheckVoidify {
  void operator&(std::ostream&) {}  // NOLINT(google-runtime-operator)
};

}  // namespace sala

#define SALA_CHECK(condition) \
  (condition)                 \
      ? static_cast<void>(0)  \
      : ::sala::CheckVoidify() & ::sala::CheckFailure(__FILE__, __LINE__, #condition).stream()
