// The checks of `sala verify`: each compares two ways to the same numbers, says what it measured
// against which bound and why, and names tensor, layer or step where it fails.
//
// Checks that compute in this process: gradients, packed, export. Checks of whole runs start the
// program itself, through VerifyContext::train: updates, resume, saves, ranks, checkpoints. All
// write below one directory and read only what the user has.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/status.h"
#include "recipes/verify_scale.h"

namespace sala::recipes {

enum class Verdict : uint8_t { kHolds, kFails, kNotChecked };
const char* NameOf(Verdict verdict);  // "holds", "FAILS", "not checked"

// A row of the table.
struct VerifyRow {
  std::string name;      // what --only selects
  std::string compared;  // "float32 gradients with the float64 reference: 5 passes, 310 tensors"
  Verdict verdict = Verdict::kHolds;
  std::string measured;               // "9.1e-07 of the largest gradient of the tensor"
  std::string bound;                  // "2e-05"
  std::vector<std::string> failures;  // where and what: tensor, layer, step
  std::vector<std::string> notes;     // what was left out, and why

  void Fail(const std::string& what) {
    verdict = Verdict::kFails;
    failures.push_back(what);
  }
};

// A start of `sala train FILE --run DIR ...` that ended.
struct TrainRun {
  int exit_code = 0;
  std::string error;  // its last "sala: error:" line, "" when there is none
};
struct TrainStart {
  std::string config, run;
  int ranks = 1;      // more than one: under mpirun
  bool stop = false;  // asks it to save and stop (SIGUSR2) as soon as it trains
};

struct VerifyContext {
  const ScaledPipeline* scaled = nullptr;
  std::string directory;  // to write in; exists
  std::string user_run;   // the run.dir of the user's configuration, only read; may not exist
  DeviceKind device = DeviceKind::kCpu;  // the user's run.device
  int ranks = 2;                         // 1: nothing is started under mpirun
  std::string no_mpirun;                 // why there is no mpirun; "" when there is one
  // Errors only where nothing could be started, or the user interrupted it.
  std::function<StatusOr<TrainRun>(const TrainStart&)> train;
  std::function<void(const std::string&)> progress;  // a line for the waiting user
  std::function<bool()> interrupted;                 // the user wants to stop: checks return early
};

struct VerifyCheck {
  const char* name;
  const char* about;  // one line for --help
  StatusOr<VerifyRow> (*run)(const VerifyContext& context);
};
// In the order of the table.
const std::vector<VerifyCheck>& VerifyChecks();

// A check returns an error where it could not be done at all (its row then fails with it).
StatusOr<VerifyRow> VerifyGradients(const VerifyContext& context);
StatusOr<VerifyRow> VerifyPacked(const VerifyContext& context);
StatusOr<VerifyRow> VerifyUpdates(const VerifyContext& context);
StatusOr<VerifyRow> VerifyResume(const VerifyContext& context);
StatusOr<VerifyRow> VerifySaves(const VerifyContext& context);
StatusOr<VerifyRow> VerifyRanks(const VerifyContext& context);
StatusOr<VerifyRow> VerifyExport(const VerifyContext& context);
StatusOr<VerifyRow> VerifyCheckpoints(const VerifyContext& context);

}  // namespace sala::recipes
