#include "parallel/mpi_communicator.h"

#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "core/check.h"
#include "parallel/ordered_sum.h"

namespace sala::parallel {

std::string HostName() {
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  return name;
}

std::string MpiLibraryVersion() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string version(text);
  return version.substr(0, version.find(','));
}

namespace {

Status MpiError(const char* operation, int code) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return MakeError(ExitCode::kDevice, "COMM-FAILED",
                   std::string(operation) + ": on rank " + std::to_string(rank) + "@" + HostName() +
                       ": " + text + "; run again, and look at that host if it repeats");
}

#define SALA_RETURN_IF_MPI_ERROR(call)                                                          \
  do {                                                                                          \
    if (const int mpi_code = (call); mpi_code != MPI_SUCCESS) return MpiError(#call, mpi_code); \
  } while (false)

MPI_Op OpOf(Reduce op) {
  switch (op) {
    case Reduce::kSum:
      return MPI_SUM;
    case Reduce::kMax:
      return MPI_MAX;
    case Reduce::kMin:
      return MPI_MIN;
  }
  return MPI_OP_NULL;
}

// MPI counts are int; the buffers of one call must stay below that.
StatusOr<std::vector<int>> IntCounts(std::span<const int64_t> counts) {
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (total > std::numeric_limits<int>::max()) {
    return MakeError(
        ExitCode::kDevice, "COMM-FAILED",
        "a collective of " + std::to_string(total) + " elements exceeds MPI's limit of 2^31 - 1");
  }
  std::vector<int> result;
  for (int64_t n : counts) result.push_back(static_cast<int>(n));
  return result;
}

std::vector<int> Displacements(const std::vector<int>& counts) {
  std::vector<int> offsets(counts.size(), 0);
  std::exclusive_scan(counts.begin(), counts.end(), offsets.begin(), 0);
  return offsets;
}

// Floats that are exchanged and added at once, of all segments together; but no less than
// kLeastPiece of each.
constexpr int64_t kSumFloats = int64_t{1} << 20;
constexpr int64_t kLeastPiece = int64_t{1} << 12;

class MpiCommunicator : public Communicator {
 public:
  using Communicator::AllGather;
  using Communicator::ReduceScatterSum;
  MpiCommunicator(MPI_Comm comm, bool owned) : comm_(comm), owned_(owned) {
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
    int provided = MPI_THREAD_SINGLE;
    MPI_Query_thread(&provided);
    thread_safe_ = provided == MPI_THREAD_MULTIPLE;
  }
  ~MpiCommunicator() override {
    if (owned_) MPI_Comm_free(&comm_);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  Status Barrier() override {
    SALA_RETURN_IF_MPI_ERROR(MPI_Barrier(comm_));
    return OkStatus();
  }

  // Gathered and added here: the order inside MPI_Allreduce is the library's choice. The vectors
  // are short.
  Status AllReduce(std::span<double> values, Reduce op) override {
    std::vector<double> all(values.size() * static_cast<size_t>(size_));
    const int n = static_cast<int>(values.size());
    SALA_RETURN_IF_MPI_ERROR(
        MPI_Allgather(values.data(), n, MPI_DOUBLE, all.data(), n, MPI_DOUBLE, comm_));
    if (op == Reduce::kSum) {
      AddRows(all.data(), size_, n);
      std::copy_n(all.begin(), values.size(), values.begin());
      return OkStatus();
    }
    for (size_t i = 0; i < all.size(); ++i) {
      double& value = values[i % values.size()];
      value = op == Reduce::kMax ? std::max(value, all[i]) : std::min(value, all[i]);
    }
    return OkStatus();
  }

  Status AllReduce(std::span<int64_t> values, Reduce op) override {
    SALA_RETURN_IF_MPI_ERROR(MPI_Allreduce(MPI_IN_PLACE, values.data(),
                                           static_cast<int>(values.size()), MPI_INT64_T, OpOf(op),
                                           comm_));
    return OkStatus();
  }

  Status ReduceScatterSum(std::span<const float> send, std::span<const int64_t> counts,
                          std::span<float> recv) override {
    SALA_CHECK(static_cast<int>(counts.size()) == size_) << "one count per rank";
    SALA_CHECK(static_cast<int64_t>(recv.size()) == counts[static_cast<size_t>(rank_)])
        << "receive size";
    SALA_ASSIGN_OR_RETURN(const std::vector<int> send_counts, IntCounts(counts));
    const std::vector<int> send_offsets = Displacements(send_counts);
    // In pieces, so that work space stays small.
    const int64_t most = *std::max_element(counts.begin(), counts.end());
    const int64_t limit = std::max(kLeastPiece, kSumFloats / size_);
    work_.resize(static_cast<size_t>(std::min(most, limit) * size_));
    for (int64_t done = 0; done < most; done += limit) {
      const auto piece = [done, limit](int n) {
        return static_cast<int>(std::clamp<int64_t>(n - done, 0, limit));
      };
      std::vector<int> piece_counts;
      std::vector<int> piece_offsets;
      for (size_t r = 0; r < send_counts.size(); ++r) {
        piece_counts.push_back(piece(send_counts[r]));
        piece_offsets.push_back(send_offsets[r] +
                                (piece_counts[r] > 0 ? static_cast<int>(done) : 0));
      }
      const int mine = piece_counts[static_cast<size_t>(rank_)];
      const std::vector<int> recv_counts(static_cast<size_t>(size_), mine);
      const std::vector<int> recv_offsets = Displacements(recv_counts);
      SALA_RETURN_IF_MPI_ERROR(MPI_Alltoallv(send.data(), piece_counts.data(), piece_offsets.data(),
                                             MPI_FLOAT, work_.data(), recv_counts.data(),
                                             recv_offsets.data(), MPI_FLOAT, comm_));
      if (mine == 0) continue;
      AddRows(work_.data(), size_, mine);
      std::copy_n(work_.begin(), mine, recv.begin() + done);
    }
    return OkStatus();
  }

  Status AllGather(std::span<const float> send, std::span<const int64_t> counts,
                   std::span<float> recv) override {
    SALA_ASSIGN_OR_RETURN(const std::vector<int> recv_counts, IntCounts(counts));
    const std::vector<int> recv_offsets = Displacements(recv_counts);
    const bool in_place = send.data() == recv.data() + recv_offsets[static_cast<size_t>(rank_)];
    SALA_RETURN_IF_MPI_ERROR(MPI_Allgatherv(
        in_place ? MPI_IN_PLACE : send.data(), static_cast<int>(send.size()), MPI_FLOAT,
        recv.data(), recv_counts.data(), recv_offsets.data(), MPI_FLOAT, comm_));
    return OkStatus();
  }

  Status Shift(const ConstTensor& send, const Tensor& recv, int by) override {
    SALA_CHECK(by != 0 && std::abs(by) < size_) << "a shift by " << by << " over " << size_;
    const auto partner = [this](int r) { return 0 <= r && r < size_ ? r : MPI_PROC_NULL; };
    const int n = static_cast<int>(send.numel());
    const int tag = std::abs(by);
    SALA_RETURN_IF_MPI_ERROR(MPI_Sendrecv(send.Data<float>(), n, MPI_FLOAT, partner(rank_ + by),
                                          tag, recv.Data<float>(), n, MPI_FLOAT,
                                          partner(rank_ - by), tag, comm_, MPI_STATUS_IGNORE));
    return OkStatus();
  }

  bool thread_safe() const override { return thread_safe_; }

  Status Broadcast(std::span<char> bytes, int root) override {
    constexpr size_t kPiece = size_t{1} << 30;
    for (size_t begin = 0; begin < bytes.size(); begin += kPiece) {
      const size_t n = std::min(kPiece, bytes.size() - begin);
      SALA_RETURN_IF_MPI_ERROR(
          MPI_Bcast(bytes.data() + begin, static_cast<int>(n), MPI_CHAR, root, comm_));
    }
    return OkStatus();
  }

  StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) override {
    std::vector<int64_t> sizes(static_cast<size_t>(size_), 0);
    const auto mine = static_cast<int64_t>(text.size());
    SALA_RETURN_IF_MPI_ERROR(
        MPI_Allgather(&mine, 1, MPI_INT64_T, sizes.data(), 1, MPI_INT64_T, comm_));
    SALA_ASSIGN_OR_RETURN(const std::vector<int> counts, IntCounts(sizes));
    const std::vector<int> offsets = Displacements(counts);
    std::string all(static_cast<size_t>(offsets.back() + counts.back()), '\0');
    SALA_RETURN_IF_MPI_ERROR(MPI_Allgatherv(text.data(), static_cast<int>(mine), MPI_CHAR,
                                            all.data(), counts.data(), offsets.data(), MPI_CHAR,
                                            comm_));
    std::vector<std::string> result;
    for (size_t r = 0; r < counts.size(); ++r) {
      result.push_back(all.substr(static_cast<size_t>(offsets[r]), static_cast<size_t>(counts[r])));
    }
    return result;
  }

  StatusOr<std::unique_ptr<Communicator>> Split(int colour) override {
    MPI_Comm part = MPI_COMM_NULL;
    SALA_RETURN_IF_MPI_ERROR(MPI_Comm_split(comm_, colour, rank_, &part));
    return std::unique_ptr<Communicator>(std::make_unique<MpiCommunicator>(part, true));
  }

 private:
  MPI_Comm comm_;
  bool owned_;
  int rank_ = 0;
  int size_ = 1;
  bool thread_safe_ = false;
  std::vector<float> work_;
};

}  // namespace

StatusOr<std::unique_ptr<MpiSession>> MpiSession::Start(int* argc, char*** argv) {
  int provided = 0;
  if (const int code = MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
      code != MPI_SUCCESS) {
    return MakeError(
        ExitCode::kDevice, "COMM-FAILED",
        "MPI_Init_thread returned " + std::to_string(code) + "; sala doctor tries MPI alone");
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  std::unique_ptr<MpiSession> session(new MpiSession());
  MPI_Comm_size(MPI_COMM_WORLD, &session->size_);
  session->host_ = HostName();
  SALA_RETURN_IF_ERROR(session->NumberRanks());
  return session;
}

// Ranks of one host get neighbouring numbers, hosts in order of their lowest rank, so that groups
// of neighbours (tensor parallelism) stay on a host however the launcher dealt the ranks out.
Status MpiSession::NumberRanks() {
  MpiCommunicator all(MPI_COMM_WORLD, false);
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> hosts, all.AllGatherText(host_));
  int key = 0;
  for (auto it = hosts.begin(); it != hosts.end(); ++it) {
    const auto mine = std::find(hosts.begin(), hosts.end(), host_);
    const auto first = std::find(hosts.begin(), hosts.end(), *it);
    const bool before = first < mine || (first == mine && it - hosts.begin() < all.rank());
    if (before) ++key;
  }
  MPI_Comm world = MPI_COMM_NULL;
  SALA_RETURN_IF_MPI_ERROR(MPI_Comm_split(MPI_COMM_WORLD, 0, key, &world));
  world_ = std::make_unique<MpiCommunicator>(world, true);
  rank_ = world_->rank();
  return OkStatus();
}

MpiSession::~MpiSession() {
  world_.reset();
  MPI_Finalize();
}

StatusOr<std::unique_ptr<Communicator>> MpiSession::World() {
  if (size_ == 1) return MakeSelfCommunicator();
  return world_->Split(0);
}

void MpiSession::Abort(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  _exit(exit_code);
}

bool BuiltWithMpi() { return true; }

bool LaunchedByMpi() {
  return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMIX_RANK") != nullptr ||
         std::getenv("PMI_RANK") != nullptr;
}

}  // namespace sala::parallel
