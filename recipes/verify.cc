#include "recipes/verify.h"

namespace sala::recipes {

const char* NameOf(Verdict verdict) {
  switch (verdict) {
    case Verdict::kHolds:
      return "holds";
    case Verdict::kFails:
      return "FAILS";
    default:
      return "not checked";
  }
}

const std::vector<VerifyCheck>& VerifyChecks() {
  static const std::vector<VerifyCheck> checks = {
      {"gradients", "every tensor's gradient against a float64 reference", VerifyGradients},
      {"packed", "packed documents against each document alone", VerifyPacked},
      {"updates", "learning rates, moments and parameters against AdamW in float64", VerifyUpdates},
      {"resume", "runs that were stopped and resumed against runs that were not", VerifyResume},
      {"saves", "saving every step against saving at the end", VerifySaves},
      {"ranks", "one rank against several, under mpirun", VerifyRanks},
      {"export", "exported folders read back", VerifyExport},
      {"checkpoints", "a damaged checkpoint is found; those of run.dir are whole",
       VerifyCheckpoints}};
  return checks;
}

}  // namespace sala::recipes
