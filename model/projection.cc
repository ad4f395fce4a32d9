#include "model/projection.h"

#include "core/check.h"
#include "kernels/gemm/gemm.h"

namespace sala::model {
namespace {

using kernels::Write;

// The rows of all pieces as one matrix when each starts where the one before it ends; else empty.
// Pieces that are empty in both lists are left out; one that is empty only here (a frozen gradient)
// breaks the row.
Tensor JoinRows(const std::vector<Tensor>& pieces, const std::vector<Tensor>& weights) {
  Tensor joined;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Tensor& piece = pieces[i];
    if (weights[i].empty()) continue;
    if (piece.empty() || !piece.contiguous()) return {};
    if (joined.empty()) {
      joined = piece;
      continue;
    }
    const char* end = static_cast<const char*>(joined.raw()) +
                      joined.numel() * static_cast<int64_t>(SizeOf(joined.dtype()));
    if (piece.raw() != end || piece.dtype() != joined.dtype() || piece.dim(1) != joined.dim(1))
      return {};
    joined = Tensor(joined.raw(), joined.dtype(), {joined.dim(0) + piece.dim(0), joined.dim(1)},
                    joined.device());
  }
  return joined;
}

}  // namespace

Projection::Projection(const std::vector<Tensor>& weights)
    : weights_(weights), joined_(JoinRows(weights, weights)) {
  for (const Tensor& weight : weights_) {
    begin_.push_back(width_);
    if (!weight.empty()) width_ += weight.dim(0);
  }
  begin_.push_back(width_);
}

Tensor Projection::Piece(const Tensor& y, size_t i) const {
  return weights_[i].empty() ? Tensor() : y.Columns(begin_[i], begin_[i + 1]);
}

void Projection::Forward(const Context& ctx, const ConstTensor& x, const Tensor& y) const {
  if (!joined_.empty()) {
    kernels::GemmNT(ctx, x, joined_, y);
    return;
  }
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (!weights_[i].empty()) kernels::GemmNT(ctx, x, weights_[i], Piece(y, i));
  }
}

void Projection::Backward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x,
                          const Tensor& dx, const std::vector<Tensor>& gradients) const {
  SALA_CHECK(gradients.size() == weights_.size()) << "one gradient per weight";
  const auto piece = [&](size_t i) { return dy.Columns(begin_[i], begin_[i + 1]); };
  if (!dx.empty() && !joined_.empty()) {
    kernels::GemmNN(ctx, dy, joined_, dx);
  } else if (!dx.empty()) {
    Write write = Write::kOverwrite;
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (weights_[i].empty()) continue;
      kernels::GemmNN(ctx, piece(i), weights_[i], dx, {.write = write});
      write = Write::kAccumulate;
    }
  }
  const Tensor joined_gradient = JoinRows(gradients, weights_);
  if (!joined_gradient.empty()) {
    kernels::GemmTN(ctx, dy, x, joined_gradient, {.write = Write::kAccumulate});
    return;
  }
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (!gradients[i].empty())
      kernels::GemmTN(ctx, piece(i), x, gradients[i], {.write = Write::kAccumulate});
  }
}

}  // namespace sala::model
