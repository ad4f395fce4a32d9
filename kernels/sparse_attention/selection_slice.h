// How many blocks the selection on a GPU scores before it keeps the best of them. Not part of the
// room's interface.
#pragma once

#include <cstdint>

namespace sala::kernels {

// 0, as everywhere but in tests: as many as the shared memory holds. Another value is rounded up to
// what the kernel can do. The chosen blocks do not depend on it.
int64_t& SelectionSliceLimit();

}  // namespace sala::kernels
