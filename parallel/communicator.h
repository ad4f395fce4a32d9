// Communication between ranks. One interface, several implementations: `self` (one rank) and `mpi`
// for host memory; for device memory `staged`, which takes its way through host memory and one of
// these, and `nccl` (parallel/device_communicator.h).
//
// Every call is collective: all ranks of the communicator call it in the same order with matching
// sizes. Sums of floating point numbers are added over ranks by the tree of parallel/ordered_sum.h,
// so they have the same bits in every run and on every rank. Failures of the library below end in
// COMM-FAILED (exit 71) with operation, rank and host.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "core/status.h"
#include "core/tensor.h"

namespace sala::parallel {

enum class Reduce { kSum, kMax, kMin };

class Communicator {
 public:
  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  virtual Status Barrier() = 0;
  // In place; every rank ends with the same values.
  virtual Status AllReduce(std::span<double> values, Reduce op) = 0;
  virtual Status AllReduce(std::span<int64_t> values, Reduce op) = 0;

  // `send` [sum of counts] holds every rank's contribution to all segments; `recv` [counts[rank]]
  // becomes the sum over ranks of segment `rank`. May not overlap.
  virtual Status ReduceScatterSum(std::span<const float> send, std::span<const int64_t> counts,
                                  std::span<float> recv) = 0;

  // `recv` [sum of counts] becomes all ranks' segments in rank order; `send` [counts[rank]] may be
  // this rank's place in recv.
  virtual Status AllGather(std::span<const float> send, std::span<const int64_t> counts,
                           std::span<float> recv) = 0;

  // The same on flat tensors wherever they lie: ReduceScatterSum f32, AllGather f32 or bf16 (counts
  // are elements, for bf16 even ones). On a device they are ordered with the compute stream: inputs
  // need not be ready at the call, results need not be at its return. Here: host memory, f32.
  virtual Status ReduceScatterSum(const ConstTensor& send, std::span<const int64_t> counts,
                                  const Tensor& recv);
  virtual Status AllGather(const ConstTensor& send, std::span<const int64_t> counts,
                           const Tensor& recv);

  // `recv` of rank r becomes `send` of rank r - by, for every r where both exist: nothing wraps
  // around, and a rank that nobody sends to keeps its recv. Float32 of equal size on all ranks,
  // wherever it lies; 0 < |by| < size. May not overlap. Here: no other rank exists.
  virtual Status Shift(const ConstTensor& send, const Tensor& recv, int by);

  // Whether two threads may be in calls of two communicators at the same time.
  virtual bool thread_safe() const { return false; }

  virtual Status Broadcast(std::span<char> bytes, int root) = 0;

  // Every rank's text, in rank order, on every rank.
  virtual StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) = 0;

  // A new communicator of the ranks that pass the same colour, ordered by rank here.
  virtual StatusOr<std::unique_ptr<Communicator>> Split(int colour) = 0;
};

// AllGather for buffers of any size: MPI counts elements with an int. `piece` elements of each
// segment travel at once.
Status AllGatherInPieces(Communicator& comm, std::span<const float> send,
                         std::span<const int64_t> counts, std::span<float> recv,
                         int64_t piece = int64_t{1} << 24);

// values f32, flat, wherever they lie: becomes the sum over ranks, the same bits on every rank.
// `work` keeps the memory it needs (a rank's share of the values) for the next call.
Status AllReduceSum(Communicator& comm, const Tensor& values, Device* device, Buffer* work);
// Floats of work memory that it takes for n values.
int64_t AllReduceWork(const Communicator& comm, int64_t n);

// A failed exchange where there is no Status to return, in the middle of a layer. It ends the run
// (launch/train.cc): what the other ranks are doing is not known.
class CommError : public std::exception {
 public:
  explicit CommError(Status status) : status_(std::move(status)), text_(MessageOf(status_)) {}
  const char* what() const noexcept override { return text_.c_str(); }
  const Status& status() const { return status_; }

 private:
  Status status_;
  std::string text_;
};
void OrThrow(const Status& status);

// One rank that talks to itself.
std::unique_ptr<Communicator> MakeSelfCommunicator();

// The same error on every rank: if any rank passes an error, all return an error (their own, or the
// lowest failing rank's text with its exit code). Lets a fault of one rank end the run in order
// instead of leaving the others waiting.
Status AgreeOnStatus(Communicator& comm, const Status& mine);

}  // namespace sala::parallel
