// One seed of the measurement behind the conversion's claims (recipes/halo/claims.h): a teacher is
// trained, its mixers are aligned and scored, and hybrids that differ in one thing each are
// distilled equally long. All of it with the steps of the HALO stage (align.h, score.h, select.h,
// assemble.h, distil.h, logit_scale.h) in the step loop of every run.
//
//   ClaimTrial trial(settings, seed, "runs/claims/seed-1", say);
//   SALA_ASSIGN_OR_RETURN(const ClaimNumbers numbers, trial.Run());
//
// DIRECTORY/results.json has what is finished and is rewritten after each piece; Run() takes up
// from there. Beside it lie the data and the run directory of each piece, which hold logs, metrics
// and the last checkpoint as every run's do.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/status.h"
#include "nlohmann/json.hpp"
#include "recipes/halo/claim_data.h"
#include "recipes/halo/claims.h"
#include "recipes/stage.h"

namespace sala::recipes {

// What a trial is made of; equal for all seeds.
struct ClaimSettings {
  struct Store {
    ClaimDataOptions data;  // seed and purpose are the trial's
    int64_t documents = 0;
    bool recalled_only = false;
  };
  std::map<std::string, Store> stores;  // by name; mixtures of the stages below name these
  std::vector<StageConfig> lessons;     // of the teacher, in order; the first one has its model
  StageConfig halo;                     // its phases are what every hybrid is made with
  int64_t random_sets = 0;

  ClaimDataOptions stream, needle;      // what recall is measured on; length is that of training
  int64_t recall_documents = 0;         // of each task at each length
  std::vector<int64_t> stream_factors;  // lengths recall is measured at, in training lengths
  std::vector<int64_t> needle_factors;
  std::vector<int64_t> fit_factors;  // likewise, of the documents the logit scale is fitted on
  int64_t fit_documents = 0;         // of each task and length

  // Everything that decides the numbers: results of other settings are not taken up.
  nlohmann::json ToJson() const;
};

// The rules that a trial can select by: those that rank the scores of single layers.
inline constexpr std::array<Selector, 4> kClaimSelectors = {
    Selector::kHalo, Selector::kRecallDrop, Selector::kDifference, Selector::kKlSwap};

ClaimSettings FullClaimSettings();
// A few steps of each: every path and number, no meaning.
ClaimSettings QuickClaimSettings();

class ClaimTrial {
 public:
  // `say` gets a line for each finished piece. `origin` (the program's version) is part of what
  // must be equal for results to be taken up.
  ClaimTrial(const ClaimSettings& settings, int64_t seed, std::string directory, int64_t threads,
             std::string origin, std::function<void(const std::string&)> say);

  // BENCH-DIR (78): the directory holds results of other settings or of another version;
  // BENCH-RESULTS (65): results.json is damaged. Else what the steps themselves return.
  StatusOr<ClaimNumbers> Run();

 private:
  struct Teacher;
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  Status LoadResults();
  // Adds the time since the last piece, writes results.json and says the line.
  Status FinishPiece(const std::string& line);
  // A stage of the settings with this trial's seed and paths.
  StageConfig Placed(StageConfig stage) const;
  ClaimDataOptions Documents(ClaimDataOptions options, const std::string& purpose,
                             int64_t factor) const;
  Status MakeData();
  StatusOr<std::unique_ptr<Session>> OpenSession(const std::string& name,
                                                 const std::vector<StageConfig>& stages);
  StatusOr<std::string> TrainTeacher();
  Status MeasureTeacher(Session& session, Teacher* teacher);
  void MeasureRecall(Session& session, const model::Model& model, RecallByLength* stream,
                     RecallByLength* needle) const;
  Status Align(Teacher* teacher);
  Status Select(Teacher* teacher);
  Status Convert(Teacher* teacher, const std::string& name, const std::vector<int64_t>& layers,
                 bool aligned, bool rope);
  Status FitScale(Session& session, const model::Model& hybrid);
  std::vector<std::vector<int64_t>> RandomSets() const;

  const ClaimSettings& settings_;
  int64_t seed_;
  std::string directory_;
  int64_t threads_;
  std::string origin_;
  std::function<void(const std::string&)> say_;
  std::unique_ptr<parallel::Communicator> world_;
  std::unique_ptr<data::Tokenizer> tokenizer_;
  ClaimNumbers numbers_;
  double piece_started_ = 0;
};

}  // namespace sala::recipes
