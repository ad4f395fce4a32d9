// Several linear maps of one input, computed as one matrix product where their weights lie one
// behind the other in the parameter store (which lays q, k, v and gate of a mixer, and gate and up
// of an MLP, out like that). Fewer and larger products run at a better rate. On a CPU the forward
// products have the bits of separate ones, because every element is summed on its own; the input's
// gradient is one sum over all outputs instead of a sum per map. Not part of the room's interface.
#pragma once

#include <vector>

#include "core/context.h"
#include "core/tensor.h"

namespace sala::model {

// weights [out_i, H] each; empty ones are left out.
class Projection {
 public:
  explicit Projection(const std::vector<Tensor>& weights);

  int64_t width() const { return width_; }          // sum of out_i
  bool joined() const { return !joined_.empty(); }  // one product serves all
  // x [T, H] -> y [T, width]: x W_i^T in the columns of piece i.
  void Forward(const Context& ctx, const ConstTensor& x, const Tensor& y) const;
  // Columns of piece i (as given to the constructor) of a tensor [T, width]; empty for an empty
  // weight.
  Tensor Piece(const Tensor& y, size_t i) const;

  // dy [T, width] -> dx [T, H] overwritten (may be empty: not wanted); gradients[i] += dy_i^T x
  // (empty: frozen).
  void Backward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x, const Tensor& dx,
                const std::vector<Tensor>& gradients) const;

 private:
  std::vector<Tensor> weights_;
  std::vector<int64_t> begin_;  // first column of each piece, and the width
  Tensor joined_;               // all weights as one matrix, or empty
  int64_t width_ = 0;
};

}  // namespace sala::model
