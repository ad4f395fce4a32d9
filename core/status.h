// Errors that a user, a file or a cluster can cause.
//
// A function that can fail for such a reason returns Status or StatusOr<T>. Every such error has
//   * a short stable code of the error catalogue (docs/errors.md), for example "CKPT-CRC",
//   * the exit code the program ends with (docs/errors.md lists them),
//   * one line of text: what was wrong, where, what was found, what was expected, what to do.
//
//   if (size != expected)
//     return MakeError(ExitCode::kData, "CKPT-SIZE",
//                      path + ": file has " + n + " bytes, manifest says " + m + "; restore it or
//                      remove " + dir);
//
// A broken invariant of our own is SALA_CHECK (core/check.h), not a Status.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace sala {

using Status = absl::Status;
template <typename T>
using StatusOr = absl::StatusOr<T>;

inline Status OkStatus() { return absl::OkStatus(); }

// Exit codes of the program (sysexits.h names where one fits).
enum class ExitCode : int {
  kOk = 0,
  kUsage = 64,     // wrong command line
  kData = 65,      // bad data, corrupt input or checkpoint
  kNoInput = 66,   // an input is missing
  kInternal = 70,  // a broken invariant of ours
  kDevice = 71,    // device, driver, MPI failure, or watchdog time-out
  kIo = 74,        // cannot read or write files
  kRequeue = 75,   // stopped on request, checkpoint complete: run again to go on
  kNumbers = 76,   // non-finite loss or gradient too many times in a row
  kConfig = 78,    // configuration invalid
};

// An error whose message reads "CODE: text".
Status MakeError(ExitCode exit_code, std::string_view code, std::string_view text);

// The exit code an error carries; kOk for an OK status, kInternal for an error that was not made by
// MakeError.
ExitCode ExitCodeOf(const Status& status);

// The catalogue code an error carries ("CKPT-CRC"), or "" where there is none.
std::string ErrorCodeOf(const Status& status);

// The message as a std::string (Abseil's own string_view is not std::string_view everywhere).
std::string MessageOf(const Status& status);

// The same error with "context: " put before its text, codes kept. OK stays OK.
Status Annotate(const Status& status, std::string_view context);

}  // namespace sala

#define SALA_STATUS_CONCAT_INNER(a, b) a##b
#define SALA_STATUS_CONCAT(a, b) SALA_STATUS_CONCAT_INNER(a, b)

#define SALA_RETURN_IF_ERROR(expr)                                                  \
  do {                                                                              \
    if (::sala::Status sala_status = (expr); !sala_status.ok()) return sala_status; \
  } while (false)

// SALA_ASSIGN_OR_RETURN(auto file, OpenFile(path));
#define SALA_ASSIGN_OR_RETURN(lhs, expr) \
  SALA_ASSIGN_OR_RETURN_IMPL(SALA_STATUS_CONCAT(sala_status_or_, __LINE__), lhs, expr)
#define SALA_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                               \
  if (!tmp.ok()) return tmp.status();              \
  lhs = std::move(tmp).value()
