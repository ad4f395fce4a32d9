#include "kernels/sparse_attention/selection_slice.h"

namespace sala::kernels {

int64_t& SelectionSliceLimit() {
  static int64_t limit = 0;
  return limit;
}

}  // namespace sala::kernels
