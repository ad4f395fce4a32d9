// What token-wise kernels share: matrices of bfloat16 rows that are read and written 16 bytes at a
// time.
//
//   * Element by element: a grid of PackBlocks(op, packs) blocks of kPackThreads, each thread
//     walking with PackLoop.
//   * A whole row at a time (norms): a block of RowThreads(width) threads per row, thread i holding
//     the packs i, i + blockDim.x, ... of it in registers, kPacks = RowPacks(width) at most.
//   * Sums over the rows (gradients of norm weights): RowPieces(rows) blocks, each walking rows
//     blockIdx.x, blockIdx.x + gridDim.x, ... and keeping sums in registers; it writes one row of
//     `parts`, and AddColumnSums adds those up. The cut depends on the number of rows only, so the
//     same inputs give the same bits on every device.
#pragma once

#include <cmath>

#include "kernels/common/cuda_math.h"
#include "kernels/common/tensor_check.h"

namespace sala::kernels {

inline bool Aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// bf16 [rows, width] that 16-byte accesses can walk.
inline void CheckPackedMatrix(const ConstTensor& x, int64_t rows, int64_t width) {
  CheckShape(x, {rows, width}, DType::kBF16);
  SALA_CHECK(width % 8 == 0 && x.stride(0) % 8 == 0 && Aligned16(x.raw()))
      << "found " << ShapeText(x) << " with row stride " << x.stride(0)
      << ", expected a width, a row stride and an address that are multiples of 8 elements";
}

// bf16 [width], likewise.
inline void CheckPackedVector(const ConstTensor& x, int64_t width) {
  CheckVector(x, width, DType::kBF16);
  SALA_CHECK(width % 8 == 0 && Aligned16(x.raw()))
      << "found " << ShapeText(x)
      << ", expected a width and an address that are multiples of 8 elements";
}

constexpr int kPackThreads = 256;

// Enough blocks to fill the device a few times over; the loop inside the kernel does the rest.
// `elements` may also be elements or rows: whatever one thread takes at a time.
inline unsigned PackBlocks(const Op& op, int64_t elements) {
  const int64_t most = int64_t{op.device().info().multiprocessors} * 16;
  return static_cast<unsigned>(std::min(CeilDiv(elements, kPackThreads), most));
}

// The packs of a matrix that one thread takes: all of them, a grid apart. One division at the
// start, none in the loop.
//
//   for (PackLoop i(rows, packs); i.more(); i.Next()) Load8(x + i.row * stride + i.column(), v);
class PackLoop {
 public:
  __device__ __forceinline__ PackLoop(int64_t rows, int64_t packs) : packs_(packs), rows_(rows) {
    // Below 2^32: PackBlocks gives at most 16 blocks a multiprocessor.
    const unsigned first = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned step = gridDim.x * blockDim.x;
    const auto width = static_cast<unsigned>(packs);
    row = first / width;
    pack_ = first % width;
    row_step_ = step / width;
    pack_step_ = step % width;
  }
  __device__ __forceinline__ bool more() const { return row < rows_; }
  __device__ __forceinline__ int64_t pack() const { return pack_; }
  __device__ __forceinline__ int64_t column() const { return pack_ * 8; }
  __device__ __forceinline__ void Next() {
    row += row_step_;
    pack_ += pack_step_;
    if (pack_ >= packs_) {
      pack_ -= packs_;
      ++row;
    }
  }

  int64_t row;

 private:
  int64_t pack_, row_step_, pack_step_, packs_, rows_;
};

constexpr int kRowThreads = 512;  // at most, of a block that works on one row
constexpr int64_t kMaxRowWidth = 16384;

inline int RowPacks(int64_t width) { return width <= 8192 ? 2 : 4; }

inline unsigned RowThreads(int64_t width) {
  SALA_CHECK(width <= kMaxRowWidth)
      << "width " << width << ", at most " << kMaxRowWidth << " on a GPU";
  return static_cast<unsigned>(CeilDiv(width, int64_t{8} * kWarp * RowPacks(width)) * kWarp);
}

// First column of the thread's pack number p; beyond the width for threads without one. At most
// kMaxRowWidth.
__device__ __forceinline__ int RowColumn(int p) {
  return static_cast<int>(threadIdx.x + static_cast<unsigned>(p) * blockDim.x) * 8;
}

// Norms of rows. A sum of squares leaves float32 where the numbers are near 1e18 or larger. Then it
// is taken again, of the numbers times kShrink, and stands with a minus sign:
//   square >= 0: the sum of x^2;   square < 0: minus the sum of (x kShrink)^2
constexpr float kShrink = 0x1p-80F;

// square += the sum of (x factor)^2
__device__ __forceinline__ void AddSquares(const float (&x)[8], float factor, float& square) {
#pragma unroll
  for (int j = 0; j < 8; ++j) square += x[j] * factor * (x[j] * factor);
}

// `square` of a block's row, on every thread; share(factor) gives the thread's part of the sum of
// (x factor)^2.
template <typename Share>
__device__ __forceinline__ float BlockSquare(const Share& share, float* slots) {
  const float square = BlockSum(share(1.0F), slots);
  return square == INFINITY ? -BlockSum(share(kShrink), slots) : square;
}

// Of a row that the block holds in registers.
template <int kPacks>
__device__ __forceinline__ float BlockSquare(const float (&x)[kPacks][8], int64_t width,
                                             float* slots) {
  return BlockSquare(
      [&](float factor) {
        float square = 0.0F;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (RowColumn(p) < width) AddSquares(x[p], factor, square);
        }
        return square;
      },
      slots);
}

// r = (mean(x^2) + eps)^-1/2. Beside a `square` below zero eps is nothing.
__device__ __forceinline__ float RstdOf(float square, int64_t width, float eps) {
  const auto n = static_cast<float>(width);
  return square < 0.0F ? kShrink / sqrtf(-square / n) : 1.0F / sqrtf(square / n + eps);
}

// Blocks that share the rows where sums over rows are kept.
inline int64_t RowPieces(int64_t rows) { return std::min<int64_t>(CeilDiv(rows, 16), 512); }

// out[i] += parts[0][i] + ... + parts[pieces-1][i]; parts f32 [pieces, width]. Sixteen sums of
// every sixteenth part, then these in order.
void AddColumnSums(const Op& op, const float* parts, int64_t pieces, int64_t width, float* out);

// totals[s] = parts[s][0] + ... + parts[s][count-1] for the sums s in [0, sums), in a fixed tree;
// parts f64 [sums, count].
void SumParts(const Op& op, const double* parts, int64_t sums, int64_t count, double* totals);

}  // namespace sala::kernels
