#include "parallel/ordered_sum.h"

#include "core/check.h"

namespace sala::parallel {

StatusOr<std::vector<double>> SumDealtItems(Communicator& comm, const std::vector<double>& mine,
                                            int64_t width) {
  const int64_t own = static_cast<int64_t>(mine.size()) / width;
  int64_t items = own;
  SALA_RETURN_IF_ERROR(comm.AllReduce(std::span<int64_t>(&items, 1), Reduce::kSum));
  const int64_t rest = items - comm.rank();  // from this rank's first item on
  SALA_CHECK(own == (rest + comm.size() - 1) / comm.size() || (own == 0 && rest <= 0))
      << "rank " << comm.rank() << " has " << own << " of " << items << " items";
  // Every number has one owner and zeros from the others: their sum is exact.
  std::vector<double> all(static_cast<size_t>(items * width), 0.0);
  for (int64_t i = 0; i < own * width; ++i) {
    const int64_t item = comm.rank() + i / width * comm.size();
    all[static_cast<size_t>(item * width + i % width)] = mine[static_cast<size_t>(i)];
  }
  SALA_RETURN_IF_ERROR(comm.AllReduce(std::span<double>(all), Reduce::kSum));
  std::vector<double> sums(static_cast<size_t>(width), 0.0);
  for (size_t i = 0; i < all.size(); ++i) sums[i % sums.size()] += all[i];
  return sums;
}

StatusOr<std::vector<double>> SumDealtItems(const Mesh& mesh, std::vector<double> mine,
                                            int64_t width) {
  SALA_RETURN_IF_ERROR(mesh.sample_group().AllReduce(std::span<double>(mine), Reduce::kSum));
  return SumDealtItems(mesh.dp_group(), mine, width);
}

}  // namespace sala::parallel
