// HALO step 2 and 3: the assembled student learns the teacher's distribution over every token, and,
// optionally, goes on with plain next-token cross entropy (docs/math/halo.md 6).
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "data/stream.h"
#include "recipes/halo/assemble.h"
#include "recipes/step_loop.h"

namespace sala::recipes {

// Whether a tensor of the student is trained.
bool IsTrainable(HaloTrainable trainable, const model::ModelConfig& student,
                 const model::ParameterSpec& spec);

struct DistilOptions {
  HaloTrainable trainable = HaloTrainable::kAll;
  double temperature = 1.0;
  double ce_weight = 0.0;
  bool recompute = true;
};

// Held-out numbers of student and teacher on the same text.
struct DistilReport {
  int64_t tokens = 0;       // 0: nothing held out, all else is 0
  double kl = 0;            // nats per token, at temperature 1
  double student_loss = 0;  // nats per target
  double teacher_loss = 0;
  double agreement = 0;        // share of tokens where both arg-maxes agree
  double teacher_entropy = 0;  // nats per token
};

// Collective over the mesh, to whose dp ranks the batches are dealt: batch i lies on rank i mod DP.
StatusOr<DistilReport> CompareModels(const Context& ctx, Arena& arena, const model::Model& teacher,
                                     const model::Model& student,
                                     const std::vector<model::Batch>& batches,
                                     const parallel::Mesh& mesh);

// A student that is trained, and measured against its teacher on held-out batches.
class StudentTask : public StepTask {
 public:
  const model::ModelConfig& config() const override { return student_.config; }
  model::ComputeParameters& parameters() override { return parameters_; }

 protected:
  // All references must outlive the task; held_out may be empty.
  StudentTask(const Context& ctx, parallel::Mesh& mesh, const model::Model& teacher,
              Hybrid& student, const std::vector<model::Batch>& held_out);

  StatusOr<DistilReport> Compare(Session& session) const;
  const model::Model& teacher() const { return teacher_; }
  const model::Model& model() const { return model_; }

 private:
  const model::Model& teacher_;
  Hybrid& student_;
  model::ComputeParameters parameters_;
  model::Model model_;  // the student
  const std::vector<model::Batch>& held_out_;
};

// loss = KL(teacher || student) per token + ce_weight * cross entropy per target. Teacher and
// frozen tensors keep their bits.
class DistilTask : public StudentTask {
 public:
  DistilTask(const Context& ctx, parallel::Mesh& mesh, const model::Model& teacher, Hybrid& student,
             const DistilOptions& options, const std::vector<model::Batch>& held_out)
      : StudentTask(ctx, mesh, teacher, student, held_out), options_(options) {}

  bool Trainable(const model::ParameterSpec& spec) const override {
    return IsTrainable(options_.trainable, config(), spec);
  }
  Status MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                    const StepCounts& counts, model::ParameterStore& gradients,
                    std::span<double> sums) override;
  std::vector<std::string> SumNames() const override;
  std::vector<std::pair<std::string, double>> Values(std::span<const double> sums,
                                                     const StepCounts& counts) const override;
  // "kl", "student_loss", "teacher_loss", "agreement", "teacher_entropy".
  StatusOr<std::vector<std::pair<std::string, double>>> Validate(Session& session) override;

 private:
  DistilOptions options_;
};

// Next-token cross entropy of all parameters; Validate gives the student's loss first, then the KL.
class FinetuneTask : public StudentTask {
 public:
  FinetuneTask(const Context& ctx, parallel::Mesh& mesh, const model::Model& teacher,
               Hybrid& student, bool recompute, const std::vector<model::Batch>& held_out)
      : StudentTask(ctx, mesh, teacher, student, held_out), recompute_(recompute) {}

  Status MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                    const StepCounts& counts, model::ParameterStore& gradients,
                    std::span<double> sums) override;
  std::vector<std::string> SumNames() const override { return {"loss_sum", "correct"}; }
  std::vector<std::pair<std::string, double>> Values(std::span<const double> sums,
                                                     const StepCounts& counts) const override;
  StatusOr<std::vector<std::pair<std::string, double>>> Validate(Session& session) override;

 private:
  bool recompute_;
};

}  // namespace sala::recipes
