#include "model/units.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace sala::model {

std::vector<int64_t> SlotBorders(const std::vector<int64_t>& borders) {
  std::vector<int64_t> slots(kSlotCount + 1, 0);
  const auto units = static_cast<int64_t>(borders.size()) - 1;
  for (int64_t u = 0; u < units; ++u) {
    int64_t& size = slots[static_cast<size_t>(SlotOf(u, LayersOf(units))) + 1];
    const auto i = static_cast<size_t>(u);
    size = std::max(size, borders[i + 1] - borders[i]);
  }
  std::partial_sum(slots.begin(), slots.end(), slots.begin());
  return slots;
}

SlotSchedule::SlotSchedule(std::vector<int64_t> sizes) : sizes_(std::move(sizes)) {}

void SlotSchedule::Want(int64_t u, const std::function<void(int64_t)>& fetch) {
  int64_t& held = held_[static_cast<size_t>(SlotOf(u, layers()))];
  if (held == u || sizes_[static_cast<size_t>(u)] == 0) return;
  held = u;
  fetch(u);
}

void SlotSchedule::Enter(int64_t u, const std::function<void(int64_t)>& fetch) {
  Want(u, fetch);
  // A layer that runs again before its backward pass says nothing new about the direction.
  if (u == last_) return;
  // Forwards to the head, or backwards to the first layer.
  const int64_t next = u > last_ ? u + 1 : u - 1;
  const bool exists = next < static_cast<int64_t>(sizes_.size()) && next > UnitOfEmbedding();
  last_ = u;
  if (exists && SlotOf(next, layers()) != SlotOf(u, layers())) Want(next, fetch);
}

void SlotSchedule::Forget() {
  std::fill(held_.begin(), held_.end(), -1);
  last_ = -1;
}

}  // namespace sala::model
