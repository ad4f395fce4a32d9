#include <functional>
#include <limits>
#include <optional>
#include <utility>

#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
#include "kernels/cuda_kernels.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/rms_norm/row.h"

namespace sala::kernels {
namespace {

// In the row functions a null weight means no norm, a null z no gate.

SALA_INLINE double SquareRowBody(int64_t n, const float* o) { return RowSquare(n, o); }
constexpr Vectorized<SquareRowBody> SquareRow{};

SALA_INLINE void ForwardRowBody(int64_t n, const float* o, const float* weight, const float* z,
                                float r, float* y) {
  const float* gated = o;
  if (weight != nullptr) {
    SALA_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) y[i] = o[i] * r * weight[i];
    gated = y;
  }
  if (z == nullptr) return;
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] = gated[i] * Sigmoid(z[i]);
}
constexpr Vectorized<ForwardRowBody> ForwardRow{};

// dout = dy sigmoid(z), the gradient of the normed value; dz = dy n s (1 - s).
SALA_INLINE void GateBackwardRowBody(int64_t n, const float* dy, const float* o,
                                     const float* weight, const float* z, float rstd, float* dout,
                                     float* dz) {
  if (weight == nullptr) {
    SALA_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const float s = Sigmoid(z[i]);
      dz[i] = dy[i] * o[i] * (s * (1.0F - s));
      dout[i] = dy[i] * s;
    }
    return;
  }
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float s = Sigmoid(z[i]);
    dz[i] = dy[i] * (o[i] * rstd * weight[i]) * (s * (1.0F - s));
    dout[i] = dy[i] * s;
  }
}
constexpr Vectorized<GateBackwardRowBody> GateBackwardRow{};

SALA_INLINE double DotRowBody(int64_t n, const float* dn, const float* o, const float* weight) {
  return RowDot(n, dn, o, weight);
}
constexpr Vectorized<DotRowBody> DotRow{};

SALA_INLINE void NormBackwardRowBody(int64_t n, const float* dn, const float* o,
                                     const float* weight, float rstd, double dot, int64_t width,
                                     float* dout, float* weight_sums) {
  RowNormBackward<false>(n, dn, o, weight, rstd, dot, width, dout, weight_sums);
}
constexpr Vectorized<NormBackwardRowBody> NormBackwardRow{};

// What output_gate.h says of the sum of squares that one rank sends.
constexpr double kShrinkSquare = 0x1p-160;
float SentSquare(double square) {
  return static_cast<float>(square > std::numeric_limits<float>::max() ? -square * kShrinkSquare
                                                                       : square);
}
double ReceivedSquare(double sent) { return sent < 0 ? -sent / kShrinkSquare : sent; }

enum class RowSum { kSquares, kDots };

// One number a token that is summed over the ranks: all rows' own first, then Total.
class RowTotals {
 public:
  // Without an exchange Total works the number out when it is asked for.
  RowTotals(const Context& ctx, const WidthShard& shard, int64_t rows, RowSum kind,
            std::function<double(int64_t row)> own)
      : own_(std::move(own)), exchange_(shard.exchange), rows_(rows), kind_(kind) {
    if (exchange_ == nullptr || rows == 0) return;
    buffer_.emplace(ctx, *exchange_, rows);
    auto* mine = buffer_->mine.Data<float>();
    ctx.pool->For(rows, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        mine[t] = kind_ == RowSum::kSquares ? SentSquare(own_(t)) : static_cast<float>(own_(t));
      }
    });
    buffer_->Gather(ctx, *exchange_, rows);
  }
  double Total(int64_t row) const {
    if (exchange_ == nullptr) return own_(row);
    double sum = 0;
    for (int64_t k = 0; k < exchange_->ranks; ++k) {
      const double sent = buffer_->all.Data<float>()[k * rows_ + row];
      sum += kind_ == RowSum::kSquares ? ReceivedSquare(sent) : sent;
    }
    return sum;
  }

 private:
  std::function<double(int64_t)> own_;
  const RankExchange* exchange_;
  int64_t rows_;
  RowSum kind_;
  std::optional<GatherBuffer> buffer_;
};

void Check(const Context& ctx, const ConstTensor& o, const ConstTensor& weight,
           const ConstTensor& z, const ConstTensor& rstd) {
  CheckCpu(ctx);
  SALA_CHECK(o.rank() == 2) << ShapeText(o);
  CheckShape(o, {o.dim(0), o.dim(1)});
  SALA_CHECK(o.numel() == 0 || !weight.empty() || !z.empty()) << "neither norm nor gate";
  if (!weight.empty()) {
    CheckVector(weight, o.dim(1));
    CheckVector(rstd, o.dim(0));
  }
  if (!z.empty()) CheckShape(z, {o.dim(0), o.dim(1)});
}

template <typename TensorType>
auto RowOrNull(const TensorType& x, int64_t t) {
  return x.empty() ? nullptr : x.template Row<float>(t);
}

}  // namespace

void OutputGateForward(const Context& ctx, const ConstTensor& o, const ConstTensor& weight,
                       const ConstTensor& z, float eps, const Tensor& y, const Tensor& rstd,
                       const WidthShard& shard) {
  if (ctx.cuda()) return Cuda(ctx).OutputGateForward(ctx, o, weight, z, eps, y, rstd, shard);
  Check(ctx, o, weight, z, rstd);
  const int64_t columns = o.dim(1);
  const int64_t width = NormWidth(shard, columns);
  CheckShape(y, {o.dim(0), columns});
  const ArenaScope scope(*ctx.scratch);
  std::optional<RowTotals> squares;
  if (!weight.empty()) {
    squares.emplace(ctx, shard, o.dim(0), RowSum::kSquares,
                    [&](int64_t t) { return SquareRow(columns, o.Row<float>(t)); });
  }
  ctx.pool->For(o.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float r = weight.empty() ? 1.0F : RstdOf(squares->Total(t), width, eps);
      if (!weight.empty()) rstd.Data<float>()[t] = r;
      ForwardRow(columns, o.Row<float>(t), RowOrNull(weight, 0), RowOrNull(z, t), r,
                 y.Row<float>(t));
    }
  });
}

void OutputGateBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& o,
                        const ConstTensor& weight, const ConstTensor& z, const ConstTensor& rstd,
                        const Tensor& dout, const Tensor& dz, const Tensor& dweight,
                        const WidthShard& shard) {
  if (ctx.cuda()) {
    return Cuda(ctx).OutputGateBackward(ctx, dy, o, weight, z, rstd, dout, dz, dweight, shard);
  }
  Check(ctx, o, weight, z, rstd);
  const int64_t columns = o.dim(1);
  const int64_t width = NormWidth(shard, columns);
  CheckShape(dy, {o.dim(0), columns});
  CheckShape(dout, {o.dim(0), columns});
  if (!z.empty()) CheckShape(dz, {o.dim(0), columns});
  if (!dweight.empty()) {
    SALA_CHECK(!weight.empty()) << "dweight without a norm";
    CheckVector(dweight, columns);
  }
  // dn, the gradient of the normed value, stands in dout where there is a gate.
  const auto gate_row = [&](int64_t t) {
    if (z.empty()) return dy.Row<float>(t);
    const float r = weight.empty() ? 1.0F : rstd.Data<float>()[t];
    GateBackwardRow(columns, dy.Row<float>(t), o.Row<float>(t), RowOrNull(weight, 0),
                    z.Row<float>(t), r, dout.Row<float>(t), dz.Row<float>(t));
    return static_cast<const float*>(dout.Row<float>(t));
  };
  if (weight.empty()) {
    ctx.pool->For(o.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) gate_row(t);
    });
    return;
  }
  const ArenaScope scope(*ctx.scratch);
  const RowTotals dots(ctx, shard, o.dim(0), RowSum::kDots, [&](int64_t t) {
    return DotRow(columns, gate_row(t), o.Row<float>(t), weight.Data<float>());
  });
  ForRowsWithSums(ctx, o.dim(0), columns, dweight, [&](int64_t begin, int64_t end, float* sums) {
    for (int64_t t = begin; t < end; ++t) {
      const double dot = dots.Total(t);
      const float* dn = z.empty() ? dy.Row<float>(t) : dout.Row<float>(t);
      NormBackwardRow(columns, dn, o.Row<float>(t), weight.Data<float>(), rstd.Data<float>()[t],
                      dot, width, dout.Row<float>(t), sums);
    }
  });
}

}  // namespace sala::kernels
