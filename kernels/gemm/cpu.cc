// The products on tensors: checks, and the cut of C into pieces for the threads. The cut follows
// the number of threads; an element's bits do not depend on it (serial.cc).
#include <algorithm>
#include <atomic>

#include "kernels/cuda_kernels.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/serial.h"

namespace sala::kernels {
namespace {

using SerialGemm = decltype(&GemmSerialNT);

struct Form {
  SerialGemm run;
  bool a_transposed;  // A stored [K, M]
  bool b_transposed;  // B stored [N, K]
};

constexpr int64_t kSmallestPiece = 96;
constexpr int64_t kPiecesPerThread = 4;

void CheckMatrix(const ConstTensor& x, int64_t rows, int64_t columns) {
  SALA_CHECK(x.rank() == 2 && x.dim(0) == rows && x.dim(1) == columns && x.dtype() == DType::kF32)
      << "expected [" << rows << ", " << columns << "] f32, found " << ShapeText(x);
  SALA_CHECK(rows <= 1 || x.stride(0) >= columns) << "rows overlap: stride " << x.stride(0);
}

void Gemm(const Form& form, const Context& ctx, const ConstTensor& a, const ConstTensor& b,
          const Tensor& c, const GemmOptions& options) {
  const int64_t m = c.dim(0);
  const int64_t n = c.dim(1);
  const int64_t k = a.dim(form.a_transposed ? 0 : 1);
  CheckMatrix(a, form.a_transposed ? k : m, form.a_transposed ? m : k);
  CheckMatrix(b, form.b_transposed ? n : k, form.b_transposed ? k : n);
  CheckMatrix(c, m, n);
  if (m == 0 || n == 0) return;

  const int64_t threads = ctx.pool->threads();
  const bool cut_rows = m >= n;
  const int64_t length = cut_rows ? m : n;
  const int64_t wanted =
      threads == 1 ? length
                   : (length + threads * kPiecesPerThread - 1) / (threads * kPiecesPerThread);
  const int64_t piece = threads == 1
                            ? length
                            : std::max(kSmallestPiece, (wanted + kSmallestPiece - 1) /
                                                           kSmallestPiece * kSmallestPiece);
  const int64_t pieces = (length + piece - 1) / piece;
  const int64_t workers = std::min(threads, pieces);

  const ArenaScope scope(*ctx.scratch);
  const int64_t room = GemmSerialWorkspace(cut_rows ? piece : m, cut_rows ? n : piece, k);
  auto* workspace = static_cast<float*>(
      ctx.scratch->Allocate(static_cast<size_t>(workers * room) * sizeof(float)));
  std::atomic<int64_t> next{0};
  ctx.pool->For(workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t p = next++; p < pieces; p = next++) {
      const int64_t begin = p * piece;
      const int64_t count = std::min(piece, length - begin);
      const int64_t row = cut_rows ? begin : 0;
      const int64_t column = cut_rows ? 0 : begin;
      const float* a_piece = a.Data<float>() + (form.a_transposed ? row : row * a.stride(0));
      const float* b_piece = b.Data<float>() + (form.b_transposed ? column * b.stride(0) : column);
      form.run(cut_rows ? count : m, cut_rows ? n : count, k, options.alpha, a_piece, a.stride(0),
               b_piece, b.stride(0), c.Row<float>(row) + column, c.stride(0), options.write,
               workspace + worker * room);
    }
  });
}

}  // namespace

void GemmNT(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
            const GemmOptions& options) {
  if (ctx.cuda()) return Cuda(ctx).GemmNT(ctx, a, b, c, options);
  Gemm({GemmSerialNT, false, true}, ctx, a, b, c, options);
}

void GemmNN(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
            const GemmOptions& options) {
  if (ctx.cuda()) return Cuda(ctx).GemmNN(ctx, a, b, c, options);
  Gemm({GemmSerialNN, false, false}, ctx, a, b, c, options);
}

void GemmTN(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
            const GemmOptions& options) {
  if (ctx.cuda()) return Cuda(ctx).GemmTN(ctx, a, b, c, options);
  Gemm({GemmSerialTN, true, false}, ctx, a, b, c, options);
}

}  // namespace sala::kernels
