#include "recipes/halo/align.h"

#include <cmath>
#include <complex>
#include <functional>
#include <numeric>

#include "core/rng.h"
#include "model/reference_model.h"
#include "recipes/optimizer.h"
#include "tests/recipes/halo/tiny.h"

namespace sala::recipes {
namespace {

using testing::Bits;
using testing::RandomBatch;
using testing::RandomTeacher;
using testing::TeacherConfig;
using testing::Values;

class AlignTest : public testing::TaskTest {
 protected:
  AlignTest() : TaskTest({17, 1, 30}, "align") {}

  double Loss(AlignTask& task, model::ParameterStore* gradients) {
    return Run(task, gradients).front().second;
  }

  // Loss of one layer in complex numbers: the same mixer from the kernels' references.
  std::complex<double> ReferenceLoss(AlignLoss loss, int64_t layer,
                                     const std::vector<std::complex<double>>& parameters) const {
    using Reference = model::ReferenceModel<std::complex<double>>;
    const Reference reference(AllLinear(config_), mixers_.specs(), parameters);
    const auto l = static_cast<size_t>(layer);
    const Reference::Vector y = reference.Mixer(layer, inputs_[l], batch_, {});
    const int64_t width = config_.hidden_size;
    std::complex<double> sum = 0;
    for (int64_t t = 0; t < batch_.size(); ++t) {
      std::complex<double> squares = 0;
      for (int64_t i = t * width; i < (t + 1) * width; ++i) {
        const std::complex<double> difference =
            y[static_cast<size_t>(i)] - targets_[l][static_cast<size_t>(i)];
        squares += difference * difference;
      }
      sum += loss == AlignLoss::kMse ? squares / static_cast<double>(width)
                                     : std::sqrt(squares / static_cast<double>(width));
    }
    return sum / static_cast<double>(batch_.size() * config_.num_hidden_layers);
  }

  // Slopes along random directions of each tensor against derivatives by complex steps (exact in
  // double: no difference is formed).
  void CheckGradient(AlignLoss loss) {
    AlignTask task(ctx_, *mesh_, model_, mixers_, loss, nullptr);
    model::ParameterStore gradients(mixers_.specs());
    const double computed_loss = Loss(task, &gradients);
    RecordTeacher();
    std::vector<std::complex<double>> parameters(mixers_.data(), mixers_.data() + mixers_.size());
    double expected_loss = 0;
    for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer)
      expected_loss += ReferenceLoss(loss, layer, parameters).real();
    EXPECT_NEAR(computed_loss, expected_loss, 1e-5 * expected_loss);

    for (const model::ParameterSpec& spec : mixers_.specs()) {
      const int64_t layer = std::stoll(spec.name.substr(std::string("model.layers.").size()));
      const float* gradient = gradients.data() + spec.offset;
      const double norm =
          std::sqrt(std::inner_product(gradient, gradient + spec.numel, gradient, 0.0,
                                       std::plus<>(), [](double a, double b) { return a * b; }));
      ASSERT_GT(norm, 0) << spec.name;
      PhiloxStream rng("v1|5|halo_test||0|direction|" + spec.name);
      double largest = 0;
      for (int direction = 0; direction < 4; ++direction) {
        constexpr double kStep = 1e-30;
        std::vector<std::complex<double>> moved = parameters;
        double slope = 0;
        for (int64_t i = 0; i < spec.numel; ++i) {
          const double d = rng.NextNormal();
          slope += d * gradient[i];
          moved[static_cast<size_t>(spec.offset + i)].imag(kStep * d);
        }
        const double expected = ReferenceLoss(loss, layer, moved).imag() / kStep;
        // A float32 gradient sums over 48 tokens, heads and features through some ten rounded
        // tensors: sqrt(10 * 48 * 24) * 2^-24 = 6e-6 of its norm, and the difference of output and
        // target cancels a digit: 6e-5.
        EXPECT_NEAR(slope, expected, 6e-5 * norm) << spec.name << " direction " << direction;
        largest = std::max(largest, std::abs(expected));
      }
      // Along a random direction the slope is normal with deviation |g|; all four stay below a
      // tenth of it once in 25,000 draws. An error of 1 % in the whole tensor is then at least 16
      // times the tolerance.
      EXPECT_GT(largest, 0.1 * norm) << spec.name;
    }
  }

  void RecordTeacher() {
    const ArenaScope scope(arena_);
    const auto numbers = [](const ConstTensor& x) {
      const std::vector<float> values = Values(x);
      return std::vector<std::complex<double>>(values.begin(), values.end());
    };
    model_.ForwardOnly(ctx_, arena_, batch_, {}, 0, {},
                       [&](int64_t, const ConstTensor& normed, const ConstTensor& target) {
                         inputs_.push_back(numbers(normed));
                         targets_.push_back(numbers(target));
                       });
  }

  // Of the teacher's layers.
  std::vector<std::vector<std::complex<double>>> inputs_, targets_;
};

TEST_F(AlignTest, GradientOfTheSquaredError) { CheckGradient(AlignLoss::kMse); }

TEST_F(AlignTest, GradientOfTheNorm) { CheckGradient(AlignLoss::kL2Norm); }

TEST_F(AlignTest, TeacherKeepsItsBitsAndLayersAreIndependent) {
  const std::vector<float> teacher = Bits(teacher_);
  AlignTask task(ctx_, *mesh_, model_, mixers_, AlignLoss::kMse, nullptr);
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
  AlignTask task(ctx_, *mesh_, model_, mixers_, AlignLoss::kMse, nullptr);
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
  AlignTask task(ctx_, *mesh_, model_, mixers_, AlignLoss::kMse, nullptr);
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
  // Relative error of a held-out batch after 60 updates from the given start.
  const auto train = [&](bool from_teacher, double* start) {
    model::ParameterStore mixers =
        TransferMixers(config_, teacher_, {.seed = 3, .from_teacher = from_teacher});
    AlignTask task(ctx_, *mesh_, model_, mixers, AlignLoss::kMse, nullptr);
    OptimizerConfig options;
    options.weight_decay = 0;
    options.matrix_lr_multiplier = 1;
    GradientReducer reducer(ctx_, task.params(), *mesh_, false);
    Optimizer optimizer(
        ctx_, options, task.config(), task.parameters(),
        [](const model::ParameterSpec&) { return true; }, *mesh_, reducer);
    const std::vector<model::Batch> held_out = {RandomBatch(config_, {40, 40}, "held out")};
    *start = task.Evaluate(ctx_, arena_, held_out)->at(1).second;
    for (int64_t step = 0; step < 60; ++step) {
      const model::Batch batch = RandomBatch(config_, {40, 40}, std::to_string(step));
      reducer.BeginStep();
      std::vector<double> sums(task.SumNames().size(), 0.0);
      EXPECT_TRUE(
          task.MicroBatch(ctx_, arena_, batch, {.targets = 78, .tokens = 80}, reducer.store(), sums)
              .ok());
      EXPECT_TRUE(optimizer.Update(ctx_, 5e-3, true).ok());
    }
    return task.Evaluate(ctx_, arena_, held_out)->at(1).second;
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
