// Plain loops for the tests of tensor_ops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sala::kernels::reference {

// Column sums of parts [n, m], in row order.
template <typename Number>
std::vector<Number> AddRows(const std::vector<Number>& parts, int64_t n, int64_t m) {
  std::vector<Number> sum(static_cast<size_t>(m), Number(0));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < m; ++i)
      sum[static_cast<size_t>(i)] += parts[static_cast<size_t>(r * m + i)];
  }
  return sum;
}

}  // namespace sala::kernels::reference
