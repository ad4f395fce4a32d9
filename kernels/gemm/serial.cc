// The blocked product on one thread.
//
// C is cut into blocks of kBlockRows x kBlockColumns and k into pieces of kBlockK. A piece of B is
// packed into panels as wide as the micro-kernel's tile and stays in the L2 cache, from where the
// micro-kernel fetches it ahead; a few rows of A stay in the L1 cache while the panels pass by.
// Where k needs several pieces, an element's running sum is stored unscaled and loaded again:
// storing a float32 changes nothing, so there is still one chain of additions per element.
#include "kernels/gemm/serial.h"

#include <algorithm>

#include "core/check.h"
#include "kernels/gemm/micro_kernel.h"
#include "kernels/gemm/pack.h"

namespace sala::kernels {

const MicroKernels& MicroKernelsOf(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx512:
      return kAvx512MicroKernels;
    case InstructionSet::kAvx2:
      return kAvx2MicroKernels;
    case InstructionSet::kPortable:
      break;
  }
  return kPortableMicroKernels;
}

namespace {

// For processors with 48 KiB of L1 and 2 MiB of L2 cache per core (docs/benchmarks/cpu_step.md). A
// long piece of k loads and stores the sums of C less often: they are the traffic beyond the L2
// cache.
constexpr int64_t kBlockRows = 960;
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kBlockK = 384;
constexpr int64_t kPackedRows = 96;  // rows of A packed at a time
// Packing pays when each packed element is used often enough.
constexpr int64_t kPackAColumns = 192;
constexpr int64_t kPackBRows = 64;

int64_t RoundUp(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Element (i, k) of A is a[i * a_row + k * a_k], element (k, j) of B is b[k * b_k + j * b_column].
struct Product {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  float alpha = 1.0F;
  const float* a = nullptr;
  int64_t a_row = 0;
  int64_t a_k = 0;
  const float* b = nullptr;
  int64_t b_k = 0;
  int64_t b_column = 0;
  float* c = nullptr;
  int64_t c_row = 0;
  Write write = Write::kOverwrite;
};

struct Workspace {
  float* a = nullptr;
  float* b = nullptr;
  float* sums = nullptr;
};

struct WorkspaceSizes {
  int64_t a = 0;
  int64_t b = 0;
  int64_t sums = 0;
};

// In floats, each a multiple of 16 (64 bytes), enough for every instruction set.
WorkspaceSizes SizesFor(int64_t m, int64_t n, int64_t k) {
  const int64_t block_k = std::min(k, kBlockK);
  WorkspaceSizes sizes;
  sizes.a = RoundUp(RoundUp(std::min(m, kPackedRows), kMaxMicroRows) * block_k, 16);
  sizes.b = RoundUp(std::min(n, kBlockColumns), kMaxMicroColumns) * block_k;
  if (k > kBlockK) sizes.sums = RoundUp(std::min(m, kBlockRows) * std::min(n, kBlockColumns), 16);
  return sizes;
}

// One block of C for one piece of k.
class BlockProduct {
 public:
  BlockProduct(const Product& product, const Workspace& workspace, const MicroKernels& kernels)
      : p_(product), work_(workspace), kernels_(kernels) {}

  // `start`: the sums of the earlier pieces of k, or null.
  void Run(const float* start, int64_t start_row, float* out, int64_t out_row, Finish finish) {
    start_ = start;
    start_row_ = start_row;
    out_ = out;
    out_row_ = out_row;
    finish_ = finish;
    PackB();
    const bool pack_a = p_.n >= kPackAColumns;
    for (int64_t i0 = 0; i0 < p_.m; i0 += kPackedRows) {
      const int64_t rows = std::min(kPackedRows, p_.m - i0);
      if (pack_a) PackA(i0, rows);
      for (int64_t i = i0; i < i0 + rows; i += kernels_.rows) {
        for (int64_t j = 0; j < p_.n; j += PanelWidth()) {
          RunTile(i, std::min(kernels_.rows, i0 + rows - i), j,
                  pack_a ? work_.a + (i - i0) * p_.k : nullptr);
        }
      }
    }
  }

 private:
  int64_t PanelWidth() const { return 2 * kernels_.width; }
  // Width in floats of the panel that starts at column j: one or two whole vectors.
  int64_t WidthAt(int64_t j) const {
    return std::min(PanelWidth(), RoundUp(p_.n - j, kernels_.width));
  }
  // B can be read where it lies when its rows are contiguous; worth it when few rows of A will use
  // it.
  bool ReadsBInPlace(int64_t j) const {
    return p_.b_column == 1 && p_.m <= kPackBRows && p_.n - j >= WidthAt(j);
  }

  void PackB() {
    // Whole panels whose rows lie side by side go together.
    const int64_t together = p_.b_column == 1 ? p_.n / PanelWidth() * PanelWidth() : 0;
    if (together > 0 && !ReadsBInPlace(0)) {
      PackRows(p_.k, together, p_.b, p_.b_k, PanelWidth(), work_.b);
    }
    for (int64_t j = together; j < p_.n; j += PanelWidth()) {
      if (ReadsBInPlace(j)) continue;
      const int64_t columns = std::min(PanelWidth(), p_.n - j);
      float* to = work_.b + j * p_.k;
      if (p_.b_column == 1) {
        PackRows(p_.k, columns, p_.b + j, p_.b_k, WidthAt(j), to);
      } else {
        PackTransposed(p_.k, columns, p_.b + j * p_.b_column, p_.b_column, WidthAt(j), to);
      }
    }
  }

  void PackA(int64_t i0, int64_t rows) {
    const float* from = p_.a + i0 * p_.a_row;
    if (p_.a_k != 1) return PackRows(p_.k, rows, from, p_.a_k, kernels_.rows, work_.a);
    for (int64_t i = 0; i < rows; i += kernels_.rows) {
      PackTransposed(p_.k, std::min(kernels_.rows, rows - i), from + i * p_.a_row, p_.a_row,
                     kernels_.rows, work_.a + i * p_.k);
    }
  }

  void RunTile(int64_t i, int64_t rows, int64_t j, const float* packed_a) {
    MicroTile tile;
    tile.k = p_.k;
    tile.a = packed_a != nullptr ? packed_a : p_.a + i * p_.a_row;
    tile.a_row = packed_a != nullptr ? 1 : p_.a_row;
    tile.a_k = packed_a != nullptr ? kernels_.rows : p_.a_k;
    const int64_t width = WidthAt(j);
    const bool in_place = ReadsBInPlace(j);
    tile.b = in_place ? p_.b + j : work_.b + j * p_.k;
    tile.b_k = in_place ? p_.b_k : width;
    tile.start = start_ != nullptr ? start_ + i * start_row_ + j : nullptr;
    tile.start_row = start_row_;
    tile.out = out_ + i * out_row_ + j;
    tile.out_row = out_row_;
    tile.finish = finish_;
    tile.alpha = p_.alpha;
    const MicroKernel kernel = kernels_.kernel[rows - 1][width / kernels_.width - 1];
    if (p_.n - j >= width) {
      kernel(tile);
    } else {
      RunEdgeTile(kernel, tile, rows, p_.n - j);
    }
  }

  // A tile wider than what is left of C works on a copy.
  static void RunEdgeTile(MicroKernel kernel, MicroTile tile, int64_t rows, int64_t columns) {
    alignas(64) float start[kMaxMicroRows * kMaxMicroColumns] = {};
    alignas(64) float out[kMaxMicroRows * kMaxMicroColumns] = {};
    float* const to = tile.out;
    const int64_t to_row = tile.out_row;
    for (int64_t r = 0; r < rows; ++r) {
      if (tile.start != nullptr) {
        std::copy_n(tile.start + r * tile.start_row, columns, start + r * kMaxMicroColumns);
      }
      if (tile.finish == Finish::kScaleAndAdd) {
        std::copy_n(to + r * to_row, columns, out + r * kMaxMicroColumns);
      }
    }
    if (tile.start != nullptr) tile.start = start;
    tile.start_row = kMaxMicroColumns;
    tile.out = out;
    tile.out_row = kMaxMicroColumns;
    kernel(tile);
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(out + r * kMaxMicroColumns, columns, to + r * to_row);
    }
  }

  const Product p_;
  const Workspace work_;
  const MicroKernels& kernels_;
  const float* start_ = nullptr;
  int64_t start_row_ = 0;
  float* out_ = nullptr;
  int64_t out_row_ = 0;
  Finish finish_ = Finish::kScale;
};

// All of k for one block of C.
void RunBlock(const Product& block, const Workspace& work, const MicroKernels& kernels) {
  const Finish last = block.write == Write::kAccumulate ? Finish::kScaleAndAdd : Finish::kScale;
  // While k goes on, the sums wait in C, unless C's old content is still needed.
  const bool apart = block.write == Write::kAccumulate;
  float* sums = apart ? work.sums : block.c;
  const int64_t sums_row = apart ? block.n : block.c_row;
  int64_t k0 = 0;
  do {
    Product piece = block;
    piece.k = std::min(kBlockK, block.k - k0);
    piece.a = block.a + k0 * block.a_k;
    piece.b = block.b + k0 * block.b_k;
    const bool is_last = k0 + piece.k == block.k;
    BlockProduct(piece, work, kernels)
        .Run(k0 == 0 ? nullptr : sums, sums_row, is_last ? block.c : sums,
             is_last ? block.c_row : sums_row, is_last ? last : Finish::kRawSum);
    k0 += piece.k;
  } while (k0 < block.k);
}

void RunProduct(const Product& product, float* workspace) {
  SALA_CHECK(product.m >= 0 && product.n >= 0 && product.k >= 0)
      << product.m << " x " << product.n << " x " << product.k;
  const MicroKernels& kernels = MicroKernelsOf(CurrentInstructionSet());
  const WorkspaceSizes sizes = SizesFor(product.m, product.n, product.k);
  const Workspace work = {workspace, workspace + sizes.a, workspace + sizes.a + sizes.b};
  for (int64_t j = 0; j < product.n; j += kBlockColumns) {
    for (int64_t i = 0; i < product.m; i += kBlockRows) {
      Product block = product;
      block.m = std::min(kBlockRows, product.m - i);
      block.n = std::min(kBlockColumns, product.n - j);
      block.a = product.a + i * product.a_row;
      block.b = product.b + j * product.b_column;
      block.c = product.c + i * product.c_row + j;
      RunBlock(block, work, kernels);
    }
  }
}

}  // namespace

int64_t GemmSerialWorkspace(int64_t m, int64_t n, int64_t k) {
  const WorkspaceSizes sizes = SizesFor(m, n, k);
  return sizes.a + sizes.b + sizes.sums;
}

void GemmSerialNT(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                  const float* b, int64_t ldb, float* c, int64_t ldc, Write write,
                  float* workspace) {
  RunProduct({m, n, k, alpha, a, lda, 1, b, 1, ldb, c, ldc, write}, workspace);
}

void GemmSerialNN(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                  const float* b, int64_t ldb, float* c, int64_t ldc, Write write,
                  float* workspace) {
  RunProduct({m, n, k, alpha, a, lda, 1, b, ldb, 1, c, ldc, write}, workspace);
}

void GemmSerialTN(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                  const float* b, int64_t ldb, float* c, int64_t ldc, Write write,
                  float* workspace) {
  RunProduct({m, n, k, alpha, a, 1, lda, b, ldb, 1, c, ldc, write}, workspace);
}

}  // namespace sala::kernels
