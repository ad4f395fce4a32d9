// One live run per run directory.
//
//   SALA_ASSIGN_OR_RETURN(RunLock lock, RunLock::Acquire("runs/a"));   // released when `lock` goes
//
// RUN.lock holds host, pid and start time as text, for people and for the message. What decides is
// a lock of the kernel on the open file (flock): it ends with the process however that ends, and
// two processes can never both hold it. Where a file system does not carry flock between hosts, the
// host and the process named in the file are looked at too.
#pragma once

#include <string>

#include "core/status.h"

namespace sala {

class RunLock {
 public:
  // RUN-LOCKED (74) when a live process holds it, or a process of another host is named in the file
  // (its life cannot be checked from here: the message says how to go on). A lock left by a dead
  // process of this host is taken over with a logged line.
  static StatusOr<RunLock> Acquire(const std::string& directory);
  RunLock(RunLock&& other) noexcept;
  RunLock& operator=(RunLock&& other) noexcept;
  ~RunLock();

 private:
  RunLock(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  std::string path_;
  int fd_ = -1;
};

// "" while the run of a directory lives or may live (a process of another host cannot be looked at
// from here), else what became of the one that held it: "process 12 on a since ... is gone", "no
// process holds RUN.lock".
std::string GoneRun(const std::string& directory);

}  // namespace sala
