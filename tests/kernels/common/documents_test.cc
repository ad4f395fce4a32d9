#include "kernels/common/documents.h"

#include <gtest/gtest.h>

namespace sala::kernels {
namespace {

TEST(Documents, SkipsEmptyOnesAndKeepsOrder) {
  const std::vector<int32_t> cu_seqlens = {0, 0, 3, 3, 4, 10, 10};
  const std::vector<DocumentRange> documents = Documents(cu_seqlens);
  ASSERT_EQ(documents.size(), 3U);
  EXPECT_EQ(documents[0].begin, 0);
  EXPECT_EQ(documents[0].end, 3);
  EXPECT_EQ(documents[1].length(), 1);
  EXPECT_EQ(documents[2].begin, 4);
  EXPECT_EQ(documents[2].length(), 6);
  EXPECT_TRUE(Documents(std::vector<int32_t>{0}).empty());
}

TEST(DocumentsDeathTest, RefusesFallingBoundaries) {
  EXPECT_DEATH(Documents(std::vector<int32_t>{0, 5, 4}), "falls from 5 to 4");
  EXPECT_DEATH(Documents(std::vector<int32_t>{1, 5}), "must start with 0");
}

}  // namespace
}  // namespace sala::kernels
