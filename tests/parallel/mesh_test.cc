#include "parallel/mesh.h"

#include <gtest/gtest.h>

namespace sala::parallel {
namespace {

TEST(FlatPartitionTest, CoversEverythingOnceOnAlignedBorders) {
  for (const int64_t n : {0, 1, 15, 16, 17, 1000, 4096}) {
    for (int ranks = 1; ranks <= 9; ++ranks) {
      const FlatPartition p = FlatPartition::Even(n, ranks);
      ASSERT_EQ(p.begin.size(), static_cast<size_t>(ranks) + 1);
      EXPECT_EQ(p.begin.front(), 0);
      EXPECT_EQ(p.begin.back(), n);
      for (size_t r = 0; r < static_cast<size_t>(ranks); ++r) {
        EXPECT_EQ(p.counts[r], p.begin[r + 1] - p.begin[r]);
        EXPECT_GE(p.counts[r], 0);
        if (p.begin[r + 1] != n) {
          EXPECT_EQ(p.begin[r + 1] % 16, 0);
        }
        // Even: no rank has more than one unit of 16 above the mean.
        EXPECT_LE(p.counts[r], n / ranks + 32);
      }
    }
  }
}

TEST(MeshTest, OneRankIsItsOwnMesh) {
  const auto self = MakeSelfCommunicator();
  const auto mesh = Mesh::Create(*self, {});
  ASSERT_TRUE(mesh.ok()) << mesh.status();
  EXPECT_EQ((*mesh)->dp_size(), 1);
  EXPECT_EQ((*mesh)->config().dp, 1);
}

TEST(MeshTest, RefusesImpossibleSplits) {
  const auto self = MakeSelfCommunicator();
  const auto wrong_ranks = Mesh::Create(*self, {.dp = 4});
  EXPECT_EQ(ExitCodeOf(wrong_ranks.status()), ExitCode::kConfig);
  EXPECT_EQ(MessageOf(wrong_ranks.status()),
            "CFG-MESH: parallel.dp 4 x cp 1 x tp 1 = 4 but the job has 1 ranks; start mpirun -np 4 "
            "or set parallel.dp to 0 (all ranks that cp and tp leave)");
  const auto tensor_parallel = Mesh::Create(*self, {.tp = 2});
  EXPECT_EQ(
      MessageOf(tensor_parallel.status()),
      "CFG-MESH: parallel.cp 1 x parallel.tp 2 = 2 does not divide the job's 1 ranks; start a "
      "multiple of 2 ranks, or change cp or tp");
  EXPECT_EQ(ResolveMesh(12, {.cp = 2, .tp = 3})->dp, 2);
  EXPECT_FALSE(ResolveMesh(12, {.dp = 3, .cp = 2, .tp = 3}).ok());
}

TEST(UnitPartitionTest, PiecesCoverEveryUnitAndShardsHoldThemInARow) {
  const std::vector<int64_t> borders = {0, 0, 48, 48, 1008, 1024};  // two empty units
  for (int ranks = 1; ranks <= 5; ++ranks) {
    const UnitPartition p(borders, ranks);
    ASSERT_EQ(p.units(), 5);
    for (int r = 0; r < ranks; ++r) {
      int64_t size = 0;
      for (int64_t u = 0; u < p.units(); ++u) {
        EXPECT_EQ(p.begin(u, r), r == 0 ? p.unit_begin(u) : p.end(u, r - 1));
        EXPECT_EQ(p.shard_begin(u, r), size);
        size += p.end(u, r) - p.begin(u, r);
      }
      EXPECT_EQ(p.shard_size(r), size);
    }
    for (int64_t u = 0; u < p.units(); ++u) EXPECT_EQ(p.end(u, ranks - 1), p.unit_end(u));
  }
}

}  // namespace
}  // namespace sala::parallel
