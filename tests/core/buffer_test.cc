#include "core/buffer.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core/host_memory.h"
#include "core/memory.h"

namespace sala {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

TEST(HostMemoryTest, LargePiecesBeginOnABorderOfAHugePage) {
  const auto border = [](size_t bytes) -> size_t {
    const std::unique_ptr<void, decltype(&std::free)> piece(AllocateHostMemory(bytes), &std::free);
    std::memset(piece.get(), 1, bytes);
    const auto address = reinterpret_cast<uintptr_t>(piece.get());
    return address % (2 * kMiB) == 0 ? 2 * kMiB : (address % 64 == 0 ? 64 : 0);
  };
  for (const size_t bytes : {size_t{1}, size_t{64}, size_t{65}, 3 * kMiB, 4 * kMiB - 1})
    EXPECT_GE(border(bytes), 64U) << bytes;
  for (const size_t bytes : {4 * kMiB, 4 * kMiB + 1, 7 * kMiB})
    EXPECT_EQ(border(bytes), 2 * kMiB) << bytes;
}

TEST(HostMemoryTest, HugePagesBecomeResidentWhole) {
  EXPECT_EQ(ResidentOfPiece(64 * kMiB, 1, true), 2 * kMiB);
  EXPECT_EQ(ResidentOfPiece(64 * kMiB, 2 * kMiB, true), 2 * kMiB);
  EXPECT_EQ(ResidentOfPiece(64 * kMiB, 2 * kMiB + 1, true), 4 * kMiB);
  EXPECT_EQ(ResidentOfPiece(5 * kMiB, 5 * kMiB - 1, true), 5 * kMiB);  // no more than there is
  EXPECT_EQ(ResidentOfPiece(64 * kMiB, 0, true), 0U);
  EXPECT_EQ(ResidentOfPiece(64 * kMiB, 1, false), 1U);
  EXPECT_EQ(ResidentOfPiece(4 * kMiB - 1, 1, true), 1U);
}

TEST(BufferTest, HostBytesAreThoseAskedFor) {
  const int64_t before = HostBufferBytes();
  const std::vector<size_t> sizes = {0, 1, 100, 4 * kMiB - 1, 4 * kMiB, 4 * kMiB + 1, 5 * kMiB + 7};
  std::vector<Buffer> buffers;
  int64_t asked = 0;
  for (const size_t bytes : sizes) {
    buffers.emplace_back(bytes);
    asked += static_cast<int64_t>(bytes);
    EXPECT_EQ(HostBufferBytes() - before, asked) << bytes;
  }
  EXPECT_GE(HostBufferPeakBytes(), HostBufferBytes());
  const Buffer copy = buffers.back();
  EXPECT_EQ(HostBufferBytes() - before, asked + static_cast<int64_t>(sizes.back()));
  Buffer moved = std::move(buffers.back());
  EXPECT_EQ(HostBufferBytes() - before, asked + static_cast<int64_t>(sizes.back()));
  moved = Buffer(3);
  EXPECT_EQ(HostBufferBytes() - before, asked + 3);
  buffers.clear();
  EXPECT_EQ(HostBufferBytes() - before, static_cast<int64_t>(sizes.back()) + 3);
}

}  // namespace
}  // namespace sala
