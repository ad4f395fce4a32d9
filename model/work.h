// Useful work: the floating-point operations and bytes that an operation cannot do without, for
// rates that can be compared between programs. What a program computes twice or reads again does
// not count.
//
//   product            2 M N K
//   dense attention    4 N D for each pair of a query and a key it sees (causal half), forward;
//                      backward 2.5 times that (five products for two)
//   sparse attention   the same over the pairs that the selection leaves
//   selection          2 N D for each compressed key, fine and coarse, that a query may see;
//                      forward only
//   Lightning          4 N D^2 per token (state update and read-out of the recurrence); backward
//                      twice
//   a whole step       3 (products + Lightning + attention) + selection: backward counts twice the
//                      forward pass throughout, recomputation not at all
//   memory-bound       every input read once, every output written once
#pragma once

#include <cstdint>

#include "model/config.h"

namespace sala::model {

// Pairs of a query and a key in one document of n tokens.
double CausalPairs(int64_t n);
double SparsePairs(const kernels::SparseAttentionConfig& config, int64_t n);
// Compressed keys that the queries of one document may see, summed over its tokens.
double SelectionKeys(const kernels::SparseAttentionConfig& config, int64_t n);

// Elements of all weight matrices that a token is multiplied with, the head included.
struct ProductWeights {
  double softmax = 0;  // projections of softmax layers, gates included
  double linear = 0;   // of linear layers
  double mlp = 0;
  double head = 0;
  double all() const { return softmax + linear + mlp + head; }
};
ProductWeights ProductWeightsOf(const ModelConfig& config);
double ProductParameters(const ModelConfig& config);

// Floating-point operations of the forward pass over one document of n tokens.
struct ForwardWork {
  double products = 0;
  double attention = 0;
  double selection = 0;
  double lightning = 0;
  double forward() const { return products + attention + selection + lightning; }
  double step() const { return 3 * (products + attention + lightning) + selection; }
};
ForwardWork ForwardWorkOf(const ModelConfig& config, bool sparse, int64_t n);

}  // namespace sala::model
