#include "kernels/common/documents.h"

#include <gtest/gtest.h>

#include <utility>

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

TEST(Documents, PartOfARangeOfTokens) {
  const auto part = [](int64_t first, int64_t count) {
    const DocumentRange found = PartOf({10, 20}, first, count);
    return std::pair{found.begin, found.end};
  };
  EXPECT_EQ(part(0, 30), std::pair(0L, 10L));
  EXPECT_EQ(part(12, 3), std::pair(2L, 5L));
  EXPECT_EQ(part(0, 11), std::pair(0L, 1L));
  EXPECT_EQ(part(19, 30), std::pair(9L, 10L));
  for (const int64_t first : {0, 10, 15, 20, 25}) {
    EXPECT_EQ(part(first, 0).first, part(first, 0).second);
  }
  EXPECT_EQ(part(20, 5), std::pair(10L, 10L));
  EXPECT_EQ(part(0, 10), std::pair(0L, 0L));
}

TEST(DocumentsDeathTest, RefusesFallingBoundaries) {
  EXPECT_DEATH(Documents(std::vector<int32_t>{0, 5, 4}), "falls from 5 to 4");
  EXPECT_DEATH(Documents(std::vector<int32_t>{1, 5}), "must start with 0");
}

}  // namespace
}  // namespace sala::kernels
