#include "core/tensorboard.h"

#include <bit>
#include <chrono>

#include "core/file.h"
#include "core/hash.h"

namespace sala {
namespace {

// ---- protobuf ----

enum WireType : uint64_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void AppendVarint(std::string& to, uint64_t value) {
  while (value >= 0x80) {
    to += static_cast<char>((value & 0x7F) | 0x80);
    value >>= 7;
  }
  to += static_cast<char>(value);
}

void AppendKey(std::string& to, uint64_t field, WireType type) {
  AppendVarint(to, field << 3 | type);
}

template <typename T>
void AppendLittleEndian(std::string& to, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) to += static_cast<char>(value >> (8 * i) & 0xFF);
}

void AppendBytes(std::string& to, uint64_t field, std::string_view bytes) {
  AppendKey(to, field, kBytes);
  AppendVarint(to, bytes.size());
  to += bytes;
}

void AppendInteger(std::string& to, uint64_t field, int64_t value) {
  AppendKey(to, field, kVarint);
  AppendVarint(to, static_cast<uint64_t>(value));
}

// ---- tensorflow.Event: 1 wall_time, 2 step, 3 file_version, 5 summary, 7 session_log ----

std::string EventAt(double wall_time) {
  std::string event;
  AppendKey(event, 1, kFixed64);
  AppendLittleEndian(event, std::bit_cast<uint64_t>(wall_time));
  return event;
}

constexpr int64_t kSessionStart = 1;

uint32_t MaskedCrc(std::string_view bytes) {
  const uint32_t crc = Crc32c(bytes.data(), bytes.size());
  return std::rotr(crc, 15) + 0xa282ead8U;
}

double WallTime() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

constexpr char kPrefix[] = "events.out.tfevents.";

}  // namespace

std::string EventRecord(std::string_view event) {
  std::string record;
  AppendLittleEndian(record, static_cast<uint64_t>(event.size()));
  AppendLittleEndian(record, MaskedCrc(record));
  record += event;
  AppendLittleEndian(record, MaskedCrc(event));
  return record;
}

std::string VersionEvent(double wall_time) {
  std::string event = EventAt(wall_time);
  AppendBytes(event, 3, "brain.Event:2");
  return event;
}

std::string StartEvent(double wall_time, int64_t step) {
  std::string event = EventAt(wall_time);
  AppendInteger(event, 2, step);
  std::string log;
  AppendInteger(log, 1, kSessionStart);
  AppendBytes(event, 7, log);
  return event;
}

// Summary: 1 value (repeated); Value: 1 tag, 2 simple_value.
std::string ScalarEvent(double wall_time, int64_t step, const Scalars& scalars) {
  std::string event = EventAt(wall_time);
  AppendInteger(event, 2, step);
  std::string summary;
  for (const auto& [tag, number] : scalars) {
    std::string value;
    AppendBytes(value, 1, tag);
    AppendKey(value, 2, kFixed32);
    AppendLittleEndian(value, std::bit_cast<uint32_t>(static_cast<float>(number)));
    AppendBytes(summary, 1, value);
  }
  AppendBytes(event, 5, summary);
  return event;
}

StatusOr<EventFile> EventFile::Create(const std::string& folder, const std::string& host) {
  SALA_RETURN_IF_ERROR(MakeDirectories(folder));
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(folder));
  size_t earlier = 0;
  for (const std::string& name : names) earlier += name.rfind(kPrefix, 0) == 0 ? 1 : 0;
  const std::string number = std::to_string(earlier);
  const std::string path =
      folder + "/" + kPrefix + std::to_string(static_cast<int64_t>(WallTime())) + "." +
      std::string(number.size() < 5 ? 5 - number.size() : 0, '0') + number + "." + host;
  EventFile file;
  SALA_ASSIGN_OR_RETURN(file.file_, AppendFile::Open(path, AppendFile::At::kNew));
  file.head_ = EventRecord(VersionEvent(WallTime()));
  return file;
}

Status EventFile::Append(const std::string& record) {
  SALA_RETURN_IF_ERROR(file_.Append(head_ + record));
  head_.clear();
  return OkStatus();
}

Status EventFile::Start(int64_t step) {
  head_ += EventRecord(StartEvent(WallTime(), step));
  return Append("");
}

Status EventFile::Write(int64_t step, const Scalars& scalars) {
  return scalars.empty() ? OkStatus() : Append(EventRecord(ScalarEvent(WallTime(), step, scalars)));
}

}  // namespace sala
