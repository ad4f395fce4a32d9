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
            "CFG-MESH: parallel.dp is 4 but the job has 1 ranks; start mpirun -np 4 or set "
            "parallel.dp to 0 (all ranks)");
  const auto tensor_parallel = Mesh::Create(*self, {.tp = 2});
  EXPECT_NE(MessageOf(tensor_parallel.status()).find("parallel.tp is 2"), std::string::npos);
}

}  // namespace
}  // namespace sala::parallel
