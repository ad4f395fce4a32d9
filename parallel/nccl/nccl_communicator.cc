// NCCL behind the Communicator interface. Part of the CUDA module.
//
// Collectives run on a stream of their own, ordered with the compute stream by events. The host
// waits for each one in small steps and asks NCCL for errors of other ranks meanwhile: a rank that
// died makes the others end instead of waiting for ever. With a side stream it does not wait: the
// exchanges are ordered with that stream, and CommQueue asks. Joining, and the first exchange,
// which connects the ranks, wait inside NCCL instead, for as long as its own time limits say.
#include <nccl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <exception>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/cuda/cuda_device.h"
#include "kernels/tensor_ops/tensor_ops.h"
#include "parallel/device_communicator.h"
#include "parallel/nccl/nccl_table.h"
#include "parallel/ordered_sum.h"

namespace sala::parallel {
namespace {

// Floats of a segment that are exchanged and added at once: [ranks, kPiece] of device memory.
constexpr int64_t kPiece = int64_t{1} << 20;

class NcclCommunicator;

class NcclSide : public SideStream {
 public:
  explicit NcclSide(CudaDevice& compute)
      : compute_(compute), device_(compute.options(), compute.kernel_table()) {
    Cuda(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming), "cudaEventCreate");
    for (cudaEvent_t& mark : marks_)
      Cuda(cudaEventCreateWithFlags(&mark, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~NcclSide() override {
    cudaEventDestroy(ready_);
    for (cudaEvent_t mark : marks_) cudaEventDestroy(mark);
  }

  Device& device() override { return device_; }
  void Follow() override {
    Cuda(cudaEventRecord(ready_, compute_.cuda_stream()), "cudaEventRecord");
    Cuda(cudaStreamWaitEvent(device_.cuda_stream(), ready_, 0), "cudaStreamWaitEvent");
  }
  void Mark(int64_t ticket) override {
    Cuda(cudaEventRecord(EventOf(ticket), device_.cuda_stream()), "cudaEventRecord");
  }
  // Where the event was used again since, it stands for a later point: passing it is passing both.
  bool Passed(int64_t ticket) override {
    const cudaError_t state = cudaEventQuery(EventOf(ticket));
    if (state != cudaErrorNotReady) Cuda(state, "exchange beside the computation");
    return state == cudaSuccess;
  }
  Status Failure() override;

  void Add(NcclCommunicator* comm) { comms_.push_back(comm); }
  void Remove(NcclCommunicator* comm) {
    comms_.erase(std::find(comms_.begin(), comms_.end(), comm));
  }

 private:
  static constexpr int64_t kMarks = 64;

  cudaEvent_t EventOf(int64_t ticket) const { return marks_[static_cast<size_t>(ticket % kMarks)]; }
  void Cuda(cudaError_t result, const char* operation) const {
    CheckCuda(result, operation, "", device_.options());
  }

  CudaDevice& compute_;
  CudaDevice device_;
  cudaEvent_t ready_ = nullptr;
  std::array<cudaEvent_t, kMarks> marks_ = {};
  std::vector<NcclCommunicator*> comms_;
};

class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, const Context& ctx, bool ordered,
                   NcclSide* side)
      : host_(std::move(host)),
        ctx_(ctx),
        device_(*static_cast<CudaDevice*>(ctx.gpu)),
        ordered_(ordered),
        side_(side) {
    if (side_ != nullptr) side_->Add(this);
  }
  ~NcclCommunicator() override {
    if (side_ != nullptr) side_->Remove(this);
    // Where an exception passes, other ranks may wait in an exchange: no orderly end is to be had.
    if (comm_ != nullptr && std::uncaught_exceptions() > 0) {
      ncclCommAbort(comm_);
    } else if (comm_ != nullptr) {
      ncclCommDestroy(comm_);
    }
    if (work_ != nullptr) device_.Free(work_);
    if (ready_ != nullptr) cudaEventDestroy(ready_);
    if (done_ != nullptr) cudaEventDestroy(done_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  Status Init();

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
  Status Broadcast(std::span<char> bytes, int root) override {
    return host_->Broadcast(bytes, root);
  }
  StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) override {
    return host_->AllGatherText(text);
  }

  Status ReduceScatterSum(const ConstTensor& send, std::span<const int64_t> counts,
                          const Tensor& recv) override;
  Status AllGather(const ConstTensor& send, std::span<const int64_t> counts,
                   const Tensor& recv) override;
  Status Shift(const ConstTensor& send, const Tensor& recv, int by) override;
  StatusOr<std::unique_ptr<Communicator>> Split(int colour) override;

  // What NCCL has found out about exchanges that are under way.
  Status Failure() {
    constexpr char kOperation[] = "exchange beside the computation";
    SALA_RETURN_IF_ERROR(Usable(kOperation));
    ncclResult_t other = ncclSuccess;
    SALA_RETURN_IF_ERROR(Check(ncclCommGetAsyncError(comm_, &other), "ncclCommGetAsyncError"));
    return Check(other, kOperation);
  }

 private:
  // The communicator is given up at once: memory that is freed on the way out would wait for the
  // device, and the device for the exchange.
  Status Error(const char* operation, const std::string& text) {
    if (comm_ != nullptr) ncclCommAbort(comm_);
    comm_ = nullptr;
    return MakeError(ExitCode::kDevice, "COMM-FAILED",
                     std::string("NCCL ") + operation + ": on rank " + std::to_string(rank()) +
                         "@" + device_.options().host + ": " + text);
  }
  Status Check(ncclResult_t result, const char* operation) {
    if (result == ncclSuccess) return OkStatus();
    return Error(operation, ncclGetErrorString(result));
  }
  // Every exchange begins with this.
  Status Usable(const char* operation) {
    return comm_ != nullptr ? OkStatus()
                            : Error(operation, "the communicator was given up after an error");
  }
  void Cuda(cudaError_t result, const char* operation) const {
    CheckCuda(result, operation, "", device_.options());
  }

  // What follows on the collectives' stream sees what the compute stream has done so far.
  void Begin() {
    Cuda(cudaEventRecord(ready_, device_.cuda_stream()), "cudaEventRecord");
    Cuda(cudaStreamWaitEvent(stream_, ready_, 0), "cudaStreamWaitEvent");
  }
  // Waits for the collectives' stream, looking for errors of other ranks; what follows on the
  // compute stream sees the results.
  Status End(const char* operation);

  Status ReduceByNccl(const float* from, std::span<const int64_t> counts, float* to);
  Status ReduceInOrder(const float* from, std::span<const int64_t> counts, float* to);

  std::unique_ptr<Communicator> host_;
  Context ctx_;
  CudaDevice& device_;
  bool ordered_;
  NcclSide* side_;  // null: exchanges are ordered with the compute stream, and awaited
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ready_ = nullptr, done_ = nullptr;
  float* work_ = nullptr;  // [ranks, kPiece]
};

Status NcclSide::Failure() {
  for (NcclCommunicator* comm : comms_) SALA_RETURN_IF_ERROR(comm->Failure());
  return OkStatus();
}

Status NcclCommunicator::Init() {
  Cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  Cuda(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming), "cudaEventCreate");
  Cuda(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "cudaEventCreate");
  ncclUniqueId id = {};
  const Status made = rank() == 0 ? Check(ncclGetUniqueId(&id), "ncclGetUniqueId") : OkStatus();
  SALA_RETURN_IF_ERROR(AgreeOnStatus(*host_, made));
  SALA_RETURN_IF_ERROR(host_->Broadcast({id.internal, sizeof(id.internal)}, 0));
  const Status joined = Check(ncclCommInitRank(&comm_, size(), id, rank()), "ncclCommInitRank");
  SALA_RETURN_IF_ERROR(AgreeOnStatus(*host_, joined));
  if (ordered_ && size() > 1) {
    work_ =
        static_cast<float*>(device_.Allocate(static_cast<size_t>(kPiece * size()) * sizeof(float)));
  }
  return OkStatus();
}

Status NcclCommunicator::End(const char* operation) {
  Cuda(cudaEventRecord(done_, stream_), "cudaEventRecord");
  Cuda(cudaStreamWaitEvent(device_.cuda_stream(), done_, 0), "cudaStreamWaitEvent");
  if (side_ != nullptr) return OkStatus();
  while (true) {
    const cudaError_t state = cudaEventQuery(done_);
    if (state == cudaSuccess) return OkStatus();
    if (state != cudaErrorNotReady) Cuda(state, operation);
    ncclResult_t other = ncclSuccess;
    SALA_RETURN_IF_ERROR(Check(ncclCommGetAsyncError(comm_, &other), "ncclCommGetAsyncError"));
    SALA_RETURN_IF_ERROR(Check(other, operation));
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

Status NcclCommunicator::ReduceScatterSum(const ConstTensor& send, std::span<const int64_t> counts,
                                          const Tensor& recv) {
  if (send.device() == DeviceKind::kCpu) return Communicator::ReduceScatterSum(send, counts, recv);
  SALA_CHECK(send.dtype() == DType::kF32 && recv.dtype() == DType::kF32) << ShapeText(send);
  const auto* from = static_cast<const float*>(send.raw());
  auto* to = static_cast<float*>(recv.raw());
  if (size() == 1) {
    device_.Copy(to, from, static_cast<size_t>(send.numel()) * sizeof(float));
    return OkStatus();
  }
  SALA_RETURN_IF_ERROR(Usable("ReduceScatterSum"));
  return ordered_ ? ReduceInOrder(from, counts, to) : ReduceByNccl(from, counts, to);
}

// Segments may differ in length, so each is a reduction to its own rank.
Status NcclCommunicator::ReduceByNccl(const float* from, std::span<const int64_t> counts,
                                      float* to) {
  Begin();
  SALA_RETURN_IF_ERROR(Check(ncclGroupStart(), "ncclGroupStart"));
  for (int r = 0; r < size(); ++r) {
    const auto n = static_cast<size_t>(counts[static_cast<size_t>(r)]);
    SALA_RETURN_IF_ERROR(
        Check(ncclReduce(from, to, n, ncclFloat, ncclSum, r, comm_, stream_), "ncclReduce"));
    from += n;
  }
  SALA_RETURN_IF_ERROR(Check(ncclGroupEnd(), "ncclReduce"));
  return End("ncclReduce");
}

Status NcclCommunicator::ReduceInOrder(const float* from, std::span<const int64_t> counts,
                                       float* to) {
  const int64_t most = *std::max_element(counts.begin(), counts.end());
  const int64_t mine = counts[static_cast<size_t>(rank())];
  for (int64_t begin = 0; begin < most; begin += kPiece) {
    const auto piece = [begin](int64_t n) {
      return static_cast<size_t>(std::clamp<int64_t>(n - begin, 0, kPiece));
    };
    const size_t width = piece(mine);
    Begin();
    SALA_RETURN_IF_ERROR(Check(ncclGroupStart(), "ncclGroupStart"));
    const float* segment = from;
    for (int r = 0; r < size(); ++r) {
      const int64_t count = counts[static_cast<size_t>(r)];
      if (const size_t n = piece(count); n > 0) {
        SALA_RETURN_IF_ERROR(
            Check(ncclSend(segment + begin, n, ncclFloat, r, comm_, stream_), "ncclSend"));
      }
      if (width > 0) {
        SALA_RETURN_IF_ERROR(Check(
            ncclRecv(work_ + static_cast<int64_t>(width) * r, width, ncclFloat, r, comm_, stream_),
            "ncclRecv"));
      }
      segment += count;
    }
    SALA_RETURN_IF_ERROR(Check(ncclGroupEnd(), "ncclSend and ncclRecv"));
    SALA_RETURN_IF_ERROR(End("ncclSend and ncclRecv"));
    if (width == 0) continue;
    const auto row = [&](int64_t r) {
      const auto n = static_cast<int64_t>(width);
      return Tensor(work_ + n * r, DType::kF32, {n}, DeviceKind::kCuda);
    };
    AddByTree(0, size(),
              [&](int64_t sum, int64_t term) { kernels::Add(ctx_, row(term), row(sum)); });
    device_.Copy(to + begin, work_, width * sizeof(float));
  }
  return OkStatus();
}

Status NcclCommunicator::AllGather(const ConstTensor& send, std::span<const int64_t> counts,
                                   const Tensor& recv) {
  if (send.device() == DeviceKind::kCpu) return Communicator::AllGather(send, counts, recv);
  const auto bytes = static_cast<int64_t>(SizeOf(send.dtype()));
  char* to = static_cast<char*>(recv.raw());
  if (size() == 1) {
    if (send.raw() != to) device_.Copy(to, send.raw(), static_cast<size_t>(counts[0] * bytes));
    return OkStatus();
  }
  SALA_RETURN_IF_ERROR(Usable("AllGather"));
  Begin();
  SALA_RETURN_IF_ERROR(Check(ncclGroupStart(), "ncclGroupStart"));
  for (int r = 0; r < size(); ++r) {
    const int64_t n = counts[static_cast<size_t>(r)] * bytes;
    SALA_RETURN_IF_ERROR(Check(ncclBroadcast(r == rank() ? send.raw() : to, to,
                                             static_cast<size_t>(n), ncclChar, r, comm_, stream_),
                               "ncclBroadcast"));
    to += n;
  }
  SALA_RETURN_IF_ERROR(Check(ncclGroupEnd(), "ncclBroadcast"));
  return End("ncclBroadcast");
}

Status NcclCommunicator::Shift(const ConstTensor& send, const Tensor& recv, int by) {
  if (send.device() == DeviceKind::kCpu) return host_->Shift(send, recv, by);
  SALA_RETURN_IF_ERROR(Usable("Shift"));
  const auto n = static_cast<size_t>(send.numel());
  const auto exists = [this](int r) { return 0 <= r && r < size(); };
  Begin();
  SALA_RETURN_IF_ERROR(Check(ncclGroupStart(), "ncclGroupStart"));
  if (exists(rank() + by)) {
    SALA_RETURN_IF_ERROR(
        Check(ncclSend(send.raw(), n, ncclFloat, rank() + by, comm_, stream_), "ncclSend"));
  }
  if (exists(rank() - by)) {
    SALA_RETURN_IF_ERROR(
        Check(ncclRecv(recv.raw(), n, ncclFloat, rank() - by, comm_, stream_), "ncclRecv"));
  }
  SALA_RETURN_IF_ERROR(Check(ncclGroupEnd(), "ncclSend and ncclRecv"));
  return End("ncclSend and ncclRecv");
}

StatusOr<std::unique_ptr<Communicator>> NcclCommunicator::Split(int colour) {
  SALA_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, host_->Split(colour));
  if (part->size() == 1) return MakeStagedCommunicator(std::move(part), device_);
  return MakeNccl(std::move(part), ctx_, ordered_, side_);
}

}  // namespace

StatusOr<std::unique_ptr<Communicator>> MakeNccl(std::unique_ptr<Communicator> host,
                                                 const Context& ctx, bool ordered,
                                                 SideStream* side) {
  Context on = ctx;
  if (side != nullptr) on.gpu = &side->device();
  auto nccl = std::make_unique<NcclCommunicator>(std::move(host), on, ordered,
                                                 static_cast<NcclSide*>(side));
  SALA_RETURN_IF_ERROR(nccl->Init());
  return std::unique_ptr<Communicator>(std::move(nccl));
}

std::unique_ptr<SideStream> MakeSide(Device& compute) {
  return std::make_unique<NcclSide>(static_cast<CudaDevice&>(compute));
}

const NcclInterface& NcclTable() {
  static constexpr NcclInterface table = {.make = &MakeNccl, .make_side = &MakeSide};
  return table;
}

}  // namespace sala::parallel
