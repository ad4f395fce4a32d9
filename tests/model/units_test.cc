#include "model/units.h"

#include <gtest/gtest.h>

#include <map>
#include <vector>

namespace sala::model {
namespace {

// What the slots hold, followed from the fetches alone.
class Slots {
 public:
  explicit Slots(std::vector<int64_t> sizes)
      : layers_(static_cast<int64_t>(sizes.size()) - 3), sizes_(sizes), schedule_(sizes) {}

  // A pass uses units in this order.
  void Use(const std::vector<int64_t>& units) {
    for (const int64_t u : units) {
      schedule_.Enter(u, [this](int64_t fetched) {
        EXPECT_GT(sizes_[static_cast<size_t>(fetched)], 0) << "unit " << fetched << " is empty";
        held_[SlotOf(fetched, layers_)] = fetched;
        fetches.push_back(fetched);
      });
      // Neither missing nor pushed out by what was fetched ahead.
      if (sizes_[static_cast<size_t>(u)] > 0) {
        EXPECT_EQ(held_[SlotOf(u, layers_)], u);
      }
    }
  }
  void Forget() {
    schedule_.Forget();
    held_.clear();
  }

  std::vector<int64_t> fetches;

 private:
  int64_t layers_;
  std::vector<int64_t> sizes_;
  SlotSchedule schedule_;
  std::map<int64_t, int64_t> held_;
};

constexpr int64_t kLayers = 5;

std::vector<int64_t> Forward() { return {0, 1, 2, 3, 4, 5, 6, 7}; }
std::vector<int64_t> Backward() { return {6, 5, 4, 3, 2, 1, 0}; }

TEST(SlotScheduleTest, AForwardPassFetchesEveryUnitOnceAndTheNextOneAhead) {
  Slots slots(std::vector<int64_t>(static_cast<size_t>(UnitCount(kLayers)), 16));
  slots.Use({0});
  EXPECT_EQ(slots.fetches, (std::vector<int64_t>{0, 1})) << "the first layer comes with its input";
  slots.Use({1});
  EXPECT_EQ(slots.fetches, (std::vector<int64_t>{0, 1, 2}));
  slots.Use({2, 3, 4, 5, 6, 7});
  EXPECT_EQ(slots.fetches, Forward());
}

TEST(SlotScheduleTest, ABackwardPassFetchesWhatIsNoLongerThere) {
  Slots slots(std::vector<int64_t>(static_cast<size_t>(UnitCount(kLayers)), 16));
  slots.Use(Forward());
  slots.fetches.clear();
  // The last two layers and the norm are still in their slots; the head took the embedding's.
  slots.Use({6, 5, 4, 3, 2, 1});
  EXPECT_EQ(slots.fetches, (std::vector<int64_t>{3, 2, 1}));
  // The next micro-batch begins with the embedding and the first layer, which is there.
  slots.fetches.clear();
  slots.Use({0, 1});
  EXPECT_EQ(slots.fetches, (std::vector<int64_t>{0}));
}

TEST(SlotScheduleTest, EmptyUnitsAreNeverFetched) {
  std::vector<int64_t> sizes(static_cast<size_t>(UnitCount(kLayers)), 16);
  sizes.back() = 0;  // a tied head
  sizes[3] = 0;
  Slots slots(sizes);
  slots.Use(Forward());
  slots.Use(Backward());
  for (const int64_t u : slots.fetches) EXPECT_TRUE(u != 3 && u != 7) << u;
}

TEST(SlotScheduleTest, NothingIsHeldAfterForget) {
  Slots slots(std::vector<int64_t>(static_cast<size_t>(UnitCount(kLayers)), 16));
  slots.Use(Forward());
  slots.fetches.clear();
  slots.Use({7});
  EXPECT_TRUE(slots.fetches.empty());
  slots.Forget();
  slots.Use(Forward());
  EXPECT_EQ(slots.fetches, Forward());
}

TEST(SlotScheduleTest, AnyOrderOfUseFindsItsUnit) {
  Slots slots(std::vector<int64_t>(static_cast<size_t>(UnitCount(kLayers)), 16));
  uint64_t state = 7;
  for (int i = 0; i < 2000; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    slots.Use({static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(UnitCount(kLayers)))});
  }
}

TEST(SlotScheduleTest, OneLayer) {
  Slots slots(std::vector<int64_t>(static_cast<size_t>(UnitCount(1)), 16));
  for (int i = 0; i < 3; ++i) {
    slots.Use({0, 1, 2, 3});
    slots.Use({2, 1, 0});
  }
}

}  // namespace
}  // namespace sala::model
