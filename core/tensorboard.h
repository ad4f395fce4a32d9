// Event files that TensorBoard reads: records of a protobuf message (tensorflow.Event) with their
// lengths and checksums. Only what scalars need is written.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/append_file.h"
#include "core/status.h"

namespace sala {

using Scalars = std::vector<std::pair<std::string, double>>;  // by tag; stored as float32

// One record: u64 length, masked CRC32C of the length, the bytes, masked CRC32C of the bytes, all
// little-endian. The mask rotates right by 15 bits and adds a282ead8.
std::string EventRecord(std::string_view event);

// Messages. `wall_time` is seconds since 1970.
std::string VersionEvent(double wall_time);  // "brain.Event:2", the first of every file
// A start of the run whose first step is `step`: readers drop what earlier files say of it and of
// later ones.
std::string StartEvent(double wall_time, int64_t step);
std::string ScalarEvent(double wall_time, int64_t step, const Scalars& scalars);

// One file of a folder, which readers read in the order of the names. An event that does not fit on
// the disk is left out; those that say where the file begins come with the next one that fits.
class EventFile {
 public:
  // Makes folder/events.out.tfevents.SECONDS.NNNNN.HOST, whose NNNNN is the number of event files
  // there, so that names sort by time even within a second. Start is to follow. FILE-WRITE (74).
  static StatusOr<EventFile> Create(const std::string& folder, const std::string& host);
  EventFile() = default;
  bool is_open() const { return file_.is_open(); }

  Status Start(int64_t step);
  // A reader sees it at once.
  Status Write(int64_t step, const Scalars& scalars);

 private:
  Status Append(const std::string& record);

  AppendFile file_;
  std::string head_;  // records that every reader needs and that are not in the file yet
};

}  // namespace sala
