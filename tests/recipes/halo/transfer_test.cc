#include "recipes/halo/transfer.h"

#include <gmock/gmock.h>

#include <cmath>

#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "model/mixer.h"
#include "tests/recipes/halo/tiny.h"

namespace sala::recipes {
namespace {

using testing::Bits;
using testing::RandomTeacher;
using testing::TeacherConfig;
using testing::Values;

using TransferTest = testing::HaloTest;

constexpr char kPrefix[] = "model.layers.2.self_attn.";

TEST_F(TransferTest, CopiesAndExpandsTheTeachersTensors) {
  const model::ModelConfig config = TeacherConfig();
  model::ParameterStore teacher = RandomTeacher(config);
  const std::vector<float> before = Bits(teacher);
  model::ParameterStore mixers = TransferMixers(config, teacher, {.seed = 3});

  const std::string prefix = kPrefix;
  for (const char* name : {"q_proj.weight", "o_proj.weight", "q_norm.weight", "k_norm.weight"}) {
    EXPECT_EQ(Values(mixers.Get(prefix + name)), Values(teacher.Get(prefix + name))) << name;
  }
  for (const char* name : {"k_proj.weight", "v_proj.weight"}) {
    const Tensor expanded = mixers.Get(prefix + name);
    const Tensor shared = teacher.Get(prefix + name);
    ASSERT_EQ(expanded.dim(0), config.attention_width());
    for (int64_t head = 0; head < 4; ++head) {
      const int64_t source = head / 2;  // 4 query heads over 2 key/value heads
      EXPECT_EQ(Values(expanded.Rows(head * 6, (head + 1) * 6)),
                Values(shared.Rows(source * 6, (source + 1) * 6)))
          << name << " head " << head;
    }
  }
  EXPECT_THAT(Values(mixers.Get(prefix + "o_norm.weight")), ::testing::Each(1.0F));
  EXPECT_EQ(Bits(teacher), before);
}

TEST_F(TransferTest, GateIsUniformAndNamedBySeedAndTensor) {
  const model::ModelConfig config = TeacherConfig();
  const model::ParameterStore teacher = RandomTeacher(config);
  model::ParameterStore a = TransferMixers(config, teacher, {.seed = 3});
  model::ParameterStore b = TransferMixers(config, teacher, {.seed = 4});
  const std::vector<float> gate = Values(a.Get(std::string(kPrefix) + "z_proj.weight"));
  const double bound = 1 / std::sqrt(24.0);
  double square = 0;
  for (float z : gate) {
    EXPECT_LE(std::abs(z), bound);
    square += static_cast<double>(z) * z;
  }
  // Variance bound^2 / 3; the sample variance of n uniform numbers has relative deviation sqrt(4 /
  // (5 n)): five of them.
  const auto n = static_cast<double>(gate.size());
  EXPECT_NEAR(square / n / (bound * bound / 3), 1.0, 5 * std::sqrt(0.8 / n));
  EXPECT_NE(gate, Values(b.Get(std::string(kPrefix) + "z_proj.weight")));
  EXPECT_NE(gate, Values(a.Get("model.layers.1.self_attn.z_proj.weight")));
}

TEST_F(TransferTest, RandomStartTakesNothingFromTheTeacher) {
  const model::ModelConfig config = TeacherConfig();
  const model::ParameterStore teacher = RandomTeacher(config);
  model::ParameterStore other(model::ParameterSpecs(config));
  const TransferOptions options{.seed = 3, .from_teacher = false};
  model::ParameterStore mixers = TransferMixers(config, teacher, options);
  EXPECT_EQ(Bits(mixers), Bits(TransferMixers(config, other, options)));
  EXPECT_THAT(Values(mixers.Get(std::string(kPrefix) + "q_norm.weight")), ::testing::Each(1.0F));
}

TEST_F(TransferTest, RandomStartIsNotTheTeachersOwn) {
  const model::ModelConfig config = TeacherConfig();
  model::ParameterStore teacher(model::ParameterSpecs(config));
  model::InitialiseParameters(config, 3, teacher);  // the seed of the transfer below
  model::ParameterStore mixers =
      TransferMixers(config, teacher, {.seed = 3, .from_teacher = false});
  const std::string prefix = kPrefix;
  const double deviation = config.initializer_range / std::sqrt(config.width_multiplier());
  for (const char* name : {"q_proj.weight", "o_proj.weight"}) {
    const std::vector<float> a = Values(teacher.Get(prefix + name));
    const std::vector<float> b = Values(mixers.Get(prefix + name));
    ASSERT_EQ(a.size(), b.size());
    double product = 0;
    double square = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      product += static_cast<double>(a[i]) * b[i];
      square += static_cast<double>(b[i]) * b[i];
    }
    // Of n independent pairs the mean product has deviation 1 / sqrt(n), the mean square sqrt(2 /
    // n), in units of the variance: five of them.
    const auto n = static_cast<double>(a.size());
    EXPECT_LT(std::abs(product) / (n * deviation * deviation), 5 / std::sqrt(n)) << name;
    EXPECT_NEAR(square / (n * deviation * deviation), 1.0, 5 * std::sqrt(2 / n)) << name;
  }
}

TEST_F(TransferTest, RefusesTeachersThatDoNotFit) {
  model::ModelConfig config = TeacherConfig();
  EXPECT_TRUE(CheckTeacher(config, true).ok());
  config.lightning_nh = 3;
  EXPECT_EQ(ErrorCodeOf(CheckTeacher(config, true)), "CFG-HALO");
  EXPECT_EQ(ExitCodeOf(CheckTeacher(config, true)), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(CheckTeacher(config, true)), ::testing::HasSubstr("is 3 x 6"));
  config.lightning_head_dim = 8;  // as wide as 4 x 6, but heads are not heads
  EXPECT_THAT(MessageOf(CheckTeacher(config, true)), ::testing::HasSubstr("head by head"));
  config.attn_qk_norm = false;
  EXPECT_FALSE(CheckTeacher(config, true).ok());
  EXPECT_TRUE(CheckTeacher(config, false).ok());  // random weights need not fit
  config = TeacherConfig();
  config.mixer_types[1] = "lightning-attn";
  for (bool from_teacher : {true, false}) {
    EXPECT_THAT(MessageOf(CheckTeacher(config, from_teacher)),
                ::testing::HasSubstr("already has linear layers"));
  }
}

// The linear mixer of docs/math/halo.md 1 in double precision, written as the recurrence, with the
// teacher's own shared key and value heads: head i reads head i / group.
class SharedReference {
 public:
  SharedReference(const model::ModelConfig& config, model::ParameterStore& teacher,
                  model::ParameterStore& mixers)
      : c_(config), teacher_(teacher), mixers_(mixers) {}

  std::vector<double> Run(const std::vector<float>& x, int64_t tokens) const {
    const int64_t width = c_.attention_width();
    std::vector<double> o(static_cast<size_t>(tokens * width));
    for (int64_t head = 0; head < c_.num_attention_heads; ++head) RunHead(x, tokens, head, &o);
    std::vector<double> y(static_cast<size_t>(tokens * c_.hidden_size), 0.0);
    for (int64_t t = 0; t < tokens; ++t) {
      double square = 0;
      for (int64_t i = 0; i < width; ++i) square += o[At(t, i)] * o[At(t, i)];
      const double rstd = 1 / std::sqrt(square / static_cast<double>(width) + c_.rms_norm_eps);
      for (int64_t i = 0; i < width; ++i) {
        const double z = Dot(mixers_, "z_proj.weight", i, x, t);
        const double u = o[At(t, i)] * rstd / (1 + std::exp(-z));
        for (int64_t h = 0; h < c_.hidden_size; ++h) {
          y[static_cast<size_t>(t * c_.hidden_size + h)] +=
              u * Weight(teacher_, "o_proj.weight", h, i);
        }
      }
    }
    return y;
  }

 private:
  size_t At(int64_t t, int64_t i) const {
    return static_cast<size_t>(t * c_.attention_width() + i);
  }
  static double Weight(model::ParameterStore& store, const char* name, int64_t row,
                       int64_t column) {
    return store.Get(std::string(kPrefix) + name).Row<float>(row)[column];
  }
  double Dot(model::ParameterStore& store, const char* name, int64_t row,
             const std::vector<float>& x, int64_t t) const {
    double sum = 0;
    for (int64_t h = 0; h < c_.hidden_size; ++h) {
      sum += Weight(store, name, row, h) *
             static_cast<double>(x[static_cast<size_t>(t * c_.hidden_size + h)]);
    }
    return sum;
  }
  // One head's query or key: projection, norm, rotation (first half with second half).
  std::vector<double> Rotated(const char* proj, const char* norm, int64_t head,
                              const std::vector<float>& x, int64_t t) const {
    const int64_t d = c_.head_dim;
    std::vector<double> r(static_cast<size_t>(d));
    double square = 0;
    for (int64_t i = 0; i < d; ++i) {
      r[static_cast<size_t>(i)] = Dot(teacher_, proj, head * d + i, x, t);
      square += r[static_cast<size_t>(i)] * r[static_cast<size_t>(i)];
    }
    const double rstd = 1 / std::sqrt(square / static_cast<double>(d) + c_.rms_norm_eps);
    const auto* gain = teacher_.Get(std::string(kPrefix) + norm).Data<float>();
    for (int64_t i = 0; i < d; ++i) r[static_cast<size_t>(i)] *= rstd * gain[i];
    for (int64_t i = 0; i < d / 2; ++i) {
      const double angle =
          static_cast<double>(t) *
          std::pow(c_.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(d));
      double& a = r[static_cast<size_t>(i)];
      double& b = r[static_cast<size_t>(i + d / 2)];
      const double first = a * std::cos(angle) - b * std::sin(angle);
      b = a * std::sin(angle) + b * std::cos(angle);
      a = first;
    }
    return r;
  }
  void RunHead(const std::vector<float>& x, int64_t tokens, int64_t head,
               std::vector<double>* o) const {
    const int64_t d = c_.head_dim;
    const int64_t shared = head / (c_.num_attention_heads / c_.num_key_value_heads);
    const double gamma = std::exp(-std::pow(
        2.0, -8.0 * static_cast<double>(head + 1) / static_cast<double>(c_.num_attention_heads)));
    std::vector<double> state(static_cast<size_t>(d * d), 0.0);
    for (int64_t t = 0; t < tokens; ++t) {
      const std::vector<double> q = Rotated("q_proj.weight", "q_norm.weight", head, x, t);
      const std::vector<double> k = Rotated("k_proj.weight", "k_norm.weight", shared, x, t);
      for (int64_t j = 0; j < d; ++j) {
        const double v = Dot(teacher_, "v_proj.weight", shared * d + j, x, t);
        double out = 0;
        for (int64_t i = 0; i < d; ++i) {
          double& s = state[static_cast<size_t>(i * d + j)];
          s = gamma * s + k[static_cast<size_t>(i)] * v;
          out += q[static_cast<size_t>(i)] * s;
        }
        (*o)[At(t, head * d + j)] = out / std::sqrt(static_cast<double>(d));
      }
    }
  }

  const model::ModelConfig& c_;
  model::ParameterStore& teacher_;
  model::ParameterStore& mixers_;
};

TEST_F(TransferTest, MixerEqualsTheRecurrenceWithSharedHeads) {
  const model::ModelConfig config = TeacherConfig();
  model::ParameterStore teacher = RandomTeacher(config);
  model::ParameterStore mixers = TransferMixers(config, teacher, {.seed = 3});
  constexpr int64_t kTokens = 70;  // more than one chunk of the linear kernel
  PhiloxStream rng("v1|5|halo_test||0|x|");
  std::vector<float> x(kTokens * 24);
  for (float& value : x) value = static_cast<float>(rng.NextNormal());
  const model::Batch batch = model::SingleDocument(std::vector<int32_t>(kTokens, 0));

  const model::Spread alone;
  const model::BatchTables tables =
      model::MakeBatchTables(ctx_, arena_, AllLinear(config), alone, batch, {});
  const Tensor y = arena_.New(DType::kF32, {kTokens, 24});
  model::MixerForward(ctx_, arena_, config, alone, model::MixerType::kLightning,
                      model::BindMixer(config, 2, model::MixerType::kLightning, mixers), tables, {},
                      ConstTensor(x.data(), {kTokens, 24}), {.y = y});

  const std::vector<double> expected = SharedReference(config, teacher, mixers).Run(x, kTokens);
  double scale = 0;
  for (double value : expected) scale = std::max(scale, std::abs(value));
  // The claim of docs/math/halo.md 9 (1): 1e-5 relative. Rounding alone: eight rounded tensors with
  // sums of at most 70 terms, sqrt(8 * 70) * 2^-24 = 1.4e-6.
  for (size_t i = 0; i < expected.size(); ++i)
    ASSERT_NEAR(y.Data<float>()[i], expected[i], 1e-5 * scale) << i;
}

}  // namespace
}  // namespace sala::recipes
