#include "parallel/device_communicator.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/cuda_module.h"

namespace sala::parallel {
namespace {

// Floats of each rank's segment that are on their way at once.
constexpr int64_t kPiece = int64_t{1} << 20;

class StagedCommunicator : public Communicator {
 public:
  StagedCommunicator(std::unique_ptr<Communicator> host, Device& device)
      : host_(std::move(host)), device_(device) {}

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  Status Barrier() override { return host_->Barrier(); }
  Status AllReduce(std::span<double> values, Reduce op) override {
    return host_->AllReduce(values, op);
  }
  Status AllReduce(std::span<int64_t> values, Reduce op) override {
    return host_->AllReduce(values, op);
  }
  Status ReduceScatterSum(std::span<const float> send, std::span<const int64_t> counts,
                          std::span<float> recv) override {
    return host_->ReduceScatterSum(send, counts, recv);
  }
  Status AllGather(std::span<const float> send, std::span<const int64_t> counts,
                   std::span<float> recv) override {
    return host_->AllGather(send, counts, recv);
  }

  Status ReduceScatterSum(const ConstTensor& send, std::span<const int64_t> counts,
                          const Tensor& recv) override;
  Status AllGather(const ConstTensor& send, std::span<const int64_t> counts,
                   const Tensor& recv) override;

  Status Shift(const ConstTensor& send, const Tensor& recv, int by) override;

  Status Broadcast(std::span<char> bytes, int root) override {
    return host_->Broadcast(bytes, root);
  }
  StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) override {
    return host_->AllGatherText(text);
  }
  StatusOr<std::unique_ptr<Communicator>> Split(int colour) override {
    SALA_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, host_->Split(colour));
    return MakeStagedCommunicator(std::move(part), device_);
  }

 private:
  // Room for one piece of every rank's segment.
  void Reserve() {
    send_.resize(static_cast<size_t>(kPiece * size()));
    recv_.resize(send_.size());
  }
  // The part of each segment that lies in [begin, begin + kPiece).
  static std::vector<int64_t> Piece(std::span<const int64_t> counts, int64_t begin) {
    std::vector<int64_t> piece;
    for (int64_t n : counts) piece.push_back(std::clamp<int64_t>(n - begin, 0, kPiece));
    return piece;
  }

  std::unique_ptr<Communicator> host_;
  Device& device_;
  std::vector<float> send_, recv_;  // the device's copies take their own way through pinned memory
};

Status StagedCommunicator::ReduceScatterSum(const ConstTensor& send,
                                            std::span<const int64_t> counts, const Tensor& recv) {
  if (send.device() == DeviceKind::kCpu) return Communicator::ReduceScatterSum(send, counts, recv);
  SALA_CHECK(send.dtype() == DType::kF32 && recv.dtype() == DType::kF32) << ShapeText(send);
  const auto* from = static_cast<const float*>(send.raw());
  auto* to = static_cast<float*>(recv.raw());
  if (size() == 1) {
    device_.Copy(to, from, static_cast<size_t>(send.numel()) * sizeof(float));
    return OkStatus();
  }
  Reserve();
  const int64_t most = *std::max_element(counts.begin(), counts.end());
  for (int64_t begin = 0; begin < most; begin += kPiece) {
    const std::vector<int64_t> piece = Piece(counts, begin);
    int64_t segment = 0;
    int64_t packed = 0;
    for (size_t r = 0; r < piece.size(); ++r) {
      device_.Download(send_.data() + packed, from + segment + begin,
                       static_cast<size_t>(piece[r]) * sizeof(float));
      segment += counts[r];
      packed += piece[r];
    }
    const auto mine = static_cast<size_t>(piece[static_cast<size_t>(rank())]);
    SALA_RETURN_IF_ERROR(
        host_->ReduceScatterSum(std::span<const float>(send_).first(static_cast<size_t>(packed)),
                                piece, std::span<float>(recv_).first(mine)));
    device_.Upload(to + begin, recv_.data(), mine * sizeof(float));
  }
  return OkStatus();
}

// Only bits move, so bfloat16 travels as pairs in the place of floats.
Status StagedCommunicator::Shift(const ConstTensor& send, const Tensor& recv, int by) {
  if (send.device() == DeviceKind::kCpu) return host_->Shift(send, recv, by);
  SALA_CHECK(send.dtype() == DType::kF32 && recv.dtype() == DType::kF32) << ShapeText(send);
  const auto n = static_cast<size_t>(send.numel());
  const bool receives = 0 <= rank() - by && rank() - by < size();
  send_.resize(std::max(send_.size(), n));
  recv_.resize(std::max(recv_.size(), n));
  device_.Download(send_.data(), send.raw(), n * sizeof(float));
  const auto flat = static_cast<int64_t>(n);
  SALA_RETURN_IF_ERROR(
      host_->Shift(ConstTensor(send_.data(), {flat}), Tensor(recv_.data(), {flat}), by));
  if (receives) device_.Upload(recv.raw(), recv_.data(), n * sizeof(float));
  return OkStatus();
}

Status StagedCommunicator::AllGather(const ConstTensor& send, std::span<const int64_t> counts,
                                     const Tensor& recv) {
  if (send.device() == DeviceKind::kCpu) return Communicator::AllGather(send, counts, recv);
  const auto per_float = static_cast<int64_t>(sizeof(float) / SizeOf(send.dtype()));
  std::vector<int64_t> floats;
  for (int64_t n : counts) {
    SALA_CHECK(n % per_float == 0) << n << " elements of " << NameOf(send.dtype());
    floats.push_back(n / per_float);
  }
  const auto* from = static_cast<const float*>(send.raw());
  auto* to = static_cast<float*>(recv.raw());
  if (size() == 1) {
    if (from != to) device_.Copy(to, from, static_cast<size_t>(floats[0]) * sizeof(float));
    return OkStatus();
  }
  Reserve();
  const int64_t most = *std::max_element(floats.begin(), floats.end());
  for (int64_t begin = 0; begin < most; begin += kPiece) {
    const std::vector<int64_t> piece = Piece(floats, begin);
    const auto mine = static_cast<size_t>(piece[static_cast<size_t>(rank())]);
    device_.Download(send_.data(), from + begin, mine * sizeof(float));
    const auto all = static_cast<size_t>(std::accumulate(piece.begin(), piece.end(), int64_t{0}));
    SALA_RETURN_IF_ERROR(host_->AllGather(std::span<const float>(send_).first(mine), piece,
                                          std::span<float>(recv_).first(all)));
    int64_t segment = 0;
    int64_t packed = 0;
    for (size_t r = 0; r < piece.size(); ++r) {
      device_.Upload(to + segment + begin, recv_.data() + packed,
                     static_cast<size_t>(piece[r]) * sizeof(float));
      segment += floats[r];
      packed += piece[r];
    }
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<Communicator> MakeStagedCommunicator(std::unique_ptr<Communicator> host,
                                                     Device& device) {
  return std::make_unique<StagedCommunicator>(std::move(host), device);
}

namespace {

StatusOr<const NcclInterface*> LoadNccl() {
  SALA_ASSIGN_OR_RETURN(const CudaModuleInterface* module, LoadCudaModule());
  const auto* nccl = static_cast<const NcclInterface*>(module->find("nccl"));
  SALA_CHECK(nccl != nullptr) << "the CUDA module is built with NCCL";
  return nccl;
}

}  // namespace

StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(std::unique_ptr<Communicator> host,
                                                             const Context& ctx, bool ordered,
                                                             SideStream* side) {
  SALA_ASSIGN_OR_RETURN(const NcclInterface* nccl, LoadNccl());
  return nccl->make(std::move(host), ctx, ordered, side);
}

StatusOr<std::unique_ptr<SideStream>> MakeSideStream(Device& compute) {
  SALA_ASSIGN_OR_RETURN(const NcclInterface* nccl, LoadNccl());
  return nccl->make_side(compute);
}

StatusOr<HostRanks> RanksOfThisHost(Communicator& comm, const std::string& host) {
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> hosts, comm.AllGatherText(host));
  HostRanks ranks;
  ranks.local_size = static_cast<int>(std::count(hosts.begin(), hosts.end(), host));
  ranks.local_rank = static_cast<int>(std::count(hosts.begin(), hosts.begin() + comm.rank(), host));
  return ranks;
}

}  // namespace sala::parallel
