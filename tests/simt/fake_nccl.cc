// Stand-in for NCCL over MPI, defined against its genuine header. One process is one rank.
//
// An operation runs when its stream runs, and waits there for the other ranks. Sums are added in
// rank order in float32 (bf16) or in their own type, rounded once: the same bits on every rank and
// in every run. Sends and receives of a group run together. MPI must be initialised before a
// communicator of more than one rank is made; one rank alone needs no MPI.
#include <cuda_bf16.h>
#include <mpi.h>
#include <nccl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "tests/simt/device.h"
#include "tests/simt/sanitizer.h"

namespace device = simt::device;

namespace {

// Shared by the handle and the work in the queues.
struct Communicator {
  MPI_Comm mpi = MPI_COMM_NULL;  // null with one rank
  int size = 1;
  int rank = 0;
  bool aborted = false;

  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  ~Communicator() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (mpi != MPI_COMM_NULL && finalized == 0 && !aborted) MPI_Comm_free(&mpi);
  }
};

}  // namespace

struct ncclComm {
  std::shared_ptr<Communicator> shared = std::make_shared<Communicator>();
};

namespace {

using Bytes = std::vector<char>;
using simt::sanitizer::Unwatched;  // around MPI, whose memory is its own affair

constexpr size_t kChunkBytes = size_t{16} << 20;  // of one rank, in one MPI call
constexpr int kMakeTag = 29000;                   // of the messages that make a communicator
constexpr int kDataTag = 7;

size_t SizeOf(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 0;  // not supported here
  }
}

// ---------------------------------------------------------------------------- reductions

float ToSum(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T>
T ToSum(T value) {
  return value;
}
void FromSum(float sum, __nv_bfloat16* value) { *value = __float2bfloat16(sum); }
template <typename T>
void FromSum(T sum, T* value) {
  *value = sum;
}

template <typename T>
T Join(T a, T b, ncclRedOp_t op) {
  switch (op) {
    case ncclProd:
      return static_cast<T>(a * b);
    case ncclMax:
      return a < b ? b : a;
    case ncclMin:
      return b < a ? b : a;
    default:  // sum, average
      return static_cast<T>(a + b);
  }
}

// result[i] = parts[0][i] op parts[1][i] ...; the parts lie one after the other.
template <typename T>
void JoinParts(const char* parts, int ranks, size_t count, ncclRedOp_t op, void* result) {
  const auto* values = reinterpret_cast<const T*>(parts);
  auto* to = static_cast<T*>(result);
  for (size_t i = 0; i < count; ++i) {
    auto sum = ToSum(values[i]);
    for (int r = 1; r < ranks; ++r) sum = Join(sum, ToSum(values[r * count + i]), op);
    if (op == ncclAvg) sum = static_cast<decltype(sum)>(sum / static_cast<decltype(sum)>(ranks));
    FromSum(sum, &to[i]);
  }
}

void JoinParts(ncclDataType_t type, const char* parts, int ranks, size_t count, ncclRedOp_t op,
               void* result) {
  switch (type) {
    case ncclInt8:
      return JoinParts<int8_t>(parts, ranks, count, op, result);
    case ncclUint8:
      return JoinParts<uint8_t>(parts, ranks, count, op, result);
    case ncclInt32:
      return JoinParts<int32_t>(parts, ranks, count, op, result);
    case ncclUint32:
      return JoinParts<uint32_t>(parts, ranks, count, op, result);
    case ncclInt64:
      return JoinParts<int64_t>(parts, ranks, count, op, result);
    case ncclUint64:
      return JoinParts<uint64_t>(parts, ranks, count, op, result);
    case ncclFloat32:
      return JoinParts<float>(parts, ranks, count, op, result);
    case ncclFloat64:
      return JoinParts<double>(parts, ranks, count, op, result);
    default:
      return JoinParts<__nv_bfloat16>(parts, ranks, count, op, result);
  }
}

// Calls body(first, elements) over pieces of [0, count) that MPI can carry.
template <typename Body>
void ForChunks(size_t count, size_t element, const Body& body) {
  const size_t step = std::max<size_t>(1, kChunkBytes / element);
  for (size_t first = 0; first < count; first += step) body(first, std::min(step, count - first));
}

const char* At(const void* base, size_t bytes) { return static_cast<const char*>(base) + bytes; }
char* At(void* base, size_t bytes) { return static_cast<char*>(base) + bytes; }

// ---------------------------------------------------------------------------- collectives

void RunAllReduce(const Communicator& comm, const void* send, void* receive, size_t count,
                  ncclDataType_t type, ncclRedOp_t op) {
  const size_t element = SizeOf(type);
  ForChunks(count, element, [&](size_t first, size_t n) {
    Bytes mine(At(send, first * element), At(send, (first + n) * element));
    Bytes all(mine.size() * comm.size);
    const auto bytes = static_cast<int>(mine.size());
    {
      const Unwatched unwatched;
      MPI_Allgather(mine.data(), bytes, MPI_BYTE, all.data(), bytes, MPI_BYTE, comm.mpi);
    }
    JoinParts(type, all.data(), comm.size, n, op, At(receive, first * element));
  });
}

void RunReduce(const Communicator& comm, const void* send, void* receive, size_t count,
               ncclDataType_t type, ncclRedOp_t op, int root) {
  const size_t element = SizeOf(type);
  ForChunks(count, element, [&](size_t first, size_t n) {
    Bytes mine(At(send, first * element), At(send, (first + n) * element));
    Bytes all(comm.rank == root ? mine.size() * comm.size : 0);
    const auto bytes = static_cast<int>(mine.size());
    {
      const Unwatched unwatched;
      MPI_Gather(mine.data(), bytes, MPI_BYTE, all.data(), bytes, MPI_BYTE, root, comm.mpi);
    }
    if (comm.rank == root) {
      JoinParts(type, all.data(), comm.size, n, op, At(receive, first * element));
    }
  });
}

// `count` elements for each rank.
void RunReduceScatter(const Communicator& comm, const void* send, void* receive, size_t count,
                      ncclDataType_t type, ncclRedOp_t op) {
  const size_t element = SizeOf(type);
  Bytes result(count * element);  // apart: receive may be a piece of send
  ForChunks(count, element, [&](size_t first, size_t n) {
    Bytes mine(n * element * comm.size);
    for (int r = 0; r < comm.size; ++r) {
      std::memcpy(&mine[r * n * element], At(send, (r * count + first) * element), n * element);
    }
    Bytes all(mine.size());
    const auto bytes = static_cast<int>(n * element);
    {
      const Unwatched unwatched;
      MPI_Alltoall(mine.data(), bytes, MPI_BYTE, all.data(), bytes, MPI_BYTE, comm.mpi);
    }
    JoinParts(type, all.data(), comm.size, n, op, &result[first * element]);
  });
  std::memcpy(receive, result.data(), result.size());
}

void RunBroadcast(const Communicator& comm, const void* send, void* receive, size_t bytes,
                  int root) {
  ForChunks(bytes, 1, [&](size_t first, size_t n) {
    Bytes piece(n);
    if (comm.rank == root) std::memcpy(piece.data(), At(send, first), n);
    {
      const Unwatched unwatched;
      MPI_Bcast(piece.data(), static_cast<int>(n), MPI_BYTE, root, comm.mpi);
    }
    std::memcpy(At(receive, first), piece.data(), n);
  });
}

void RunAllGather(const Communicator& comm, const void* send, void* receive, size_t bytes) {
  const Bytes mine(At(send, 0), At(send, bytes));  // apart: send may be a piece of receive
  ForChunks(bytes, 1, [&](size_t first, size_t n) {
    Bytes all(n * comm.size);
    const auto count = static_cast<int>(n);
    {
      const Unwatched unwatched;
      MPI_Allgather(&mine[first], count, MPI_BYTE, all.data(), count, MPI_BYTE, comm.mpi);
    }
    for (int r = 0; r < comm.size; ++r) {
      std::memcpy(At(receive, r * bytes + first), &all[r * n], n);
    }
  });
}

// ---------------------------------------------------------------------------- groups

struct Message {
  std::shared_ptr<Communicator> comm;
  bool sends;
  const void* from;
  void* to;
  size_t bytes;
  int peer;
  cudaStream_t stream;
};

struct Group {
  int depth = 0;
  std::vector<Message> messages;
  std::vector<std::function<void()>> collectives;  // puts them on their streams
};

thread_local Group group;

// With one rank there is nobody but oneself: sends and receives meet in their order.
void RunAlone(const std::vector<Message>& messages) {
  std::vector<const Message*> sends;
  std::vector<const Message*> receives;
  for (const Message& message : messages) {
    if (message.comm->size == 1) (message.sends ? sends : receives).push_back(&message);
  }
  for (size_t i = 0; i < std::min(sends.size(), receives.size()); ++i) {
    std::memmove(receives[i]->to, sends[i]->from, std::min(sends[i]->bytes, receives[i]->bytes));
  }
}

void RunMessages(const std::vector<Message>& messages) {
  RunAlone(messages);
  std::vector<MPI_Request> requests;
  for (const Message& message : messages) {
    if (message.comm->size == 1) continue;
    if (message.sends) {
      simt::sanitizer::ReadRange(message.from, message.bytes);
    } else {
      simt::sanitizer::WriteRange(message.to, message.bytes);
    }
  }
  const Unwatched unwatched;
  for (const Message& message : messages) {
    if (message.comm->size == 1) continue;
    ForChunks(message.bytes, 1, [&](size_t first, size_t n) {
      requests.emplace_back();
      if (message.sends) {
        MPI_Isend(At(message.from, first), static_cast<int>(n), MPI_BYTE, message.peer, kDataTag,
                  message.comm->mpi, &requests.back());
      } else {
        MPI_Irecv(At(message.to, first), static_cast<int>(n), MPI_BYTE, message.peer, kDataTag,
                  message.comm->mpi, &requests.back());
      }
    });
  }
  MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
}

// All messages run as one piece of work on the first one's stream; the other streams wait.
void PutMessages(std::vector<Message> messages) {
  if (messages.empty()) return;
  const cudaStream_t stream = messages.front().stream;
  std::vector<cudaStream_t> others;
  for (const Message& message : messages) {
    if (message.stream != stream &&
        std::find(others.begin(), others.end(), message.stream) == others.end()) {
      others.push_back(message.stream);
    }
  }
  for (cudaStream_t other : others) {
    auto before = device::CreateEvent();
    device::Record(before, other);
    device::StreamWait(stream, before);
  }
  device::Enqueue(stream, [messages = std::move(messages)] { RunMessages(messages); });
  for (cudaStream_t other : others) {
    auto after = device::CreateEvent();
    device::Record(after, stream);
    device::StreamWait(other, after);
  }
}

ncclResult_t FinishGroup() {
  Group finished;
  std::swap(finished, group);
  for (const auto& put : finished.collectives) put();
  PutMessages(std::move(finished.messages));
  return ncclSuccess;
}

ncclResult_t CheckCall(ncclComm_t comm, cudaStream_t stream) {
  if (comm == nullptr || !device::StreamExists(stream)) return ncclInvalidArgument;
  if (comm->shared->aborted) return ncclInvalidUsage;
  if (device::FailsNow("nccl") || device::StickyError() != cudaSuccess) {
    return ncclUnhandledCudaError;
  }
  return ncclSuccess;
}

ncclResult_t PutCollective(ncclComm_t comm, cudaStream_t stream, ncclDataType_t type,
                           std::function<void(const Communicator&)> run) {
  if (const ncclResult_t result = CheckCall(comm, stream); result != ncclSuccess) return result;
  if (SizeOf(type) == 0) return ncclInvalidArgument;
  auto put = [shared = comm->shared, stream, run = std::move(run)] {
    device::Enqueue(stream, [shared, run] { run(*shared); });
  };
  if (group.depth > 0) {
    group.collectives.push_back(std::move(put));
  } else {
    put();
  }
  return ncclSuccess;
}

ncclResult_t PutMessage(ncclComm_t comm, Message message) {
  if (const ncclResult_t result = CheckCall(comm, message.stream); result != ncclSuccess) {
    return result;
  }
  if (message.peer < 0 || message.peer >= comm->shared->size) return ncclInvalidArgument;
  message.comm = comm->shared;
  group.messages.push_back(std::move(message));
  return group.depth > 0 ? ncclSuccess : FinishGroup();
}

// ---------------------------------------------------------------------------- communicators

struct Identity {
  int maker;   // rank in MPI_COMM_WORLD of who made it; must be a member
  int number;  // of this maker's identities
};

bool HasMpi() {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

int WorldRank() {
  int rank = 0;
  if (HasMpi()) MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

// Members know each other only by the identity: they report to its maker, who answers with the
// list.
std::vector<int> MeetMembers(const Identity& identity, int size, int rank) {
  const int tag = kMakeTag + identity.number % 1000;
  std::vector<int> members(size);
  if (WorldRank() != identity.maker) {
    const int mine[2] = {rank, WorldRank()};
    MPI_Send(mine, 2, MPI_INT, identity.maker, tag, MPI_COMM_WORLD);
    MPI_Recv(members.data(), size, MPI_INT, identity.maker, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    return members;
  }
  members[rank] = WorldRank();
  for (int i = 1; i < size; ++i) {
    int other[2];
    MPI_Recv(other, 2, MPI_INT, MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    members[other[0]] = other[1];
  }
  for (int r = 0; r < size; ++r) {
    if (r == rank) continue;
    MPI_Send(members.data(), size, MPI_INT, members[r], tag, MPI_COMM_WORLD);
  }
  return members;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static int made = 0;
  std::memset(id, 0, sizeof *id);
  const Identity identity{WorldRank(), ++made};
  std::memcpy(id->internal, &identity, sizeof identity);
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  if (comm == nullptr || size < 1 || rank < 0 || rank >= size) return ncclInvalidArgument;
  if (device::FailsNow("nccl")) return ncclUnhandledCudaError;
  if (size > 1 && !HasMpi()) return ncclInvalidUsage;
  auto made = std::make_unique<ncclComm>();
  made->shared->size = size;
  made->shared->rank = rank;
  if (size > 1) {
    Identity identity;
    std::memcpy(&identity, id.internal, sizeof identity);
    const std::vector<int> members = MeetMembers(identity, size, rank);
    MPI_Group world;
    MPI_Group some;
    MPI_Comm_group(MPI_COMM_WORLD, &world);
    MPI_Group_incl(world, size, members.data(), &some);
    MPI_Comm_create_group(MPI_COMM_WORLD, some, kMakeTag + identity.number % 1000,
                          &made->shared->mpi);
    MPI_Group_free(&some);
    MPI_Group_free(&world);
  }
  *comm = made.release();
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t*) {
  return ncclCommInitRank(comm, size, id, rank);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* result, ncclConfig_t*) {
  if (comm == nullptr || result == nullptr) return ncclInvalidArgument;
  *result = nullptr;
  auto made = std::make_unique<ncclComm>();
  if (comm->shared->size > 1) {
    MPI_Comm_split(comm->shared->mpi, color == NCCL_SPLIT_NOCOLOR ? MPI_UNDEFINED : color, key,
                   &made->shared->mpi);
    if (made->shared->mpi != MPI_COMM_NULL) {
      MPI_Comm_size(made->shared->mpi, &made->shared->size);
      MPI_Comm_rank(made->shared->mpi, &made->shared->rank);
    }
  }
  if (color != NCCL_SPLIT_NOCOLOR) *result = made.release();
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm == nullptr) return ncclInvalidArgument;
  device::SynchronizeAll();
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  if (comm == nullptr) return ncclInvalidArgument;
  comm->shared->aborted = true;
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  if (comm == nullptr || error == nullptr) return ncclInvalidArgument;
  *error = device::StickyError() == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
  return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  if (comm == nullptr) return ncclInvalidArgument;
  *count = comm->shared->size;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  if (comm == nullptr) return ncclInvalidArgument;
  *rank = comm->shared->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* index) {
  if (comm == nullptr) return ncclInvalidArgument;
  return cudaGetDevice(index) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "unhandled cuda error";
    case ncclSystemError:
      return "unhandled system error";
    case ncclInternalError:
      return "internal error";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    default:
      return "unknown result code";
  }
}
const char* ncclGetLastError(ncclComm_t) { return ""; }

// ---------------------------------------------------------------------------- operations

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return PutCollective(comm, stream, type, [=](const Communicator& shared) {
    if (shared.size > 1) return RunAllReduce(shared, send, receive, count, type, op);
    if (send != receive) std::memmove(receive, send, count * SizeOf(type));
  });
}
ncclResult_t ncclReduce(const void* send, void* receive, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
  return PutCollective(comm, stream, type, [=](const Communicator& shared) {
    if (shared.size > 1) return RunReduce(shared, send, receive, count, type, op, root);
    if (send != receive) std::memmove(receive, send, count * SizeOf(type));
  });
}
ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return PutCollective(comm, stream, type, [=](const Communicator& shared) {
    if (shared.size > 1) return RunReduceScatter(shared, send, receive, count, type, op);
    if (send != receive) std::memmove(receive, send, count * SizeOf(type));
  });
}
ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream) {
  return PutCollective(comm, stream, type, [=](const Communicator& shared) {
    if (shared.size > 1) return RunBroadcast(shared, send, receive, count * SizeOf(type), root);
    if (send != receive) std::memmove(receive, send, count * SizeOf(type));
  });
}
ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}
ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
  return PutCollective(comm, stream, type, [=](const Communicator& shared) {
    if (shared.size > 1) return RunAllGather(shared, send, receive, count * SizeOf(type));
    if (send != receive) std::memmove(receive, send, count * SizeOf(type));
  });
}
ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  return PutMessage(comm,
                    Message{nullptr, true, from, nullptr, count * SizeOf(type), peer, stream});
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return PutMessage(comm, Message{nullptr, false, nullptr, to, count * SizeOf(type), peer, stream});
}

ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (group.depth == 0) return ncclInvalidUsage;
  return --group.depth == 0 ? FinishGroup() : ncclSuccess;
}

}  // extern "C"
