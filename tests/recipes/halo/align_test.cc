#include "recipes/halo/align.h"

#include <cmath>

#include "core/rng.h"
#include "recipes/optimizer.h"
#include "tests/recipes/halo/tiny.h"

namespace sala::recipes {
namespace {

using testing::Bits;
using testing::RandomBatch;
using testing::RandomTeacher;
using testing::TeacherConfig;

class AlignTest : public testing::TaskTest {
 protected:
  AlignTest() : TaskTest({17, 1, 30}, "align") {}

  double Loss(AlignTask& task, model::ParameterStore* gradients) {
    return Run(task, gradients).front().second;
  }

  void CheckGradient(AlignLoss loss) {
    AlignTask task(model_, mixers_, loss, nullptr);
    model::ParameterStore gradients(mixers_.specs());
    Loss(task, &gradients);
    model::ParameterStore unused(mixers_.specs());
    const std::vector<float> start = Bits(mixers_);
    for (const model::ParameterSpec& spec : mixers_.specs()) {
      // Along the gradient itself, so that the difference stands well above rounding.
      const float* gradient = gradients.data() + spec.offset;
      double norm = 0;
      for (int64_t i = 0; i < spec.numel; ++i)
        norm += static_cast<double>(gradient[i]) * gradient[i];
      norm = std::sqrt(norm);
      ASSERT_GT(norm, 0) << spec.name;
      constexpr double kStep = 2e-2;
      const auto loss_at = [&](double step) {
        for (int64_t i = 0; i < spec.numel; ++i) {
          mixers_.data()[spec.offset + i] = static_cast<float>(
              start[static_cast<size_t>(spec.offset + i)] + step * gradient[i] / norm);
        }
        return Loss(task, &unused);
      };
      const double up = loss_at(kStep);
      const double down = loss_at(-kStep);
      const double up2 = loss_at(2 * kStep);
      const double down2 = loss_at(-2 * kStep);
      std::copy(start.begin(), start.end(), mixers_.data());
      // Fourth-order central difference: truncation of order step^4 = 1.6e-7 times derivatives of
      // order 1, relative to a gradient of 1e-3 and more: 1e-3. Rounding: loss 2^-24 * 1 / step,
      // far below.
      const double slope = (8 * (up - down) - (up2 - down2)) / (12 * kStep);
      EXPECT_NEAR(slope / norm, 1.0, 5e-3) << spec.name;
    }
  }
};

TEST_F(AlignTest, GradientOfTheSquaredError) { CheckGradient(AlignLoss::kMse); }

TEST_F(AlignTest, GradientOfTheNorm) { CheckGradient(AlignLoss::kL2Norm); }

TEST_F(AlignTest, TeacherKeepsItsBitsAndLayersAreIndependent) {
  const std::vector<float> teacher = Bits(teacher_);
  AlignTask task(model_, mixers_, AlignLoss::kMse, nullptr);
  model::ParameterStore first(mixers_.specs());
  Loss(task, &first);
  // Another mixer in layer 1 must leave the gradients of all other layers as they were.
  const model::ParameterSpec changed = mixers_.Spec("model.layers.1.self_attn.q_proj.weight");
  for (int64_t i = 0; i < changed.numel; ++i) mixers_.data()[changed.offset + i] *= -0.5F;
  model::ParameterStore second(mixers_.specs());
  Loss(task, &second);
  int64_t different = 0;
  for (const model::ParameterSpec& spec : mixers_.specs()) {
    const bool equal = std::memcmp(first.data() + spec.offset, second.data() + spec.offset,
                                   static_cast<size_t>(spec.numel) * sizeof(float)) == 0;
    const bool of_layer_1 = spec.name.rfind("model.layers.1.", 0) == 0;
    EXPECT_TRUE(equal || of_layer_1) << spec.name;
    different += equal ? 0 : 1;
  }
  EXPECT_GT(different, 0);
  EXPECT_EQ(Bits(teacher_), teacher);
}

TEST_F(AlignTest, MicroBatchesAddUp) {
  AlignTask task(model_, mixers_, AlignLoss::kMse, nullptr);
  model::ParameterStore whole(mixers_.specs());
  std::vector<double> whole_sums(task.SumNames().size(), 0.0);
  ASSERT_TRUE(task.MicroBatch(ctx_, arena_, batch_, counts_, whole, whole_sums).ok());

  // The same documents in three passes with the counts of the whole.
  model::ParameterStore parts(mixers_.specs());
  std::vector<double> sums(task.SumNames().size(), 0.0);
  for (size_t d = 0; d + 1 < batch_.cu_seqlens.size(); ++d) {
    const auto begin = batch_.tokens.begin() + batch_.cu_seqlens[d];
    const auto end = batch_.tokens.begin() + batch_.cu_seqlens[d + 1];
    ASSERT_TRUE(
        task.MicroBatch(ctx_, arena_, model::SingleDocument({begin, end}), counts_, parts, sums)
            .ok());
  }
  double largest = 0;
  for (int64_t i = 0; i < whole.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(whole.data()[i])));
  // Sums over 48 tokens in another order: sqrt(48) * 2^-24 of the largest terms, a few of which
  // make a gradient; factor 8.
  for (int64_t i = 0; i < whole.size(); ++i) {
    ASSERT_NEAR(whole.data()[i], parts.data()[i], 8 * std::sqrt(48.0) * 6e-8 * largest) << i;
  }
  for (size_t i = 0; i < sums.size(); ++i)
    EXPECT_NEAR(sums[i], whole_sums[i], 1e-9 * std::abs(whole_sums[i]) + 1e-9);
}

TEST_F(AlignTest, ValuesAreRelativeToTheVarianceOfTheTarget) {
  AlignTask task(model_, mixers_, AlignLoss::kMse, nullptr);
  std::vector<double> sums(task.SumNames().size(), 0.0);
  // Layer 0: 10 tokens x 24 features, squared error 12, target sum 48 and square 72: mean 0.2,
  // variance 0.3 - 0.04.
  sums[0] = 12;
  sums[1] = 48;
  sums[2] = 72;
  for (size_t layer = 1; layer < 4; ++layer) sums[4 * layer + 2] = 240;  // variance 1, no error
  const auto values = task.Values(sums, {.tokens = 10});
  EXPECT_EQ(values[0].first, "loss");
  EXPECT_NEAR(values[0].second, 12.0 / 240 / 4, 1e-12);
  EXPECT_EQ(values[2].first, "relative_error_0");
  EXPECT_NEAR(values[2].second, 0.05 / 0.26, 1e-12);
  EXPECT_EQ(values[5].second, 0.0);
}

TEST_F(AlignTest, ErrorFallsAndTransferHelps) {
  const auto comm = parallel::MakeSelfCommunicator();
  const auto mesh = parallel::Mesh::Create(*comm, {});
  ASSERT_TRUE(mesh.ok());
  // Relative error of a held-out batch after 60 updates from the given start.
  const auto train = [&](bool from_teacher, double* start) {
    model::ParameterStore mixers =
        TransferMixers(config_, teacher_, {.seed = 3, .from_teacher = from_teacher});
    AlignTask task(model_, mixers, AlignLoss::kMse, nullptr);
    OptimizerConfig options;
    options.weight_decay = 0;
    options.matrix_lr_multiplier = 1;
    Optimizer optimizer(
        options, task.config(), mixers, [](const model::ParameterSpec&) { return true; }, **mesh);
    const std::vector<model::Batch> held_out = {RandomBatch(config_, {40, 40}, "held out")};
    *start = task.Evaluate(ctx_, arena_, held_out, *comm)->at(1).second;
    for (int64_t step = 0; step < 60; ++step) {
      const model::Batch batch = RandomBatch(config_, {40, 40}, std::to_string(step));
      model::ParameterStore gradients(mixers.specs());
      std::vector<double> sums(task.SumNames().size(), 0.0);
      EXPECT_TRUE(
          task.MicroBatch(ctx_, arena_, batch, {.targets = 78, .tokens = 80}, gradients, sums)
              .ok());
      EXPECT_TRUE(optimizer.Update(ctx_, gradients, 5e-3, true).ok());
    }
    return task.Evaluate(ctx_, arena_, held_out, *comm)->at(1).second;
  };
  double start = 0;
  double random_start = 0;
  const std::vector<float> teacher = Bits(teacher_);
  const double transferred = train(true, &start);
  const double random = train(false, &random_start);
  EXPECT_LT(transferred, 0.5 * start);
  EXPECT_LT(transferred, random);
  EXPECT_EQ(Bits(teacher_), teacher);
}

}  // namespace
}  // namespace sala::recipes
