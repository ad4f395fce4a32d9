#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "parallel/communicator.h"
#include "parallel/mpi_communicator.h"
#include "parallel/partition.h"

namespace sala::parallel {
namespace {

class SelfCommunicator : public Communicator {
 public:
  using Communicator::AllGather;
  using Communicator::ReduceScatterSum;
  int rank() const override { return 0; }
  int size() const override { return 1; }
  Status Barrier() override { return OkStatus(); }
  Status AllReduce(std::span<double>, Reduce) override { return OkStatus(); }
  Status AllReduce(std::span<int64_t>, Reduce) override { return OkStatus(); }
  Status ReduceScatterSum(std::span<const float> send, std::span<const int64_t> counts,
                          std::span<float> recv) override {
    SALA_CHECK(counts.size() == 1 && send.size() == recv.size()) << "one rank, one segment";
    std::copy(send.begin(), send.end(), recv.begin());
    return OkStatus();
  }
  Status AllGather(std::span<const float> send, std::span<const int64_t> counts,
                   std::span<float> recv) override {
    SALA_CHECK(counts.size() == 1 && send.size() == recv.size()) << "one rank, one segment";
    if (send.data() != recv.data()) std::memcpy(recv.data(), send.data(), send.size_bytes());
    return OkStatus();
  }
  Status Broadcast(std::span<char>, int root) override {
    SALA_CHECK(root == 0) << "root " << root;
    return OkStatus();
  }
  StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) override {
    return std::vector<std::string>{text};
  }
  bool thread_safe() const override { return true; }
  StatusOr<std::unique_ptr<Communicator>> Split(int) override { return MakeSelfCommunicator(); }
};

std::span<const float> HostSpan(const ConstTensor& x) {
  SALA_CHECK(x.device() == DeviceKind::kCpu) << "this communicator works on host memory";
  return {x.Data<float>(), static_cast<size_t>(x.numel())};
}

std::span<float> HostSpan(const Tensor& x) {
  SALA_CHECK(x.device() == DeviceKind::kCpu) << "this communicator works on host memory";
  return {x.Data<float>(), static_cast<size_t>(x.numel())};
}

// "HOST\nEXIT\nCODE\nmessage": how a status travels between ranks; "" for OK.
std::string Encode(const Status& status) {
  if (status.ok()) return "";
  return HostName() + "\n" + std::to_string(static_cast<int>(ExitCodeOf(status))) + "\n" +
         ErrorCodeOf(status) + "\n" + MessageOf(status);
}

Status Decode(size_t rank, const std::string& encoded) {
  const size_t host = encoded.find('\n');
  const std::string text = encoded.substr(host + 1);
  const size_t first = text.find('\n');
  const size_t second = text.find('\n', first + 1);
  const auto exit_code = static_cast<ExitCode>(std::stoi(text.substr(0, first)));
  const std::string code = text.substr(first + 1, second - first - 1);
  std::string message = text.substr(second + 1);
  if (message.rfind(code + ": ", 0) == 0) message = message.substr(code.size() + 2);
  return MakeError(exit_code, code.empty() ? "INTERNAL" : code,
                   "rank " + std::to_string(rank) + "@" + encoded.substr(0, host) + ": " + message);
}

}  // namespace

Status Communicator::ReduceScatterSum(const ConstTensor& send, std::span<const int64_t> counts,
                                      const Tensor& recv) {
  return ReduceScatterSum(HostSpan(send), counts, HostSpan(recv));
}

Status Communicator::AllGather(const ConstTensor& send, std::span<const int64_t> counts,
                               const Tensor& recv) {
  return AllGather(HostSpan(send), counts, HostSpan(recv));
}

Status Communicator::Shift(const ConstTensor&, const Tensor&, int by) {
  SALA_CHECK(size() == 1) << "a shift by " << by << " over " << size() << " ranks";
  return OkStatus();
}

Status AllReduceSum(Communicator& comm, const Tensor& values, Device* device, Buffer* work) {
  if (comm.size() == 1 || values.numel() == 0) return OkStatus();
  const std::vector<int64_t> counts = FlatPartition::Even(values.numel(), comm.size(), 1).counts;
  const int64_t mine = counts[static_cast<size_t>(comm.rank())];
  const size_t bytes = static_cast<size_t>(counts[0] + 1) * sizeof(float);
  if (work->bytes() < bytes) *work = Buffer(bytes, device);
  const Tensor share(work->data(), DType::kF32, {mine}, values.device());
  SALA_RETURN_IF_ERROR(comm.ReduceScatterSum(ConstTensor(values), counts, share));
  return comm.AllGather(ConstTensor(share), counts, values);
}

void OrThrow(const Status& status) {
  if (!status.ok()) throw CommError(status);
}

Status AllGatherInPieces(Communicator& comm, std::span<const float> send,
                         std::span<const int64_t> counts, std::span<float> recv, int64_t piece) {
  const int64_t most = *std::max_element(counts.begin(), counts.end());
  std::vector<int64_t> part(counts.size());
  std::vector<float> work;
  for (int64_t begin = 0; begin < most; begin += piece) {
    int64_t total = 0;
    for (size_t r = 0; r < counts.size(); ++r) {
      part[r] = std::clamp<int64_t>(counts[r] - begin, 0, piece);
      total += part[r];
    }
    work.resize(static_cast<size_t>(total));
    const auto mine = static_cast<size_t>(part[static_cast<size_t>(comm.rank())]);
    const size_t from = mine == 0 ? 0 : static_cast<size_t>(begin);
    SALA_RETURN_IF_ERROR(comm.AllGather(send.subspan(from, mine), part, work));
    auto next = work.begin();
    int64_t segment = 0;
    for (size_t r = 0; r < counts.size(); ++r) {
      std::copy_n(next, part[r], recv.begin() + segment + (part[r] == 0 ? 0 : begin));
      next += part[r];
      segment += counts[r];
    }
  }
  return OkStatus();
}

std::unique_ptr<Communicator> MakeSelfCommunicator() {
  return std::make_unique<SelfCommunicator>();
}

Status AgreeOnStatus(Communicator& comm, const Status& mine) {
  if (comm.size() == 1) return mine;
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all, comm.AllGatherText(Encode(mine)));
  if (!mine.ok()) return mine;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (!all[rank].empty()) return Decode(rank, all[rank]);
  }
  return OkStatus();
}

}  // namespace sala::parallel
