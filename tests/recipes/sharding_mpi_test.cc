// Gradients and parameters that are split over ranks: what every rank ends with, and that exchanges
// begin when a unit is through, not at the end of the step. Run under mpirun.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "model/parameters.h"
#include "recipes/gradient_reducer.h"
#include "tests/parallel/mpi_test_main.h"

namespace sala::recipes {
namespace {

parallel::Communicator* world = nullptr;

model::ModelConfig SmallModel() {
  model::ModelConfig c;
  c.vocab_size = 37;
  c.hidden_size = 24;
  c.intermediate_size = 32;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 6;
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

class ShardingTest : public ::testing::TestWithParam<int64_t> {
 protected:
  ShardingTest() : specs_(model::ParameterSpecs(SmallModel())) {
    auto mesh = parallel::Mesh::Create(*world, {.zero_stage = GetParam()});
    EXPECT_TRUE(mesh.ok()) << mesh.status();
    mesh_ = std::move(mesh).value();
    ctx_.pool = &pool_;
    ctx_.scratch = &scratch_;
  }

  int64_t stage() const { return GetParam(); }
  // Whole numbers, so that sums are exact.
  static float Term(int rank, int64_t element) {
    return static_cast<float>((rank + 1) * (element % 101));
  }
  static float Sum(int64_t element) {
    const int n = world->size();
    return static_cast<float>(n * (n + 1) / 2 * (element % 101));
  }

  // Adds this rank's terms to a unit, as a backward pass does.
  static void AddUnit(GradientReducer& reducer, int64_t u) {
    reducer.Enter(u);
    const Tensor all =
        reducer.store().Flat(reducer.partition().unit_begin(u), reducer.partition().unit_end(u));
    for (int64_t i = 0; i < all.numel(); ++i)
      all.Data<float>()[i] += Term(world->rank(), reducer.partition().unit_begin(u) + i);
    reducer.Leave(u);
  }

  void ExpectSummed(GradientReducer& reducer, int64_t u, float times) {
    const parallel::UnitPartition& p = reducer.partition();
    const int64_t begin = stage() == 0 ? p.unit_begin(u) : p.begin(u, mesh_->param_rank());
    const int64_t end = stage() == 0 ? p.unit_end(u) : p.end(u, mesh_->param_rank());
    const Tensor found = reducer.Summed(begin, end);
    for (int64_t i = 0; i < end - begin; ++i)
      ASSERT_EQ(found.Data<float>()[i], times * Sum(begin + i)) << "unit " << u << " at " << i;
  }

  std::vector<model::ParameterSpec> specs_;
  ThreadPool pool_{1};
  Arena scratch_;
  Context ctx_;
  std::unique_ptr<parallel::Mesh> mesh_;
};

TEST_P(ShardingTest, UnitsAreSummedWhileTheBackwardPassGoesOn) {
  const model::ParameterStore layout(specs_);
  GradientReducer reducer(ctx_, layout, *mesh_, /*rank_independent=*/false);
  reducer.BeginStep();
  for (const bool last : {false, true}) {
    reducer.BeginMicroBatch(last);
    for (int64_t u = reducer.partition().units() - 1; u >= 2; --u) AddUnit(reducer, u);
    if (last) {
      // The units below are still to come, and nobody has asked for sums.
      ASSERT_TRUE(mesh_->queue().WaitAll().ok());
      for (int64_t u = 2; u < reducer.partition().units(); ++u) ExpectSummed(reducer, u, 2);
    }
    for (int64_t u = 1; u >= 0; --u) AddUnit(reducer, u);
  }
  ASSERT_TRUE(reducer.Finish().ok());
  for (int64_t u = 0; u < reducer.partition().units(); ++u) ExpectSummed(reducer, u, 2);
  // Another step starts from zero.
  reducer.BeginStep();
  reducer.BeginMicroBatch(true);
  for (int64_t u = reducer.partition().units() - 1; u >= 0; --u) AddUnit(reducer, u);
  ASSERT_TRUE(reducer.Finish().ok());
  for (int64_t u = 0; u < reducer.partition().units(); ++u) ExpectSummed(reducer, u, 1);
}

TEST_P(ShardingTest, ARankWithoutSamplesTakesPart) {
  const model::ParameterStore layout(specs_);
  GradientReducer reducer(ctx_, layout, *mesh_, /*rank_independent=*/false);
  reducer.BeginStep();
  if (stage() >= 2 || world->rank() == 0) {
    reducer.BeginMicroBatch(true);
    for (int64_t u = reducer.partition().units() - 1; u >= 0; --u) {
      reducer.Enter(u);
      const Tensor all =
          reducer.store().Flat(reducer.partition().unit_begin(u), reducer.partition().unit_end(u));
      for (int64_t i = 0; world->rank() == 0 && i < all.numel(); ++i) all.Data<float>()[i] += 3;
      reducer.Leave(u);
    }
  }
  ASSERT_TRUE(reducer.Finish().ok());
  const parallel::UnitPartition& p = reducer.partition();
  for (int64_t u = 0; u < p.units(); ++u) {
    const Tensor found =
        reducer.Summed(p.begin(u, mesh_->param_rank()), p.end(u, mesh_->param_rank()));
    for (int64_t i = 0; i < found.numel(); ++i) ASSERT_EQ(found.Data<float>()[i], 3) << u;
  }
}

TEST_P(ShardingTest, ParametersAreGatheredAheadOfTheirUse) {
  const parallel::UnitPartition partition(model::UnitBorders(specs_), mesh_->param_size());
  const model::Placement mine =
      stage() == 3 ? model::Placement::Shard(partition, mesh_->param_rank()) : model::Placement();
  model::ParameterStore host(specs_, mine);
  model::ComputeParameters parameters(ctx_, host, mesh_.get());
  // What an optimizer does: each rank writes its pieces.
  const auto update = [&](float change) {
    for (int64_t u = 0; u < partition.units(); ++u) {
      const int64_t begin = partition.begin(u, mesh_->param_rank());
      const int64_t end = partition.end(u, mesh_->param_rank());
      const Tensor own = parameters.Own(begin, end);
      for (int64_t i = 0; i < end - begin; ++i)
        own.Data<float>()[i] = change + static_cast<float>(begin + i);
      parameters.Share(u, partition);
    }
  };
  const auto expect = [&](int64_t u, float change) {
    const Tensor all = parameters.store().Flat(partition.unit_begin(u), partition.unit_end(u));
    for (int64_t i = 0; i < all.numel(); ++i) {
      ASSERT_EQ(all.Data<float>()[i], change + static_cast<float>(partition.unit_begin(u) + i))
          << "unit " << u << " at " << i;
    }
  };
  for (const float change : {1.0F, 5.0F}) {
    update(change);
    parameters.Enter(0);
    expect(0, change);
    // The first layer is on its way before anybody enters it.
    ASSERT_TRUE(mesh_->queue().WaitAll().ok());
    expect(1, change);
    for (int64_t u = 1; u < partition.units(); ++u) {
      parameters.Enter(u);
      expect(u, change);
    }
    for (int64_t u = partition.units() - 1; u >= 1; --u) {
      parameters.Enter(u);
      expect(u, change);
    }
    parameters.Settle();
  }
}

INSTANTIATE_TEST_SUITE_P(Zero, ShardingTest, ::testing::Values(0, 1, 2, 3));

int Main(int argc, char** argv) { return testing::RunTestsOnRanks(argc, argv, &world); }

}  // namespace
}  // namespace sala::recipes

int main(int argc, char** argv) { return sala::recipes::Main(argc, argv); }
