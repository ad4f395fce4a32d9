// Which view gives sample g: integers only, so every machine chooses the same.
//
// Weights are shares of token slots. w_i = round(weight_i / sum * 2^32), at least 1; W = sum w_i.
// At g the view with the largest w_i * (g + 1) - W * c_i gives the sample (the first on equality),
// c_i being the number it gave before. The counts stay within the number of views of their share:
// |c_i - g w_i / W| < views.
#pragma once

#include <cstdint>
#include <vector>

#include "core/status.h"

namespace sala::data {

class Mixture {
 public:
  // MIX-WEIGHT (78) when a weight is not a positive finite number or there is none.
  static StatusOr<Mixture> Make(const std::vector<double>& weights);

  struct Choice {
    int64_t view;
    int64_t index;  // the view has given this many samples before
  };
  // One step for the next g; a walk from 0 when g went back, from where it stands when it went
  // forward.
  Choice At(int64_t g);
  // c_i before sample g.
  const std::vector<int64_t>& CountsBefore(int64_t g);
  const std::vector<int64_t>& integer_weights() const { return weights_; }

 private:
  int64_t Select() const;
  std::vector<int64_t> weights_;
  int64_t total_ = 0;
  int64_t g_ = 0;  // counts_ are those before sample g_
  std::vector<int64_t> counts_;
};

}  // namespace sala::data
