#include "core/status.h"

#include "absl/strings/cord.h"
#include "core/check.h"

namespace sala {
namespace {

constexpr char kExitUrl[] = "sala/exit";
constexpr char kCodeUrl[] = "sala/code";

// The nearest canonical code, for callers that look at status.code().
absl::StatusCode Canonical(ExitCode exit_code) {
  switch (exit_code) {
    case ExitCode::kOk:
      return absl::StatusCode::kOk;
    case ExitCode::kUsage:
    case ExitCode::kConfig:
      return absl::StatusCode::kInvalidArgument;
    case ExitCode::kData:
      return absl::StatusCode::kDataLoss;
    case ExitCode::kNoInput:
      return absl::StatusCode::kNotFound;
    case ExitCode::kInternal:
      return absl::StatusCode::kInternal;
    case ExitCode::kDevice:
    case ExitCode::kIo:
      return absl::StatusCode::kUnavailable;
    case ExitCode::kRequeue:
      return absl::StatusCode::kAborted;
    case ExitCode::kNumbers:
      return absl::StatusCode::kOutOfRange;
  }
  return absl::StatusCode::kUnknown;
}

std::string Payload(const Status& status, const char* url) {
  auto payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : std::string();
}

}  // namespace

Status MakeError(ExitCode exit_code, std::string_view code, std::string_view text) {
  SALA_CHECK(exit_code != ExitCode::kOk) << "an error needs a non-zero exit code";
  const std::string message = std::string(code) + ": " + std::string(text);
  Status status(Canonical(exit_code), message);
  status.SetPayload(kExitUrl, absl::Cord(std::to_string(static_cast<int>(exit_code))));
  status.SetPayload(kCodeUrl, absl::Cord(std::string(code)));
  return status;
}

ExitCode ExitCodeOf(const Status& status) {
  if (status.ok()) return ExitCode::kOk;
  const std::string exit_code = Payload(status, kExitUrl);
  return exit_code.empty() ? ExitCode::kInternal : static_cast<ExitCode>(std::stoi(exit_code));
}

std::string ErrorCodeOf(const Status& status) { return Payload(status, kCodeUrl); }

std::string MessageOf(const Status& status) {
  return std::string(status.message().data(), status.message().size());
}

Status Annotate(const Status& status, std::string_view context) {
  if (status.ok()) return status;
  const std::string code = ErrorCodeOf(status);
  std::string text = MessageOf(status);
  if (!code.empty() && text.rfind(code + ": ", 0) == 0) text = text.substr(code.size() + 2);
  return MakeError(ExitCodeOf(status), code.empty() ? "INTERNAL" : code,
                   std::string(context) + ": " + text);
}

}  // namespace sala
