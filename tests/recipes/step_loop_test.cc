#include "recipes/step_loop.h"

#include <gtest/gtest.h>

namespace sala::recipes {
namespace {

TEST(CheckShares, OnlySplitsThatKeepTheTreeAreTaken) {
  BatchConfig batch = {.seq_len_tokens = 8,
                       .global_batch_tokens = 8 * 23,
                       .micro_batch_sequences = 2,
                       .steps = 1,
                       .rank_independent_sums = true};
  ASSERT_EQ(batch.micro_batches(), 12);  // the last one has one sequence
  for (const int ranks : {1, 2, 4}) EXPECT_TRUE(CheckShares(batch, {.dp = ranks}).ok()) << ranks;
  for (const int ranks : {3, 6, 8, 16}) {
    const Status status = CheckShares(batch, {.dp = ranks});
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig) << ranks;
    EXPECT_EQ(ErrorCodeOf(status), "CFG-MESH") << ranks;
  }
  EXPECT_EQ(MessageOf(CheckShares(batch, {.dp = 3})),
            "CFG-MESH: batch.rank_independent_sums is on, but the 12 micro-batches of a step (23 "
            "sequences by 2) cannot be shared out evenly over 3 ranks; expected a number of ranks "
            "that is a power of two and divides them: change the ranks, the batch or "
            "micro_batch_sequences");
  for (const parallel::MeshConfig& mesh :
       {parallel::MeshConfig{.dp = 1, .cp = 2}, parallel::MeshConfig{.dp = 1, .tp = 2},
        parallel::MeshConfig{.dp = 2, .zero_stage = 2}}) {
    EXPECT_EQ(ErrorCodeOf(CheckShares(batch, mesh)), "CFG-MESH");
  }
  batch.rank_independent_sums = false;
  EXPECT_TRUE(CheckShares(batch, {.dp = 3}).ok());
}

}  // namespace
}  // namespace sala::recipes
