// How one model is spread over the ranks that work on the same samples (cp x tp), and the exchanges
// this takes.
//
// The T packed tokens of a micro-batch are cut in contiguous ranges, one per cp rank; inside the
// layers a rank computes all tokens of its range, for its share of heads, MLP columns and
// vocabulary rows. Between the layers (residual stream, norms) the range is cut once more, in one
// part per tp rank. So a layer's input is gathered from the parts, and its outputs, which every tp
// rank has a term of, are summed into the parts (arXiv 2205.05198).
//
// Attention needs the keys and values of all tokens of a document: they are gathered over cp, and
// their gradients summed back. Linear layers hand their state from range to range
// (docs/parallel.md).
//
// With one rank nothing is exchanged or copied. A failed exchange throws parallel::CommError.
#pragma once

#include <cstdint>
#include <vector>

#include "core/context.h"
#include "kernels/common/documents.h"
#include "kernels/common/exchange.h"
#include "model/config.h"
#include "parallel/mesh.h"

namespace sala::model {

// Tokens of one micro-batch as a rank sees them.
struct TokenShare {
  int64_t total = 0;                     // T
  std::vector<int64_t> cp_borders;       // [cp + 1] of the ranges
  std::vector<int64_t> tp_borders;       // [tp + 1] of the parts, counted from the range's begin
  int64_t begin = 0, end = 0;            // this rank's range
  int64_t part_begin = 0, part_end = 0;  // this rank's part, counted from `begin`

  int64_t tokens() const { return end - begin; }
  int64_t part() const { return part_end - part_begin; }
};

// How T tokens are cut, as the rank with these places in its groups sees it.
TokenShare ShareTokens(int64_t total, int cp_rank, int cp_size, int tp_rank, int tp_size);

class Spread {
 public:
  Spread() = default;  // one rank
  explicit Spread(parallel::Mesh& mesh);

  int cp_rank() const { return mesh_ == nullptr ? 0 : mesh_->cp_rank(); }
  int cp_size() const { return mesh_ == nullptr ? 1 : mesh_->cp_size(); }
  int tp_rank() const { return mesh_ == nullptr ? 0 : mesh_->tp_rank(); }
  int tp_size() const { return mesh_ == nullptr ? 1 : mesh_->tp_size(); }
  TensorShard shard() const { return {tp_rank(), tp_size()}; }
  // Whether this rank's copy of a number that all tp ranks have is the one that counts in sums.
  bool counts() const { return tp_rank() == 0; }

  TokenShare Share(int64_t total) const;

  // part [share.part(), W] -> [share.tokens(), W], in the arena; the part itself with one rank.
  Tensor Gather(const Context& ctx, Arena& arena, const TokenShare& share,
                const Tensor& part) const;
  // terms [share.tokens(), W], f32 or of the activation type, of each tp rank: their float32 sum,
  // this rank's part of it, is written to or added to `part` (activation type). Not called with one
  // tp rank.
  void Sum(const Context& ctx, Arena& arena, const TokenShare& share, const Tensor& terms,
           const Tensor& part, kernels::Write write) const;
  // Small numbers of a row of tokens, over the tp ranks; null with one.
  const kernels::RankExchange* exchange() const;

  // x [T, W] of every tensor rank that has the same key/value head -> [T, ranks * W], in the arena;
  // x itself with one such rank. `kv_heads` are the model's.
  Tensor GatherGroup(const Context& ctx, Arena& arena, int64_t kv_heads, const Tensor& x) const;

  // x [share.tokens(), W] of every cp rank -> [share.total, W], in the arena; x itself with one.
  Tensor GatherContext(const Context& ctx, Arena& arena, const TokenShare& share,
                       const Tensor& x) const;
  // terms f32 [share.total, W] of every cp rank: their sum, this range's rows, in the activation
  // type, in the arena.
  Tensor SumContext(const Context& ctx, Arena& arena, const TokenShare& share,
                    const Tensor& terms) const;
  // Of a state [N, D, D] that every range adds to: what enters this range, or, backwards, its
  // gradient. `own` f32 [N, D, D] is what this range alone hands on from zero; `survives` says for
  // each range whether a state that enters it can leave it; slopes are those of the heads; `window`
  // is StateWindow of all heads. Zeros where nothing enters. In the arena.
  Tensor EnteringState(const Context& ctx, Arena& arena, const TokenShare& share,
                       const std::vector<char>& survives, const std::vector<float>& slopes,
                       int64_t window, bool backwards, const Tensor& own) const;

 private:
  parallel::Mesh* mesh_ = nullptr;
  kernels::RankExchange exchange_;
};

// How many ranges back a state can come from and still count: with a decay of exp(-slope) a token,
// what has passed a range of n tokens is exp(-slope n) of what it was, and below 2^-25 of float32
// states of like size it is lost in rounding.
int64_t StateWindow(const TokenShare& share, const std::vector<float>& slopes);

}  // namespace sala::model
