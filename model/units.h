// Units: the groups of parameters that are summed, gathered and kept together when parameters or
// gradients are split over ranks. One for the embedding, one for each layer, one for the final norm
// and one for the output head.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace sala::model {

constexpr int64_t UnitOfEmbedding() { return 0; }
constexpr int64_t UnitOfLayer(int64_t layer) { return 1 + layer; }
constexpr int64_t UnitOfNorm(int64_t layers) { return 1 + layers; }
constexpr int64_t UnitOfHead(int64_t layers) { return 2 + layers; }
constexpr int64_t UnitCount(int64_t layers) { return 3 + layers; }
constexpr int64_t LayersOf(int64_t units) { return units - UnitCount(0); }

// Around the use of a unit's tensors. Of parameters: from Enter until another unit is entered they
// have their values. Of
// gradients: after Enter they may be added to, after Leave the micro-batch adds nothing more.
class UnitHooks {
 public:
  virtual ~UnitHooks() = default;
  virtual void Enter(int64_t unit) = 0;
  virtual void Leave(int64_t unit) = 0;
};

// Layers take turns in two slots, so that one can be filled while the other is in use; embedding
// and head share a third, the final norm has the fourth.
constexpr int64_t kSlotCount = 4;
constexpr int64_t SlotOf(int64_t unit, int64_t layers) {
  if (unit == UnitOfEmbedding() || unit == UnitOfHead(layers)) return 2;
  return unit == UnitOfNorm(layers) ? 3 : unit % 2;
}

// Where the slots of a store with these unit borders [units + 1] begin, and how long all are
// together: [kSlotCount + 1]. A slot is as long as the longest unit that uses it.
std::vector<int64_t> SlotBorders(const std::vector<int64_t>& borders);

// Which units are fetched when: what the run does and `sala plan` counts.
class SlotSchedule {
 public:
  SlotSchedule() = default;
  // sizes [units]: empty units are never fetched.
  explicit SlotSchedule(std::vector<int64_t> sizes);

  // Unit u is about to be used: calls fetch(unit) for u unless it is in its slot, and for the one
  // that is expected next.
  void Enter(int64_t u, const std::function<void(int64_t)>& fetch);
  // The slots hold nothing.
  void Forget();

 private:
  int64_t layers() const { return LayersOf(static_cast<int64_t>(sizes_.size())); }
  void Want(int64_t u, const std::function<void(int64_t)>& fetch);

  std::vector<int64_t> sizes_;
  std::vector<int64_t> held_ = std::vector<int64_t>(kSlotCount, -1);
  int64_t last_ = -1;
};

}  // namespace sala::model
