// Inside of the emulator: the threads, warps and block that one OS thread is running.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "tests/simt/fiber.h"
#include "tests/simt/sanitizer.h"
#include "tests/simt/simt_core.h"

namespace simt {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

struct Copy {
  void* destination;
  const void* source;
  int bytes;
  int source_bytes;
  Where where;
};

// A committed group of cp.async: where it ends in CopyQueue::copies. A type of its own, so that no
// instrumented std::vector of other code is linked in its place.
struct GroupEnd {
  size_t copies;
};

// The cp.async copies of one thread.
struct CopyQueue {
  std::vector<Copy> copies;
  std::vector<GroupEnd> groups;
  size_t landed_copies = 0;
  size_t landed_groups = 0;

  void Clear() {
    copies.clear();
    groups.clear();
    landed_copies = landed_groups = 0;
  }
};

struct Fiber {
  Context context;
  uint3 index;
  int id;
  int warp;
  int lane;
  Where where;        // of the last primitive
  const char* doing;  // its name
  int pieces_taken;   // of shared memory
  void* tsan = nullptr;
  CopyQueue async;
};

// Lanes on their way into one warp instruction: the same instruction, mask and source line.
struct Group {
  const WarpOp* op;
  unsigned mask;
  unsigned arrived;
  Where where;
};

// Which threads can run is kept by position in the order of turns, what the kernel sees by lane.
struct Warp {
  unsigned exists;              // lanes that the block has
  unsigned exited;              // lanes
  unsigned runnable;            // positions waiting for their turn
  unsigned at_barrier;          // positions
  unsigned patient;             // positions that can run, but want all others to go first
  bool natural;                 // position = lane
  Fiber* fibers;                // of lane 0
  uint8_t order[kWarpSize];     // lane at a position
  uint8_t position[kWarpSize];  // of a lane
  int group_count;
  Group groups[kWarpSize];
  WarpLanes lanes;
};

// A piece of shared memory: `bytes` exactly, between canaries where no sanitizer looks after it.
struct Piece {
  int64_t bytes = 0;
  char* memory = nullptr;  // what malloc gave
  char* data = nullptr;
  Where where;
};

// What the blocks of a grid share while it runs.
struct RunningGrid {
  const Grid* grid;
  uint64_t block_count;
  std::atomic<uint64_t> next{0};
  sanitizer::Tag* start;  // released by the launch, acquired by each thread that begins
  sanitizer::Tag* end;    // released by each thread that ends, acquired by the end of the launch
};

class Block {
 public:
  explicit Block(int thread_count);
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();

  int thread_count() const { return thread_count_; }
  // Runs blocks of the grid until none is left.
  void RunAll(RunningGrid& running);

  int Barrier(BarrierKind kind, int predicate, const Where& where);
  uint64_t Collective(const WarpOp& op, unsigned mask, uint64_t in, uint64_t aux,
                      const Where& where);
  void* TakeShared(int64_t index, int64_t bytes, const Where& where);
  // Returns when no other thread can run without waiting likewise.
  void LetOthersGoFirst();
  // A list of threads and where they are, for reports.
  std::string Threads() const;
  std::string Description() const;

 private:
  static void FiberMain();
  void RunOne(uint64_t number);
  void Prepare(uint64_t number);
  void NameTsanFibers() const;
  void Exit(Fiber& me);
  Fiber* Next(const Fiber* me);
  Fiber* NextRunnable(const Fiber* me);
  Fiber* FirstAtBarrier();
  void Yield(Fiber& me);
  void Jump(Context* save, Context* load, Fiber* to, bool last);
  void OpenBarrier(const Fiber& as);
  void Complete(Warp& warp, int group_number, const Fiber& me);
  void CheckPieces();
  void FreePiece(Piece& piece);
  [[noreturn]] void Deadlock();
  bool Waits(const Fiber& fiber) const;

  // Markers for ThreadSanitizer, fresh for each block.
  sanitizer::Tag* InTag(const Fiber& fiber) { return tags_ + fiber.id; }
  sanitizer::Tag* OutTag(const Fiber& fiber) { return tags_ + kMaxThreads + fiber.id; }
  sanitizer::Tag* BarrierIn() { return tags_ + 2 * kMaxThreads + (barriers_ & 1); }
  sanitizer::Tag* BarrierOut() { return tags_ + 2 * kMaxThreads + 2 + (barriers_ & 1); }
  sanitizer::Tag* PieceTag(int64_t index) { return tags_ + 2 * kMaxThreads + 4 + index; }

  const int thread_count_;
  const int warp_count_;
  Stacks stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> warp_order_;
  std::vector<int> warp_position_;
  bool has_patient_ = false;
  std::vector<Piece> pieces_;
  int piece_count_ = 0;
  int64_t shared_used_ = 0;
  RunningGrid* running_ = nullptr;

  Context scheduler_;
  void* scheduler_tsan_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;

  int live_ = 0;
  int arrived_ = 0;  // at the barrier
  uint64_t barriers_ = 0;
  BarrierKind barrier_kind_ = BarrierKind::kPlain;
  Where barrier_where_;
  int barrier_count_ = 0;  // threads whose predicate is not zero
  int barrier_results_[2] = {};
  sanitizer::Tag* tags_ = nullptr;
  Stats stats_;
};

// The block and thread that this OS thread is running; null outside of kernels.
extern constinit thread_local Block* current_block __attribute__((tls_model("initial-exec")));
extern constinit thread_local Fiber* current_fiber __attribute__((tls_model("initial-exec")));

inline bool SamePlace(const Where& a, const Where& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name());
}
std::string PlaceName(const Where& where);
// Adds to what TakeStats gives.
void AddStats(const Stats& stats);

}  // namespace simt

extern constinit thread_local uint3 threadIdx __attribute__((tls_model("initial-exec")));
extern constinit thread_local uint3 blockIdx __attribute__((tls_model("initial-exec")));
extern constinit thread_local dim3 blockDim __attribute__((tls_model("initial-exec")));
extern constinit thread_local dim3 gridDim __attribute__((tls_model("initial-exec")));
